"""What `evaluate` reports of a model is what its distributions are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from support import tiny

from ov_afm.errors import ConfigError, OVAFMError, SourceError
from ov_afm.evaluation import logits, scoring
from ov_afm.evaluation.cache import Store
from ov_afm.evaluation.divergence import Interval
from ov_afm.evaluation.fidelity import Fidelity, compare, evaluate, uncompressed
from ov_afm.evaluation.text import Encoder, load_text
from ov_afm.model_dir import manifest
from ov_afm.model_dir.geometry import Geometry
from ov_afm.model_dir.inference import ir_logits, log_softmax
from ov_afm.model_dir.model_directory import finish, read_config
from ov_afm.presets import RECIPES
from ov_afm.system.console import Progress

TOKENS, BLOCK = 900, 200


def measured(model: Path, reference: Path | None, **options: Any) -> Fidelity:
    return evaluate(model, reference, **{"tokens": TOKENS, "block_tokens": BLOCK, **options})


def refusal(*arguments: Any, **options: Any) -> OVAFMError:
    with pytest.raises(OVAFMError) as caught:
        measured(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.slow
def test_figures_are_those_of_whole_distributions(tiny_model: Path, tiny_fp32: Path) -> None:
    found = measured(tiny_model, tiny_fp32)
    ids = Encoder(tiny_model)(load_text().content)[:TOKENS]
    divergence, nll, agreement = [], [], []
    for first in range(0, TOKENS, BLOCK):
        block = ids[first : first + BLOCK]
        log_p, log_q = (
            log_softmax(ir_logits(model / "openvino_model.xml", block))[:-1] for model in (tiny_fp32, tiny_model)
        )
        divergence.append((np.exp(log_p) * (log_p - log_q)).sum(-1, dtype=np.float64))
        nll.append(-log_q[np.arange(len(block) - 1), block[1:]])
        agreement.append(log_p.argmax(-1) == log_q.argmax(-1))
    expected = np.concatenate(divergence)
    assert found.figures.kl_mean is not None
    assert found.figures.kl_p99 is not None
    assert found.figures.top1_agreement is not None
    assert found.tokens == len(expected) == TOKENS - 5
    assert found.kl_mean == pytest.approx(expected.mean(), rel=1e-3)
    assert found.figures.kl_p99.value == pytest.approx(np.quantile(expected, 0.99), rel=1e-2)
    assert found.figures.kl_max == pytest.approx(expected.max(), rel=1e-2)
    assert found.figures.perplexity.value == pytest.approx(float(np.exp(np.concatenate(nll).mean())), rel=1e-4)
    assert found.figures.top1_agreement.value == pytest.approx(np.concatenate(agreement).mean())
    assert 0 < found.kl_mean < 0.1
    assert found.runtime["INFERENCE_PRECISION_HINT"] == found.runtime["KV_CACHE_PRECISION"] == "f32"


@pytest.mark.slow
def test_model_against_itself_has_no_divergence(tiny_fp32: Path) -> None:
    figures = measured(tiny_fp32, tiny_fp32).figures
    assert figures.kl_max is not None
    assert figures.kl_max < 1e-5
    assert figures.top1_agreement == Interval(1.0, 1.0, 1.0)
    assert figures.perplexity_ratio is not None
    assert figures.perplexity_ratio.value == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_checkpoint_is_a_reference_like_its_export(tiny_fp32: Path, tiny_checkpoint: Path) -> None:
    found = measured(tiny_fp32, tiny_checkpoint)
    assert found.reference == "tiny-arcee"
    assert found.kl_mean < 1e-6
    assert found.figures.top1_agreement is not None
    assert found.figures.top1_agreement.value > 0.995


@pytest.mark.slow
def test_runtime_defaults_are_measured_and_named(tiny_model: Path, tiny_fp32: Path) -> None:
    exact, users = (measured(tiny_model, tiny_fp32, runtime_defaults=flag) for flag in (False, True))
    assert exact.runtime["KV_CACHE_PRECISION"] == "f32"
    assert users.runtime["KV_CACHE_PRECISION"] == "u8"
    assert users.kl_mean != exact.kl_mean


@pytest.mark.slow
def test_without_a_reference_there_is_perplexity_alone(tiny_model: Path, tiny_fp32: Path) -> None:
    alone = measured(tiny_model, None)
    assert alone.figures.kl_mean is None
    assert alone.figures.perplexity == measured(tiny_model, tiny_fp32).figures.perplexity
    with pytest.raises(ConfigError, match="tiny-int8 was evaluated without a reference") as caught:
        _ = alone.kl_mean
    assert caught.value.code == "no-reference"


@pytest.mark.slow
def test_bits_per_weight_count_the_file(tiny_model: Path, tiny_fp32: Path) -> None:
    assert measured(tiny_fp32, None).bits_per_weight == pytest.approx(32, rel=0.01)
    assert 8 < measured(tiny_model, None).bits_per_weight < 9


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b" \n\n", "text-empty", "evaluation text t.txt is empty; give a text of a few thousand words"),
        (b"too short", "text-short", "evaluation text t.txt gives 9 tokens; at least 32 are needed"),
        (b"caf\xe9 " * 99, "text-encoding", "evaluation text t.txt is not UTF-8 (byte 3); convert it"),
    ],
    ids=["empty", "short", "latin-1"],
)
def test_text_that_says_nothing_is_refused(
    tiny_model: Path, tmp_path: Path, content: bytes, code: str, message: str
) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    error = refusal(tiny_model, None, text=tmp_path / "t.txt")
    assert isinstance(error, ConfigError)
    assert (error.code, str(error)) == (code, message)


def test_missing_text_and_short_block_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    missing = refusal(tiny_model, None, text=path)
    assert missing.code == "text-unreadable"
    assert str(missing) == f"cannot read evaluation text {path} (No such file or directory); give a UTF-8 text file"
    short = refusal(tiny_model, None, block_tokens=8)
    assert (short.code, str(short)) == ("block-short", "a block needs at least 32 tokens, found 8")


def test_reference_with_another_tokenizer_is_refused(tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    fields = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = fields["model"]["vocab"]
    vocab["T"], vocab["Q"] = vocab["Q"], vocab["T"]
    (other / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    error = refusal(tiny_model, other)
    ours = Encoder(tiny_model)("T")
    assert error.code == "other-tokenizer"
    assert re.fullmatch(
        r"the reference other has another tokenizer than tiny-int8: token \d+ of evaluation\.txt is "
        rf"\[{vocab['T']}\] there and \[{ours[0]}\] here; compare models of one tokenizer",
        str(error),
    )


@pytest.mark.slow
def test_reference_with_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = tiny.write_arcee(tmp_path / "wide", vocab_size=640)
    error = refusal(tiny_model, other)
    assert error.code == "other-vocabulary"
    assert str(error) == "tiny-int8 has 512 logits a token, the reference wide has 640"


def test_reference_that_does_not_exist_is_named(tiny_model: Path, tmp_path: Path) -> None:
    error = refusal(tiny_model, tmp_path / "gone")
    assert isinstance(error, SourceError)
    assert str(tmp_path / "gone") in str(error)


def test_reference_too_large_for_memory_names_the_way_out(
    tiny_model: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits.resources, "free_memory", lambda: 10**9)
    assert str(refusal(tiny_model, tiny_checkpoint)) == (
        "the reference needs about 1.0 GB of memory at f32, 1.0 GB are free; "
        f"run: ov-afm export {tiny_checkpoint} --recipe fp16 --output DIR, and give DIR as the reference"
    )


def test_logits_that_are_not_finite_are_told(tiny_fp32: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_fp32, broken)
    data = (broken / "openvino_model.bin").read_bytes()
    constants = openvino.Core().read_model(tiny_fp32 / "openvino_model.xml").get_ops()
    (head,) = [op.data.tobytes() for op in constants if op.get_friendly_name() == "self.lm_head.weight"]
    assert data.count(head) == 1
    data = data.replace(head, np.full(len(head) // 4, np.nan, dtype=np.float32).tobytes())
    (broken / "openvino_model.bin").write_bytes(data)
    error = refusal(broken, None)
    assert error.code == "logits-not-finite"
    assert re.fullmatch(
        r"broken gives logits that are not finite after \d+ tokens of a block; the model is damaged", str(error)
    )


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("a model was loaded")


@pytest.mark.slow
def test_second_evaluation_loads_nothing(tiny_model: Path, tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured(tiny_model, tiny_fp32)
    monkeypatch.setattr(scoring, "opened", never)
    assert measured(tiny_model, tiny_fp32) == first


@pytest.mark.slow
def test_interrupted_evaluation_goes_on(
    tiny_model: Path, tiny_fp32: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(tiny_model, tiny_fp32)
    shutil.rmtree(cache)
    write, written = Store.write, []

    def interrupt(store: Store, block: int, arrays: Any) -> None:
        written.append(block)
        if len(written) == 7:  # the fifth block of the reference is done, and one of the candidate
            raise KeyboardInterrupt
        write(store, block, arrays)

    monkeypatch.setattr(Store, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measured(tiny_model, tiny_fp32)
    assert written == [0, 1, 2, 3, 4, 0, 1]
    assert measured(tiny_model, tiny_fp32) == whole
    assert written == [0, 1, 2, 3, 4, 0, 1, 1, 2, 3, 4]


@pytest.mark.slow
def test_damaged_cache_is_made_again(tiny_model: Path, tiny_fp32: Path, cache: Path) -> None:
    whole = measured(tiny_model, tiny_fp32)
    for folder in cache.glob("evaluate/*/*"):
        if folder.parent.name == "scores":
            shutil.rmtree(folder)
        else:
            (folder / "00000.npz").write_bytes(b"PK\x03\x04 not much")
            (folder / "00003.npz").unlink()
    assert measured(tiny_model, tiny_fp32) == whole


def test_uncompressed_model_among_several_is_the_reference(tiny_model: Path, tiny_fp32: Path, tmp_path: Path) -> None:
    named = tmp_path / "named"
    shutil.copytree(tiny_fp32, named)
    with Progress() as progress:
        geometry = Geometry.from_config(read_config(named))
        contents = manifest.Manifest({"kind": "folder", "id": "x"}, geometry, RECIPES["fp32"].recorded())
        finish(named, contents, progress)
    assert uncompressed([tiny_model, named]) == named


def test_damaged_model_is_found_before_any_work(
    tiny_model: Path, tiny_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model, cut)
    data = (cut / "openvino_model.bin").read_bytes()
    (cut / "openvino_model.bin").write_bytes(data[:-10])
    monkeypatch.setattr(scoring, "opened", never)
    with pytest.raises(SourceError, match="is damaged"):
        compare([tiny_fp32, cut], None, load_text())


@pytest.mark.slow
def test_int8_of_a_real_model_is_close_and_says_how_close(smollm2_model: Path) -> None:
    """Against the embedded model's own checkpoint, in transformers."""
    found = evaluate(smollm2_model, "smollm2-135m-instruct", tokens=240, block_tokens=120)
    assert found.figures.kl_mean is not None
    assert 5 < found.figures.perplexity.value < 60
    assert 0.0002 < found.kl_mean < 0.02
    assert found.figures.kl_median is not None
    assert found.figures.kl_median.value < found.kl_mean
