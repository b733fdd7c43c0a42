"""Results on disk: packed within their precision, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ov_afm.errors import OVAFMError
from ov_afm.evaluation.cache import FLOOR, Expected, Journal, Store, identity
from ov_afm.model_dir import manifest
from ov_afm.model_dir.inference import log_softmax
from ov_afm.model_dir.manifest import Manifest
from ov_afm.system import console


def test_packed_distribution_is_within_its_step() -> None:
    log_p = log_softmax(np.random.default_rng(0).normal(0, 9, (7, 1000)).astype(np.float32))
    log_p[0, 5] = -np.inf
    packed = Expected.of(log_p, np.arange(7))
    assert packed.codes.dtype == np.uint16
    assert np.abs(packed.log_p(0, 7) - np.maximum(log_p, FLOOR)).max() <= packed.step.max() / 1.9
    assert packed.step.max() < 0.0013
    assert (packed.top == log_p.argmax(-1)).all()
    assert packed.nll[3] == -log_p[3, 3]


def test_journal_drops_a_torn_line() -> None:
    Journal("answers", "key").add("a", 1)
    path = Store("answers", "key").folder / "journal.jsonl"
    path.write_text(path.read_text() + '{"id": "b", "va')
    assert Journal("answers", "key").entries == {"a": 1}
    Journal("answers", "key").add("c", [2])
    assert Journal("answers", "key").entries == {"a": 1, "c": [2]}


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        OVAFMError, match=r"cannot write to the cache .*set OV_AFM_CACHE to a folder of yours"
    ) as caught:
        Store("reference", "key")
    assert caught.value.code == "cache-unwritable"


def test_results_belong_to_weights_tokenizer_and_template(tmp_path: Path) -> None:
    parts = ("model", "tokenizer", "detokenizer")
    names = [f"openvino_{part}.{suffix}" for part in parts for suffix in ("xml", "bin")]
    names += ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        (tmp_path / name).write_text("before")
    manifest.write(tmp_path, Manifest({}, None, {}, files=manifest.scan(tmp_path)))
    with console.Progress() as bars:
        seen = [identity(tmp_path, bars)]
        # Of weights the manifest tells; the others are read again, because people may edit them.
        for name in names[2:]:
            (tmp_path / name).write_text("after!")
            seen.append(identity(tmp_path, bars))
        other = {"openvino_model.bin": {"bytes": len("before"), "sha256": "0" * 64}}
        manifest.write(tmp_path, Manifest({}, None, {}, files={**manifest.scan(tmp_path), **other}))
        seen.append(identity(tmp_path, bars))
    assert len({tuple(sorted(each.items())) for each in seen}) == len(seen)
