"""Fixtures: a tiny random Arcee model, exported for real; the embedded model for real language."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from ov_afm.system.telemetry import silence  # noqa: E402

silence()

import signal  # noqa: E402

# Jobs in the background of a script ignore Ctrl-C and hand that on to their children, which the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import functools  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from support import tiny  # noqa: E402


def group_of(nodeid: str) -> str:
    """Of tests that stay in one process where several share them: a file, or all files that need the real model."""
    path = nodeid.partition("::")[0]
    text = (Path(__file__).parent.parent / path).read_text(encoding="utf-8")
    return "language" if "smollm2_model" in text else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole groups."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        _split_scope = staticmethod(functools.cache(group_of))

    return ByGroup(config, log)


# Markers that follow from what a test uses: they cannot be forgotten.
MARKER_OF_FIXTURE = {"smollm2_model": "language", "library": "native", "swept": "slow"}


@pytest.hookimpl(tryfirst=True)  # Before -m chooses.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures, and begin with the real model: its tests take longest together."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKER_OF_FIXTURE:
                item.add_marker(MARKER_OF_FIXTURE[fixture])
    items.sort(key=lambda item: group_of(item.nodeid) != "language")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Arcee checkpoint with YaRN. Read-only: copy it before changing it."""
    return tiny.write_arcee(tmp_path_factory.mktemp("checkpoints") / "tiny-arcee")


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint exported to INT8 with the real command. Read-only."""
    from ov_afm import export

    return export(str(tiny_checkpoint), tmp_path_factory.mktemp("models") / "tiny-int8", recipe="int8").path


@pytest.fixture(scope="session")
def caller_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that begins each answer with `<tool_call>` and is random after that, uncompressed. Read-only."""
    from ov_afm import export

    checkpoint = tiny.write_caller(tmp_path_factory.mktemp("checkpoints") / "caller")
    return export(str(checkpoint), tmp_path_factory.mktemp("models") / "caller", recipe="fp32").path


@pytest.fixture(scope="session")
def smollm2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded SmolLM2-135M-Instruct exported to INT8: real language. Read-only."""
    from ov_afm import export

    return export("smollm2-135m-instruct", tmp_path_factory.mktemp("models") / "smollm2-int8", recipe="int8").path


@pytest.fixture(scope="session")
def tiny_fp32(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an uncompressed model directory without manifest, as optimum-cli makes them. Read-only."""
    from ov_afm import presets
    from ov_afm.conversion import convert

    out, work = tmp_path_factory.mktemp("models") / "tiny-fp32", tmp_path_factory.mktemp("work")
    out.mkdir()
    convert.build(convert.Job(tiny_checkpoint, out, work, presets.RECIPES["fp32"], prove=False))
    return out


@pytest.fixture(scope="session")
def library() -> Path:
    """The native library of the ReLU² kernels, built where there is none."""
    from ov_afm.errors import ExtensionError
    from ov_afm.kernels import extension

    try:
        return extension.load()
    except ExtensionError as error:
        try:
            extension.build()
            return extension.load()
        except ExtensionError:
            pytest.skip(str(error))
