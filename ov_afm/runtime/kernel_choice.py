"""Whether this machine runs a model packed for the native kernels or plain: by measurement, once a machine.

`kernels.speed` times both for several numbers of tokens; the device cache keeps the figures, under a key of everything
that they depend on. One may decode faster and read prompts slower than the other. So a use is described by the tokens
of a typical request, and the model is chosen whose steps take less time together.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ExtensionError
from ..kernels import extension
from ..model_dir.manifest import installed_versions, sha256
from ..model_dir.model_directory import ModelDirectory
from . import device_cache
from .properties import build

__all__ = ["CHAT", "SERVE", "Measured", "Workload", "compare", "measure", "measured", "report", "step_ms"]

SECTION = "kernels"
# Properties that what is measured is compiled with; others (the KV cache's precision, GenAI's own) do not matter to it.
MATTERS = (
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "ENABLE_CPU_PINNING",
    "ENABLE_HYPER_THREADING",
    "EXECUTION_MODE_HINT",
    "INFERENCE_NUM_THREADS",
    "INFERENCE_PRECISION_HINT",
    "NUM_STREAMS",
    "PERFORMANCE_HINT",
    "SCHEDULING_CORE_TYPE",
)
# Where no text was counted: half of the neurons, as with random weights.
UNKNOWN_ACTIVE = 0.5


@dataclass(frozen=True, slots=True)
class Workload:
    """A typical request of a use.

    Attributes:
        prompt_tokens: Tokens of its prompt that are not in the cache.
        new_tokens: Tokens of its answer.
        together: Tokens in a step of decoding; equal parts of the answers are made with each number.
    """

    prompt_tokens: int = 256
    new_tokens: int = 256
    together: tuple[int, ...] = (1,)

    def time_ms(self, ms: Mapping[int, float]) -> float:
        """What a request takes, from the milliseconds of a step by its tokens."""
        decoding = sum(step_ms(ms, tokens) / tokens for tokens in self.together) * self.new_tokens / len(self.together)
        return decoding + step_ms(ms, self.prompt_tokens)


# A prompt as long as its answer. A server makes a third of its answers one by one, a third 4 and a third 16 at a time.
CHAT, SERVE = Workload(), Workload(together=(1, 4, 16))
USES = {"chat": CHAT, "serve": SERVE}


def step_ms(ms: Mapping[int, float], tokens: int) -> float:
    """Milliseconds of a step: between the numbers that were measured along a line, beyond the largest in proportion."""
    counts = sorted(ms)
    above = bisect_left(counts, tokens)
    if above == len(counts):
        return ms[counts[-1]] * tokens / counts[-1]
    if above == 0:
        return ms[counts[0]]
    low, high = counts[above - 1], counts[above]
    return ms[low] + (ms[high] - ms[low]) * (tokens - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on this machine.

    Attributes:
        cpu: The processor's name.
        isa: Instruction set of the kernels that run on it.
        threads: Threads of both.
        active: Share of active neurons that it was measured at.
        plain_ms: Tokens of a step → milliseconds of OpenVINO's own operations.
        packed_ms: Tokens of a step → milliseconds of the packed ones.
        on: Date, as `2026-11-27`.
    """

    cpu: str
    isa: str
    threads: int
    active: float
    plain_ms: Mapping[int, float]
    packed_ms: Mapping[int, float]
    on: str

    def packed_is_faster(self, workload: Workload) -> bool:
        """Whether the packed model takes less time for a use."""
        return workload.time_ms(self.packed_ms) < workload.time_ms(self.plain_ms)

    def __str__(self) -> str:
        """The figures in a line."""
        ratios = ", ".join(f"{self.plain_ms[n] / self.packed_ms[n]:.2f}× for {n}" for n in self.plain_ms)
        return f"{ratios} tokens at a time ({self.cpu}, {self.isa}, {self.threads} threads, {self.on})"


def measured(model: ModelDirectory, properties: Mapping[str, Any]) -> Measured | None:
    """What is recorded of a packed model on this machine; None where nothing is, or the record is damaged.

    Args:
        model: The model directory.
        properties: What it is loaded with.

    Raises:
        ExtensionError: There is no native library that fits.
    """
    entry = device_cache.read(SECTION).get(_key(model, properties), {})
    try:
        found = Measured(**{**entry, **{side: _by_tokens(entry[side]) for side in ("plain_ms", "packed_ms")}})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    sound = found.plain_ms and found.plain_ms.keys() == found.packed_ms.keys()
    return found if sound and min(*found.plain_ms.values(), *found.packed_ms.values()) > 0 else None


def _by_tokens(figures: Mapping[str, float]) -> dict[int, float]:
    # Keys of JSON are text.
    return {int(tokens): float(ms) for tokens, ms in figures.items()}


def measure(model: ModelDirectory, properties: Mapping[str, Any]) -> Measured:
    """Measure a packed model on this machine now (a few seconds) and keep the figures in the device cache.

    Nothing is kept of a measurement that was interrupted.

    Raises:
        ExtensionError: There is no native library that fits, or the packed model cannot be read.
        RuntimeError: OpenVINO cannot run it.
    """
    from ..kernels import speed

    key, active = _key(model, properties), _active(model)
    plain_ms, packed_ms = speed.measure(model.path, model.packed, _relevant(properties), active)
    found = Measured(
        **_machine(properties),
        active=active,
        plain_ms={tokens: round(ms, 4) for tokens, ms in plain_ms.items()},
        packed_ms={tokens: round(ms, 4) for tokens, ms in packed_ms.items()},
        on=str(datetime.date.today()),
    )
    device_cache.remember(SECTION, key, asdict(found))
    return found


def compare(model_dir: Path) -> str:
    """Measure a packed model as it is loaded by default; returns the figures and what they decide, for people.

    Raises:
        ExtensionError: There is no native library that fits, or no packed model.
        RuntimeError: OpenVINO cannot run it.
    """
    model = ModelDirectory.open(model_dir)
    if not model.packed.is_dir():
        raise ExtensionError(f"{model_dir} is not packed; run: ov-afm kernels {model_dir}", code="not-packed")
    found = measure(model, build("CPU"))
    return _text(found, _uses(found))


def report(model: ModelDirectory, properties: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is known of a packed model on this machine, as JSON values; None for a model that is not packed."""
    if not model.packed.is_dir():
        return None
    try:
        found = measured(model, properties)
    except ExtensionError as error:
        return {"measured": None, "uses": {}, "text": str(error)}
    if found is None:
        return {"measured": None, "uses": {}, "text": "not compared yet; the next load does that"}
    uses = _uses(found)
    return {"measured": asdict(found), "uses": uses, "text": _text(found, uses)}


def _uses(found: Measured) -> dict[str, str]:
    return {name: "packed" if found.packed_is_faster(workload) else "plain" for name, workload in USES.items()}


def _text(found: Measured, uses: Mapping[str, str]) -> str:
    if len(set(uses.values())) > 1:
        choice = ", ".join(f"{name} uses the {which} model" for name, which in uses.items())
    else:
        chosen = next(iter(uses.values()))
        faster, other = (found.packed_ms, found.plain_ms) if chosen == "packed" else (found.plain_ms, found.packed_ms)
        slower_for = ", ".join(str(tokens) for tokens in faster if faster[tokens] > other[tokens])
        choice = f"the {chosen} model is used" + (f", though slower for {slower_for} tokens" if slower_for else "")
    return f"{choice}; packed against plain: {found}"


def _active(model: ModelDirectory) -> float:
    """Share of active neurons, in tenths: a few more or less are no reason to measure again."""
    sparsity = model.manifest.sparsity if model.manifest else {}
    zeros = sparsity.get("profile", {}).get("mean", 1 - UNKNOWN_ACTIVE)
    return round(float(sparsity.get("kernels", {}).get("active", 1 - zeros)), 1)


def _relevant(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {name: properties[name] for name in MATTERS if name in properties}


def _machine(properties: Mapping[str, Any]) -> dict[str, Any]:
    import openvino

    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {
        "cpu": str(openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")).strip(),
        "isa": extension.best_isa(),
        "threads": int(properties.get("INFERENCE_NUM_THREADS", processors)),
    }


def _key(model: ModelDirectory, properties: Mapping[str, Any]) -> str:
    import openvino

    recorded = model.manifest
    parts = {
        **_machine(properties),
        "computes in": openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        "properties": {name: str(value) for name, value in _relevant(properties).items()},
        "openvino": installed_versions()["openvino"],
        "library": [extension.INTERFACE, sha256(extension.library())],
        "geometry": model.geometry.to_dict(),
        "recipe": [recorded.recipe.get("layers"), _packing(recorded.sparsity)] if recorded else model.weights_bytes,
        "active": _active(model),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _packing(sparsity: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was packed, without the names of what was."""
    kernels = sparsity.get("kernels", {})
    return {name: value for name, value in kernels.items() if not isinstance(value, (list, dict))}
