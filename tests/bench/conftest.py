"""Models and sweeps that several tests of the benchmark share."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ov_afm.cli.bench import main
from ov_afm.model_dir import manifest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report folder of a small sweep, with an option, a batch, an emulation and a device that is not here."""
    folder = tmp_path_factory.mktemp("sweep") / "report"
    options = ["--device", "CPU", "NPU", "NPU-EMULATED", "--prompt-tokens", "32", "256", "--new-tokens", "8"]
    more = ["--runs", "2", "--concurrency", "1", "4", "--option", "prompt-lookup", "--report", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OV_AFM_CACHE", str(folder.parent / "cache"))
        assert main([str(tiny_model), *options, *more]) == 0
    return folder


@pytest.fixture(scope="session")
def drafting_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with some weights altered, so that it often drafts what the tiny model would not say."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns(manifest.FILE_NAME))
    path = folder / "openvino_model.bin"
    data = np.fromfile(path, np.uint8)
    graph = (folder / "openvino_model.xml").read_text()
    weights = re.findall(r'element_type="[ui]8" shape="\d+, ?\d+" offset="(\d+)" size="(\d+)"', graph)
    assert len(weights) > 10
    for offset, size in ((int(a), int(b)) for a, b in weights):
        data[offset : offset + size] ^= np.random.default_rng(offset).integers(0, 16, size, np.uint8)
    data.tofile(path)
    return folder
