"""`ov-afm compress` makes a model directory that answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_afm.cli.compress import main
from ov_afm.model_dir import manifest


@pytest.mark.slow
def test_command_makes_a_whole_model_directory(
    tiny_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino_genai

    out = tmp_path / "int4"
    flags = ["--weight-format", "int4", "--sym", "--group-size", "64"]
    assert main([str(tiny_fp32), "-o", str(out), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith(f"{out}  custom  ")
    assert "library messages: " in captured.err
    found = manifest.verify(out, hashes=True)
    assert found is not None
    assert found.source == {"kind": "openvino", "id": "tiny-fp32"}
    assert found.recipe["layers"] == {"int8_asym per row": 2, "int4_sym g64": 12}
    assert 0 < found.checks["compression"]["kl_mean"] < 2
    answer = openvino_genai.LLMPipeline(out, "CPU").generate("def", max_new_tokens=3, ignore_eos=True)
    assert isinstance(answer, str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4"]


def test_flags_that_contradict_are_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "out"), "--recipe", "int8", "--group-size", "64"]) == 1
    assert capsys.readouterr().err == ("ov-afm: error: --group-size only applies to int4, found weight format int8\n")
