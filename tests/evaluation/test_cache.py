"""Results on disk: packed within their precision, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ov_afm.errors import OVAFMError
from ov_afm.evaluation.cache import FLOOR, Expected, Journal, Store
from ov_afm.model_dir.inference import log_softmax


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
