"""Targets for supervised children that fail the way drivers do. Simulated: nothing here asks a device."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

CPU = {"name": "CPU", "full_name": "a CPU", "driver": None, "memory_bytes": 1, "capabilities": ["FP32"]}


def npu_driver_kills_the_process(kinds: list[str]) -> list[dict[str, Any]]:
    if "NPU" in kinds:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [CPU] if "CPU" in kinds else []


def gpu_driver_hangs(kinds: list[str]) -> list[dict[str, Any]]:
    if "GPU" in kinds:
        time.sleep(600)
    return [CPU] if "CPU" in kinds else []


def device_that_crashes(model_dir: str, device: str, properties: dict[str, Any], prompts: list[dict[str, Any]]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def device_that_hangs(model_dir: str, device: str, properties: dict[str, Any], prompts: list[dict[str, Any]]) -> None:
    time.sleep(600)


def device_that_talks_nonsense(
    model_dir: str, device: str, properties: dict[str, Any], prompts: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    return [{"tokens": [0] * 16, "text": "!" * 16, "first": []} for _ in prompts]


def device_that_answers_as_recorded(
    model_dir: str, device: str, properties: dict[str, Any], prompts: list[dict[str, Any]]
) -> list[dict[str, Any] | None]:
    from ov_afm.runtime import self_test

    return self_test._answer(model_dir, "CPU", {}, prompts)
