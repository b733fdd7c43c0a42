"""What a device cannot run, checked before any work is done.

The NPU compiler does not refuse a model that it cannot take: it ends the process. So the known
limits are a table here, each with its source. They are checked before weights are compressed and
again before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DeviceError
from ..presets import CHANNEL_WISE, KINDS, TABLES, Recipe

__all__ = ["RULES", "Rule", "check", "check_name", "kind_of", "violations"]

NAMES = re.compile(r"(CPU|GPU|NPU)(\.\d+)?|AUTO|NPU-EMULATED")
NPU_GUIDE = (
    "https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai/inference-with-genai-on-npu.html"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit of one kind of device.

    Attributes:
        kind: Device without its number: `NPU`, `GPU`.
        broken_by: Whether a recipe breaks the rule.
        problem: The part of the recipe that breaks the rule, for people.
        needs: What the device takes instead.
        source: Where the limit is documented or was reported.
    """

    kind: str
    broken_by: Callable[[Recipe], bool]
    problem: Callable[[Recipe], str]
    needs: str
    source: str


def _layers_in_backup(recipe: Recipe) -> str:
    """Kinds of matrices of the decoder layers that are in 8 bits, in the words of `--kind`."""
    return ", ".join(f"{kind}=int8" for kind in KINDS if kind not in TABLES and recipe.in_backup(kind))


RULES: tuple[Rule, ...] = (
    Rule(
        "NPU",
        lambda recipe: recipe.weight_format == "int8",
        lambda recipe: "weight format int8",
        "int4 symmetric weights",
        # Accepted at construction; the first generate ends the process with an access violation.
        "https://github.com/openvinotoolkit/openvino/issues/35641",
    ),
    Rule(
        "NPU",
        lambda recipe: recipe.weight_format == "int4" and not recipe.sym,
        lambda recipe: "asymmetric int4",
        "symmetric int4 (--sym)",
        # The compiler aborts the process.
        "https://github.com/openvinotoolkit/openvino/issues/34450",
    ),
    Rule(
        "NPU",
        lambda recipe: recipe.weight_format == "int4" and (recipe.ratio != 1.0 or _layers_in_backup(recipe) != ""),
        lambda recipe: _layers_in_backup(recipe) or f"ratio {recipe.ratio:g}",
        "ratio 1.0 (no mixed precision)",
        NPU_GUIDE,
    ),
    Rule(
        "NPU",
        lambda recipe: recipe.weight_format == "int4" and recipe.group_size not in (CHANNEL_WISE, 128),
        lambda recipe: f"group size {recipe.group_size}",
        "group size -1 (channel-wise) or 128",
        NPU_GUIDE,
    ),
    Rule(
        "NPU",
        lambda recipe: (
            recipe.weight_format == "int4"
            and recipe.backup_precision == "int8_asym"
            and any(map(recipe.in_backup, TABLES))
        ),
        lambda recipe: "backup precision int8_asym",
        "backup precision int8_sym or none",
        NPU_GUIDE,
    ),
)
ADVICE = {"NPU": "use recipe int4-npu or int4-npu-g128"}


def kind_of(device: str) -> str:
    """`GPU.1` is a `GPU`, `NPU-EMULATED` an `NPU`."""
    return device.upper().partition(".")[0].partition("-")[0]


def violations(recipe: Recipe, device: str) -> list[Rule]:
    """The rules of a device that a recipe breaks; `AUTO` and `CPU` have none."""
    kind = kind_of(device)
    return [rule for rule in RULES if rule.kind == kind and rule.broken_by(recipe)]


def check_name(device: str) -> None:
    """Refuse a name that no device has, on this machine or another.

    Raises:
        DeviceError: With the names that there are.
    """
    if not NAMES.fullmatch(device.strip().upper()):
        raise DeviceError(
            f"there is no device {device!r}; devices are CPU, GPU (GPU.1, if there are several), NPU, and AUTO or "
            "NPU-EMULATED to choose or to try; those of this machine: ov-afm devices",
            code="device-unknown",
        )


def check(recipe: Recipe, device: str) -> None:
    """Refuse a recipe that a device cannot run.

    Args:
        recipe: The recipe.
        device: `CPU`, `GPU`, `GPU.0`, `NPU`, ...

    Raises:
        DeviceError: There is no such device, or it is known to fail on the recipe; names the value and what to use
            instead.
    """
    check_name(device)
    broken = violations(recipe, device)
    if not broken:
        return
    kind = kind_of(device)
    problems = ", ".join(rule.problem(recipe) for rule in broken)
    needs = ", ".join(rule.needs for rule in broken)
    raise DeviceError(
        f"{device} cannot run recipe {recipe.name!r} ({problems}): it needs {needs}; "
        f"{ADVICE[kind]} ({broken[0].source})",
        code="recipe-not-for-device",
    )
