"""What is known of this machine's devices: what each can run, faults of its driver, and its self-test."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DeviceError
from ..kernels.select import engine_model
from ..model_dir.model_directory import ModelDirectory
from ..presets import RECIPES
from . import device_cache, devices, kernel_choice, properties, self_test
from .devices import EMULATED_NPU, Choice, DeviceInfo
from .driver_faults import known_faults
from .loading import (
    LoadRequest,
    OnPhase,
    PhaseTimer,
    properties_for,
    reference_answers,
    remember_verdict,
    verdict_key,
)
from .properties import DEFAULT_USE, Use
from .rules import violations

__all__ = ["describe", "test"]


def describe(model: ModelDirectory | None = None) -> dict[str, Any]:
    """This machine's devices, as JSON values.

    Args:
        model: Describe also how this model would be loaded on each.
    """
    inventory = devices.inventory()
    return {
        "devices": [_device(info, model) for info in inventory.devices],
        "not_usable": dict(inventory.faults),
    }


def _device(info: DeviceInfo, model: ModelDirectory | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        **asdict(info),
        "capabilities": list(info.capabilities),
        "recipes": [name for name, recipe in RECIPES.items() if not violations(recipe, info.name)],
        "driver_faults": [
            {"what": fault.what, "advice": fault.advice, "source": fault.source}
            for fault in known_faults(info.name, info.driver)
        ],
    }
    return row if model is None else {**row, "model": _model_on(info, model)}


def _model_on(info: DeviceInfo, model: ModelDirectory) -> dict[str, Any]:
    recipe = model.recipe
    refused = [rule.problem(recipe) for rule in violations(recipe, info.name)] if recipe else []
    loaded_with: dict[str, Any] = {}
    try:
        loaded_with = properties_for(LoadRequest(model, info.name), Choice(info.name, ""))
    except DeviceError as error:
        refused.append(str(error))
    cache = loaded_with.pop("CACHE_DIR", None)
    need = properties.estimate_memory(model.weights_bytes, model.geometry, info.name, DEFAULT_USE)
    return {
        "properties": loaded_with,
        "refused": refused,
        "memory_bytes": need.total_bytes,
        "compiled": None if cache is None else any(Path(cache).glob("*.blob")),
        "self_test": device_cache.read("verdicts").get(verdict_key(model.key, info.name)),
        "kernels": kernel_choice.report(model, loaded_with) if info.name == "CPU" else None,
    }


def test(model: ModelDirectory, device: str, on_phase: OnPhase | None = None) -> self_test.Verdict:
    """Run the self-test now and keep the verdict in the device cache, except of an emulation.

    Raises:
        DeviceError: There is no such device, or it cannot run the model's recipe.
    """
    choice = devices.choose(device, model.recipe)[0]
    # On NPU, enough for the long prompt: the test is of the device, not of the default limits.
    use = Use(prompt_tokens=self_test.ROOM_TOKENS) if choice.kind == "NPU" else DEFAULT_USE
    loaded_with = properties.build(choice.device, use, emulated=choice.emulated)
    phases = PhaseTimer(model.key, on_phase)
    golden = reference_answers(model, phases)
    folder, kernels = engine_model(model.path, choice.device)
    with phases(f"testing {choice.label} in a child process"):
        verdict = self_test.run(folder, golden, choice.device, loaded_with | kernels)
    if device.upper() != EMULATED_NPU:
        remember_verdict(verdict_key(model.key, choice.device), verdict)
    return verdict
