# One measurement of one GPU, 480 s at most: versions, all tests that need one, benchmarks/ops.py, benchmarks/end_to_end.py.
#
#   OUT=results [WHEELS=dir] [KERNELS=dir] bash benchmarks/gpu.sh
#
# Run it in the root of the repository, with a Python that has torch, triton, transformers, lightning, pytest and pytest-xdist;
# nothing is downloaded. WHEELS holds wheels to install beside (this project's, Liger's), KERNELS other people's kernels (see
# benchmarks/ops_kernels.py). Each part leaves what it has when its time is over. The card's settings are read, never changed.
set -u
set -o pipefail
export OUT=${OUT:-runs/gpu} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton} PYTHONPATH=$PWD
mkdir -p "$OUT"
start=$(date +%s)
lap() { echo "== $(($(date +%s) - start)) s: $*" | tee -a "$OUT/versions.txt"; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$OUT/versions.txt"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  timeout 30 python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl 2>&1 | tail -2
  PYTHONPATH=$PWD:$site
fi
timeout 20 python3 - <<'P' 2>&1 | tee -a "$OUT/versions.txt"
import sys
from importlib.metadata import PackageNotFoundError, version

def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"

names = "torch triton lightning torchmetrics transformers numpy pytest liger-kernel lightning-rejuv"
print(sys.version.split()[0], *(f"{name} {of(name)}" for name in names.split()))
P
lap tests
timeout -k 5 110 python3 -m pytest -v -n 10 --maxfail=30 -p no:cacheprovider -m "slow or not slow" -k cuda \
  tests/ops/test_cuda.py tests/ops/test_cuda_ops.py tests/ops/test_conformance.py tests/ops/test_conformance_tokens.py \
  tests/ops/test_conformance_lerp.py \
  tests/test_cuda.py tests/studies/real/test_miniature.py tests/studies/real/test_resets.py --durations=15 >"$OUT/tests.txt" 2>&1
lap "tests ended with $?"
tail -20 "$OUT/tests.txt" | cut -c1-300
timeout -k 5 130 python3 benchmarks/ops.py --out "$OUT" --budget 110 ${KERNELS:+--kernels "$KERNELS"} >"$OUT/ops.txt" 2>&1
lap "ops ended with $?"
tail -80 "$OUT/ops.txt" | cut -c1-150
timeout -k 5 200 python3 benchmarks/end_to_end.py --out "$OUT" --budget 160 >"$OUT/end_to_end.txt" 2>&1
lap "end_to_end ended with $?"
tail -30 "$OUT/end_to_end.txt" | cut -c1-420
