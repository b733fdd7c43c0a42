"""What `ov-afm devices` says: every device, what it can run, and what is known against its driver."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DeviceError
from ..kernels.select import engine_model
from ..model_dir import manifest
from ..presets import RECIPES
from ..system import console
from . import device_cache, self_test
from . import properties as device_properties
from .devices import EMULATED_NPU, Choice, DeviceInfo, Inventory, choose
from .driver_faults import known_faults
from .loading import (
    LoadRequest,
    OnPhase,
    Phases,
    properties_for,
    recipe_of,
    reference_answers,
    verdict_key,
)
from .properties import DEFAULT_USE
from .rules import violations

__all__ = ["describe", "render", "test"]


def describe(found: Inventory, model_dir: Path | None = None) -> dict[str, Any]:
    """All that is known of this machine's devices, as JSON values.

    Args:
        found: The devices.
        model_dir: Tell also what this model would be loaded with.
    """
    contents = manifest.verify(model_dir) if model_dir else None
    return {
        "devices": [_device(info, model_dir, contents) for info in found.devices],
        "not_usable": dict(found.faults),
    }


def _device(info: DeviceInfo, model_dir: Path | None, contents: manifest.Manifest | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        **asdict(info),
        "capabilities": list(info.capabilities),
        "recipes": [name for name, recipe in RECIPES.items() if not violations(recipe, info.name)],
        "driver_faults": [
            {"what": fault.what, "advice": fault.advice, "source": fault.source}
            for fault in known_faults(info.name, info.driver)
        ],
    }
    if model_dir:
        row["model"] = _for_model(info, model_dir, contents)
    return row


def _for_model(info: DeviceInfo, model_dir: Path, contents: manifest.Manifest | None) -> dict[str, Any]:
    model = device_cache.model_key(model_dir, contents)
    recipe = recipe_of(contents)
    refused = [rule.found(recipe) for rule in violations(recipe, info.name)] if recipe else []
    properties: dict[str, Any] = {}
    try:
        request = LoadRequest(model_dir, contents, info.name, DEFAULT_USE, {})
        properties = properties_for(request, Choice(info.name, ""), model)
    except DeviceError as error:
        refused.append(str(error))
    cache = properties.pop("CACHE_DIR", None)
    memory = None
    if contents is not None and contents.geometry is not None:
        weights = (model_dir / "openvino_model.bin").stat().st_size
        memory = device_properties.estimate_memory(weights, contents.geometry, info.name, DEFAULT_USE).total_bytes
    return {
        "properties": properties,
        "refused": refused,
        "memory_bytes": memory,
        "compiled": None if cache is None else any(Path(cache).glob("*.blob")),
        "self_test": device_cache.read("verdicts").get(verdict_key(model, info.name)),
    }


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines: list[str] = []
    for row in report["devices"]:
        memory = console.human_bytes(row["memory_bytes"]) if row["memory_bytes"] else "unknown"
        lines += [
            f"{row['name']}: {row['full_name']}",
            f"  driver {row['driver'] or 'none'}, memory {memory}, computes in {' '.join(row['capabilities'])}",
            f"  recipes: {', '.join(row['recipes'])}",
        ]
        lines += [
            f"  known fault of this driver: {fault['what']}; {fault['advice']} ({fault['source']})"
            for fault in row["driver_faults"]
        ]
        if "model" in row:
            lines += [f"  {line}" for line in _model_lines(row["model"])]
    lines += [f"{kind}: could not be asked: {reason}" for kind, reason in report["not_usable"].items()]
    present = {row["name"].partition(".")[0] for row in report["devices"]} | set(report["not_usable"])
    lines += [f"{kind}: not here" for kind in ("CPU", "GPU", "NPU") if kind not in present]
    return "\n".join(lines)


def _model_lines(model: dict[str, Any]) -> list[str]:
    if model["refused"]:
        return [f"this model: cannot run ({', '.join(model['refused'])})"]
    shown = ", ".join(f"{key}={value}" for key, value in model["properties"].items()) or "the plugin's defaults"
    lines = [f"this model: loaded with {shown}"]
    if model["memory_bytes"] is not None:
        need = console.human_bytes(model["memory_bytes"])
        tokens = device_properties.DEFAULT_CONTEXT_TOKENS
        lines.append(f"  needs {need} or more with a context of up to {tokens} tokens")
    if model["compiled"] is not None:
        lines.append(
            "  compiled before: loads fast" if model["compiled"] else "  not compiled yet: the first load is slow"
        )
    if model["self_test"]:
        outcome = "passed" if model["self_test"]["passed"] else "FAILED"
        lines.append(f"  self-test {outcome} on {model['self_test']['on']}: {model['self_test']['evidence']}")
    return lines


def test(model_dir: Path, device: str, on_phase: OnPhase | None = None) -> self_test.Verdict:
    """Run the self-test now and remember the verdict, except of an emulation.

    Raises:
        DeviceError: The device is absent or cannot run the model's recipe.
    """
    import datetime

    contents = manifest.verify(model_dir)
    recipe = recipe_of(contents)
    choice: Choice = choose(device, recipe)[0]
    use = DEFAULT_USE
    if choice.kind == "NPU":
        # Room for the long prompt: the test is of the device, not of the default limits.
        use = device_properties.Use(prompt_tokens=self_test.ROOM_TOKENS)
    properties = device_properties.build(choice.device, use, emulated=choice.emulated)
    key = device_cache.model_key(model_dir, contents)
    phases = Phases(key, on_phase)
    golden = reference_answers(model_dir, contents, phases)
    folder, kernels = engine_model(model_dir, choice.device)
    with phases(f"testing {choice.label} in a child process"):
        verdict = self_test.run(folder, golden, choice.device, properties | kernels)
    if device.upper() != EMULATED_NPU:
        entry = {"passed": verdict.passed, "evidence": verdict.evidence, "on": str(datetime.date.today())}
        device_cache.remember("verdicts", verdict_key(key, choice.device), entry)
    return verdict
