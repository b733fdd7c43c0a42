"""Every crafted checkpoint is exported by the real function and judged by an independent reference."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import crafted
from support.crafted import Case, Crafted
from support.in_process import run_in_process

from ov_afm import export
from ov_afm.errors import OVAFMError
from ov_afm.model_dir.inference import ir_logits
from ov_afm.model_dir.model_directory import ModelResult

ROOT = Path(__file__).parents[2]
CASES = {f"{area}-{case.name}": case for area, held in crafted.cases().items() for case in held}
ids = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """One process for all, whose libraries are not searched for garbage with each export."""
    import nncf  # noqa: F401
    import optimum.exporters.openvino  # noqa: F401

    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        yield
    gc.unfreeze()


def exported(made: Crafted, folder: Path, output: Path) -> ModelResult:
    return export(made.source or folder, output, **{"recipe": "fp32", "golden": False, **made.options})


def refuse(case: Case, made: Crafted, folder: Path, output: Path) -> None:
    with pytest.raises(OVAFMError) as caught:
        exported(made, folder, output)
    assert caught.value.code == case.code, caught.value
    message = str(caught.value)
    assert "\n" not in message
    assert [fact for fact in case.says if fact not in message] == [], message
    assert not output.exists()


def reference_logits(made: Crafted) -> Any:
    import torch

    if not isinstance(made.reference, torch.nn.Module):
        return np.asarray(made.reference)
    with torch.inference_mode():
        return made.reference(torch.tensor([list(made.prompt)]), use_cache=False).logits[0].float().numpy()


@pytest.mark.slow
@ids
def test_source_has_its_outcome(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, output = tmp_path / "source", tmp_path / "model"
    made = case.make(folder)
    if case.outcome == "refused":
        refuse(case, made, folder, output)
        return
    assert made.reference is not None or made.check is not None, "nothing would judge this export"
    result = exported(made, folder, output)
    if made.reference is not None:
        expected = reference_logits(made)
        measured = ir_logits(output / "openvino_model.xml", made.prompt)
        assert np.abs(measured - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
        assert (measured.argmax(-1) == expected.argmax(-1)).mean() >= 0.99
    if made.check is not None:
        made.check(output)
    for fact in case.says:
        assert any(fact in note for note in result.notes), result.notes


@pytest.mark.slow
def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    """By the real command, its child process included; `tests/test_export.py` has one that exports."""
    case = CASES["tensors-missing"]
    case.make(tmp_path / "source")
    arguments = ["-m", "ov_afm.export", "source", "-o", "model", "--recipe", "fp32"]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.stderr
    assert all(fact in result.stderr for fact in case.says)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_page_of_sources_is_up_to_date() -> None:
    """Write it again with `PYTHONPATH=tests python -m support.crafted > docs/sources.md`."""
    assert (ROOT / "docs" / "sources.md").read_text(encoding="utf-8") == crafted.page()


def test_names_of_cases_are_unique() -> None:
    assert len(CASES) == sum(map(len, crafted.cases().values()))
