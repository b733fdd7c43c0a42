"""Healing brings a pruned model nearer to its original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.random_arcee import random_ids, random_model

from ov_afm.pruning import distill
from ov_afm.pruning.width import narrow
from ov_afm.quantization import calibration


@pytest.fixture
def pair(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A teacher and a student with half of its neurons, as float32 so that small steps are kept."""
    # Tiny models take steps that would wreck a real one.
    monkeypatch.setattr(distill, "RATE", {"full": 2e-3, "lora": 1e-2})

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(tiny_checkpoint, teacher)
    random_model().save_pretrained(teacher)
    model = random_model()
    narrow(model, random_ids(8), intermediate=64, refit=False)
    model.save_pretrained(student)
    return student, teacher


def heal(pair: tuple[Path, Path], state: Path, *, max_steps: int) -> dict[str, Any]:
    return distill.heal(*pair, state, dataset=calibration.PACKAGED, num_samples=4, minutes=5.0, max_steps=max_steps)


@pytest.mark.slow
def test_healing_brings_the_student_nearer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = heal(pair, tmp_path / "state", max_steps=16)
    assert found["method"] == "full"
    assert found["steps"] == 16
    assert found["losses"][-1] < 0.9 * found["losses"][0]


@pytest.mark.slow
def test_interrupted_healing_is_continued(pair: tuple[Path, Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    heal(pair, state, max_steps=3)
    found = heal(pair, state, max_steps=5)
    assert found["steps"] == 5
    assert len(found["losses"]) == 5


@pytest.mark.slow
def test_large_models_are_healed_through_adapters(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(distill, "FULL_PARAMETERS", 0)
    found = heal(pair, tmp_path / "state", max_steps=12)
    assert found["method"] == "lora"
    assert found["losses"][-1] < found["losses"][0]
    names = AutoModelForCausalLM.from_pretrained(pair[0]).state_dict()
    assert not any("lora" in name for name in names)
