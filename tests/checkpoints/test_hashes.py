"""The SHA-256 of inputs and output: those of the whole files, however they were read; and what there is without."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lightning_rejuv.checkpoints import diagnose, merge_adapter, rejuvenate_adapter, verify
from lightning_rejuv.checkpoints.writer import Hasher
from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import WORDS, fuse, known_pair, pair, resave, tensors, write_tokenizer


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(report):
    """Every digest of a report beside hashlib's."""
    for role, found in report.inputs.items():
        assert any(name.endswith(".safetensors") for name in found["sha256"])
        for name, said in found["sha256"].items():
            assert said == digest(Path(found["path"]) / name), (role, name)
    for name, said in report.outputs.items():
        assert said == digest(Path(report.output) / name)


@pytest.fixture
def read_alone(monkeypatch):
    """How many bytes of weight files the hashes alone read."""
    from lightning_rejuv.checkpoints import writer

    read, real = [], writer._InputHasher._fill

    def fill(self, name, found, start, stop):
        read.append(stop - start)
        real(self, name, found, start, stop)

    monkeypatch.setattr(writer._InputHasher, "_fill", fill)
    return read


def _single(path):
    resave(path, lambda state: state)


def _sharded(path):
    state = tensors(path)
    for file in path.glob("model*"):
        file.unlink()
    place = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2])):
        save_file({name: state[name] for name in names}, path / f"model-{number}.safetensors")
        place |= dict.fromkeys(names, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def _reversed(path):
    """One file whose tensors lie in the reverse of their order, which safetensors itself never writes."""
    from lightning_rejuv.anchor.header import build_header

    state = tensors(path)
    for file in path.glob("model*"):
        file.unlink()
    entries = sorted(state.items(), reverse=True)
    content = build_header([(n, t.dtype, tuple(t.shape)) for n, t in entries], {"format": "pt"})
    content += b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for _, t in entries)
    (path / "model.safetensors").write_bytes(content)


def _with_more(path):
    """Tensors that the other does not have, or that are not fused, between those that are."""
    more = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(40) for n in range(2)}
    resave(path, lambda state: {**state, **more})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_base", [_single, _sharded, _reversed, _with_more])
@pytest.mark.parametrize("of_sft", [_single, _sharded, _reversed])
def test_digests_are_those_of_the_whole_files(tmp_path, monkeypatch, of_base, of_sft, dtype):
    """In float32 the pieces that are hashed are what is computed with: they are left as they are."""
    base, sft = pair(tmp_path, tokenizer=False, dtype=dtype)
    of_base(base)
    of_sft(sft)
    for piece in (1 << 18, 100):
        monkeypatch.setattr("lightning_rejuv.checkpoints.stream._PIECE", piece)
        check(fuse(base, sft)[1])


def test_digests_with_another_vocabulary(tmp_path):
    base, sft = pair(tmp_path, tokenizer=False)
    words = [*WORDS, *(f"w{i}" for i in range(48 - len(WORDS)))]
    write_tokenizer(base, words)
    write_tokenizer(sft, [*words[:10], *words[20:], *words[10:20]])
    _, report = fuse(base, sft)
    assert report.vocabulary
    assert "tokenizer.json" in report.inputs["sft"]["sha256"]
    check(report)


def test_digests_with_a_reset(tmp_path):
    from lightning_rejuv import Reset

    base, sft, calibration = known_pair(tmp_path)
    _, report = fuse(base, sft, reset=Reset(fraction=0.1), calibration=calibration)
    assert report.reset
    check(report)


def test_weights_that_are_read_are_not_read_again(tmp_path, read_alone, monkeypatch):
    base, sft = pair(tmp_path, tokenizer=False)
    monkeypatch.setattr("lightning_rejuv.checkpoints.stream._PIECE", 100)
    _single(base)
    _single(sft)
    check(fuse(base, sft)[1])
    files = [next(path.glob("*.safetensors")) for path in (base, sft)]
    weights = sum(t.nbytes for path in (base, sft) for t in tensors(path).values())
    assert sum(read_alone) == sum(file.stat().st_size for file in files) - weights  # the headers


def test_any_order_of_reading_gives_the_digest_of_the_file(tmp_path):
    """Any order of reads, repeated and left out ones, and a thread that is slower than who reads."""
    content = random.Random(0).randbytes(3 << 20)
    (tmp_path / "w").write_bytes(content)
    for seed in range(20):
        draw = random.Random(seed)
        with Hasher(tmp_path, {"base": (tmp_path, ["w"])}, ["base"]) as hasher:
            for _ in range(60):
                start = draw.randrange(len(content))
                stop = min(len(content), start + draw.randrange(1 << 18))
                hasher.seen("base")("w", start, memoryview(content)[start:stop])
            assert hasher.report()["base"]["sha256"] == {"w": hashlib.sha256(content).hexdigest()}


def test_a_file_that_shrinks_while_it_is_hashed_is_an_error(tmp_path):
    (tmp_path / "w").write_bytes(b"x" * 100)
    with (
        pytest.raises(OSError, match="ended early"),
        Hasher(tmp_path, {"a": (tmp_path, ["w"])}, ["a"]) as hasher,
    ):
        hasher.seen("a")("w", 200, memoryview(b"y"))
        hasher.report()


def test_an_error_of_the_hashing_thread_ends_the_reading(tmp_path, monkeypatch):
    base, sft = pair(tmp_path, tokenizer=False)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lightning_rejuv.checkpoints.writer._InputHasher._fill", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fuse(base, sft)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "sft"]


def test_threads_are_ended_where_one_cannot_be_started(tmp_path, monkeypatch):
    start, started = threading.Thread.start, []

    def once(self):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", once)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(RuntimeError, match="can't start"))
        stack.enter_context(Hasher(tmp_path, {"a": (tmp_path, []), "b": (tmp_path, [])}))
    started[0].join(10)
    assert not started[0].is_alive()


class TestWithout:
    """`hashes=False`: said wherever a hash would be looked for."""

    @pytest.fixture
    def made(self, tmp_path):
        base, sft = pair(tmp_path)
        return base, sft, *fuse(base, sft, alpha=0.3, hashes=False)

    def test_the_weights_are_the_same_and_nothing_is_hashed(self, made, monkeypatch):
        base, sft, out, _ = made
        hashed, _ = fuse(base, sft, alpha=0.3)
        assert all(torch.equal(t, tensors(out)[n]) for n, t in tensors(hashed).items())
        monkeypatch.setattr("lightning_rejuv.checkpoints.writer.hash_file", lambda *_: pytest.fail("hashed"))
        fuse(base, sft, hashes=False)

    def test_report_and_card_say_it(self, made):
        *_, out, report = made
        said = json.loads((out / "rejuvenation.json").read_text())
        assert set(said["outputs"].values()) == {None}
        assert set(said["outputs"]) == {file.name for file in out.glob("*.safetensors")}
        assert {role: found["sha256"] for role, found in said["inputs"].items()} == {
            "base": None,
            "sft": None,
        }
        assert said["options"]["hashes"] is False
        card = (out / "README.md").read_text()
        for text in (str(report), card):
            assert "hashes           none, as asked" in text
        assert "Inputs and options: `rejuvenation.json`" in card
        _, hashed = fuse(*made[:2])
        assert "hashes  " not in str(hashed)
        assert "Inputs, hashes and options" in hashed.card("")
        assert hashed.options["hashes"] is True

    def test_verify_says_that_there_is_nothing_to_compare(self, made):
        out = made[2]
        verification = verify(out)
        (finding,) = (f for f in verification.findings if f.check == "hashes")
        assert verification
        assert (finding.ok, "nothing to compare" in finding.detail) == (None, True)
        said = json.loads((out / "rejuvenation.json").read_text())
        names = list(said["outputs"])
        for outputs in ({**said["outputs"], "more": None}, {**said["outputs"], names[0]: "0" * 64}):
            (out / "rejuvenation.json").write_text(json.dumps({**said, "outputs": outputs}))
            assert not verify(out)

    def test_the_record_is_known_and_doubted(self, made, tmp_path):
        base, sft, out, _ = made
        diagnosis = diagnose(base, out)
        assert diagnosis.rejuvenated.alpha == 0.3
        assert "holds no hash of the weights" in str(diagnosis)
        _, again = fuse(base, out)
        assert "rejuvenated already (alpha 0.3" in again.warnings[0]
        for file in out.glob("model*"):
            file.unlink()
        resave_as = tensors(sft)
        save_file(resave_as, out / "model.safetensors")
        other = diagnose(base, out)
        assert other.rejuvenated is None
        assert "is of other weights" in str(other)

    @pytest.mark.parametrize(
        "given", [["--no-hash"], ["--hashes", "false"], "no_hash: true", "hashes: false"]
    )
    def test_as_a_flag_and_in_a_recipe(self, tmp_path, given):
        base, sft = pair(tmp_path, tokenizer=False)
        arguments = given
        if isinstance(given, str):
            (tmp_path / "recipe.yaml").write_text(f"alpha: 0.4\n{given}\n")
            arguments = ["--config", str(tmp_path / "recipe.yaml")]
        paths = ["--base", str(base), "--sft", str(sft)]
        code = main(
            ["rejuvenate", *paths, "--out", str(tmp_path / "out"), "--alpha", "0.4", "--quiet", *arguments]
        )
        assert code == 0
        assert not any(json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["outputs"].values())
        recipe = tmp_path / "out" / "rejuvenation.yaml"
        assert yaml.safe_load(recipe.read_text())["hashes"] is False
        again = ["rejuvenate", "--config", str(recipe), "--out", str(tmp_path / "again"), "--quiet"]
        assert main(again) == 0
        assert not any(json.loads((tmp_path / "again" / "rejuvenation.json").read_text())["outputs"].values())
        assert main([*again[:-2], str(tmp_path / "third"), "--quiet", "--hashes", "true"]) == 0
        assert all(json.loads((tmp_path / "third" / "rejuvenation.json").read_text())["outputs"].values())

    def test_of_adapters(self, tmp_path):
        pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
        from tests.checkpoints.test_adapter import write_adapter

        base, adapter = write_adapter(tmp_path, "lora")
        for hashes in (True, False):
            made = [
                rejuvenate_adapter(adapter, tmp_path / f"adapter{hashes}", hashes=hashes),
                merge_adapter(base, adapter, tmp_path / f"merged{hashes}", hashes=hashes),
            ]
            for report in made:
                assert verify(report.output)
                assert report.options["hashes"] is report.hashed is hashes
                if hashes:
                    check(report)
                else:
                    assert all(found["sha256"] is None for found in report.inputs.values())
        for number, more in enumerate(([], ["--merge"])):
            out = tmp_path / f"cli{number}"
            paths = ["--base", str(base), "--sft", str(adapter), "--out", str(out)]
            assert main(["rejuvenate", *paths, "--no-hash", "--quiet", *more]) == 0
            assert not any(json.loads((out / "rejuvenation.json").read_text())["outputs"].values())
