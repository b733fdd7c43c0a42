"""Stand-ins for functions that run in a child process, which fail in the ways that drivers do. No device is used.

A test puts one in place of `devices.enumerate_devices` or of `self_test.answers`:

    simulated_faults.replace(monkeypatch, self_test, "answers", simulated_faults.device_that_crashes)
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ov_afm.bench import run
from ov_afm.bench.plan import Combination, Settings
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime import self_test
from ov_afm.runtime.devices import DeviceInfo

CPU = DeviceInfo("CPU", "a CPU", None, 1, ("FP32",))
Answers = list[dict[str, Any] | None]


def replace(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, function: Callable[..., Any]) -> None:
    """Run a function of this module in the child in place of `module.name`."""
    monkeypatch.setattr(module, name, function)
    # The child finds this module by its name.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def npu_driver_kills_the_process(kinds: Sequence[str]) -> list[DeviceInfo]:
    if "NPU" in kinds:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [CPU] if "CPU" in kinds else []


def gpu_driver_hangs(kinds: Sequence[str]) -> list[DeviceInfo]:
    if "GPU" in kinds:
        time.sleep(600)
    return [CPU] if "CPU" in kinds else []


def device_that_crashes(
    model_dir: Path, device: str, properties: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]
) -> Answers:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def device_that_hangs(
    model_dir: Path, device: str, properties: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]
) -> Answers:
    time.sleep(600)
    return []


def device_that_talks_nonsense(
    model_dir: Path, device: str, properties: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]
) -> Answers:
    return [{"tokens": [0] * 16, "text": "!" * 16, "first": []} for _ in prompts]


def device_that_answers_as_recorded(
    model_dir: Path, device: str, properties: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]
) -> Answers:
    return self_test.answers(model_dir, "CPU", {}, prompts)


def bench_that_crashes(model: ModelDirectory, combination: Combination, settings: Settings) -> None:
    if model.name == "draft":
        os.kill(os.getpid(), signal.SIGSEGV)
    run.measure(model, combination, settings)
