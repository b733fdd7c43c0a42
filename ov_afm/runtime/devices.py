"""Which devices are here, and which of them to use.

Loading a GPU or NPU plugin runs a driver, and a bad driver ends the process that asks. So devices
are listed in a child process; if it dies, each kind of device is asked on its own, to find out
which one it was, and the others stay usable.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cli.command import command
from ..cli.command import parser as command_parser
from ..errors import DeviceError, OVAFMError
from ..presets import Recipe
from ..system import child_process, console
from .rules import RULES, Rule, check, kind_of, violations

__all__ = [
    "EMULATED_NPU",
    "RULES",
    "Choice",
    "DeviceInfo",
    "Inventory",
    "Rule",
    "available",
    "check",
    "choose",
    "find",
    "inventory",
    "kind_of",
    "main",
    "violations",
]

EMULATED_NPU = "NPU-EMULATED"
# https://docs.openvino.ai: AUTO here means "the fastest that can run the model", not OpenVINO's AUTO plugin.
AUTO_ORDER = ("GPU", "NPU", "CPU")
KINDS = ("CPU", "GPU", "NPU")
PROBE_TIMEOUT_S = 60.0
MEMORY_PROPERTIES = ("GPU_DEVICE_TOTAL_MEM_SIZE", "NPU_DEVICE_TOTAL_MEM_SIZE")
MAX_ALLOC_PROPERTY = "GPU_DEVICE_MAX_ALLOC_MEM_SIZE"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device.

    Attributes:
        name: OpenVINO's name: `CPU`, `GPU`, `GPU.1`, `NPU`.
        full_name: What the vendor calls it.
        driver: Driver version; None where the plugin does not tell.
        memory_bytes: Memory it can use; None where the plugin does not tell.
        capabilities: What it computes in: `FP16`, `INT8`, ...
        max_alloc_bytes: Largest single allocation by default; None where the plugin does not tell.
    """

    name: str
    full_name: str
    driver: str | None
    memory_bytes: int | None
    capabilities: tuple[str, ...]
    max_alloc_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """What probing found.

    Attributes:
        devices: The devices that answered.
        faults: Kind of device to the reason why asking for it failed.
    """

    devices: tuple[DeviceInfo, ...]
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A device to try.

    Attributes:
        device: Name to give to the engine.
        why: How it was chosen, for people.
        emulated: It is the NPU's path run on CPU; its speed is not an NPU's.
    """

    device: str
    why: str
    emulated: bool = False

    @property
    def kind(self) -> str:
        """`CPU`, `GPU` or `NPU`."""
        return kind_of(self.device)

    @property
    def label(self) -> str:
        """The device's name for people, which says when it is an emulation."""
        return "emulated NPU" if self.emulated else self.device


@functools.lru_cache(maxsize=1)
def inventory() -> Inventory:
    """Probe for devices in child processes, once a process."""
    try:
        return Inventory(_probe(KINDS))
    except OVAFMError:
        found: list[DeviceInfo] = []
        faults: dict[str, str] = {}
        for kind in KINDS:
            try:
                found += _probe((kind,))
            except OVAFMError as error:
                faults[kind] = str(error)
        return Inventory(tuple(found), faults)


def available() -> list[DeviceInfo]:
    """The devices that are here and answer."""
    return list(inventory().devices)


def _probe(kinds: tuple[str, ...]) -> tuple[DeviceInfo, ...]:
    return tuple(child_process.ChildProcess(timeout_s=PROBE_TIMEOUT_S).run(enumerate_devices, kinds))


def enumerate_devices(kinds: Sequence[str]) -> list[DeviceInfo]:
    """The devices of some kinds; may end the process, because it runs their drivers."""
    import openvino

    core = openvino.Core()
    names = []
    for kind in kinds:
        try:
            ids = core.get_property(kind, "AVAILABLE_DEVICES")
        except RuntimeError:
            continue  # no plugin, no driver or no device of this kind
        names += [f"{kind}.{each}" if len(ids) > 1 else kind for each in ids]
    return [_describe(core, name) for name in names]


def _describe(core: Any, name: str) -> DeviceInfo:
    import psutil

    def ask(key: str) -> Any:
        try:
            return core.get_property(name, key)
        except RuntimeError:
            return None

    supported = ask("SUPPORTED_PROPERTIES") or ()
    driver = next((ask(key) for key in supported if key.endswith("DRIVER_VERSION")), None)
    memory = next((ask(key) for key in MEMORY_PROPERTIES if key in supported), None)
    return DeviceInfo(
        name,
        full_name=str(ask("FULL_DEVICE_NAME") or name),
        driver=None if driver is None else str(driver),
        memory_bytes=psutil.virtual_memory().total if name == "CPU" else memory,
        capabilities=tuple(str(each) for each in ask("OPTIMIZATION_CAPABILITIES") or ()),
        max_alloc_bytes=ask(MAX_ALLOC_PROPERTY) if MAX_ALLOC_PROPERTY in supported else None,
    )


def find(name: str) -> DeviceInfo | None:
    """What is known of a device; `GPU` means the first of several."""
    return next((each for each in inventory().devices if name in (each.name, kind_of(each.name))), None)


def choose(
    device: str,
    recipe: Recipe | None = None,
    *,
    fallback: bool = False,
    speeds: Mapping[str, float] | None = None,
) -> list[Choice]:
    """The devices to try for a model, best first.

    Args:
        device: A device's name, `AUTO`, or `NPU-EMULATED`.
        recipe: How the model's weights are stored; None where nobody recorded it.
        fallback: After a named device, list those that `AUTO` would try.
        speeds: Device to measured milliseconds a token on this machine. Where two or more devices were
            measured, those go first for `AUTO`, fastest first.

    Returns:
        At least one choice.

    Raises:
        DeviceError: No such device, or it cannot run the recipe.
    """
    name = device.strip().upper()
    if name == EMULATED_NPU:
        return [Choice("NPU", "emulated NPU: the NPU's path run on CPU; neither speed nor numerics are an NPU's", True)]
    if name == "AUTO":
        return _auto(recipe, speeds or {})
    # Every machine that runs Python has this one, and its plugin has no driver to fear.
    if name == "CPU":
        return [Choice(name, "as asked")]
    _require(name)
    if recipe is not None:
        check(recipe, name)
    others = [each for each in _auto(recipe, speeds or {}) if each.device != name] if fallback else []
    return [Choice(name, "as asked"), *(Choice(each.device, f"{name} was asked for") for each in others)]


def _require(name: str) -> None:
    found = inventory()
    if find(name) is not None:
        return
    here = ", ".join(each.name for each in found.devices)
    fault = found.faults.get(kind_of(name))
    reason = f"could not be asked ({fault})" if fault else "is not here"
    raise DeviceError(f"device {name!r} {reason}; available: {here or 'none'}, or AUTO; details: ov-afm devices")


def _auto(recipe: Recipe | None, speeds: Mapping[str, float]) -> list[Choice]:
    found = inventory()
    choices: list[Choice] = []
    passed_over: list[str] = []
    for kind in AUTO_ORDER:
        names = [each.name for each in found.devices if kind_of(each.name) == kind]
        if not names:
            passed_over.append(f"{kind}: {found.faults.get(kind, 'not here')}")
        for name in names:
            broken = [rule.found(recipe) for rule in violations(recipe, name)] if recipe else []
            if broken:
                passed_over.append(f"{name}: cannot run {', '.join(broken)}")
            else:
                choices.append(Choice(name, "AUTO" + (f" ({'; '.join(passed_over)})" if passed_over else "")))
    if not choices:
        raise DeviceError(f"no device can run this model: {'; '.join(passed_over)}")
    measured = sorted((each for each in choices if each.device in speeds), key=lambda each: speeds[each.device])
    if len(measured) < 2:
        return choices
    rates = ", ".join(f"{each.device} {1000 / speeds[each.device]:.1f} tokens/s" for each in measured)
    rest = [each for each in choices if each not in measured]
    return [*(Choice(each.device, f"AUTO (measured here: {rates})") for each in measured), *rest]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm devices`."""
    parser = command_parser("devices", "List this machine's devices and what they can run, or test one.")
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="tell also what this model would be loaded with")
    parser.add_argument("--test", metavar="MODEL_DIR", help="ask devices what export recorded, and judge the answers")
    parser.add_argument("--device", nargs="+", metavar="DEVICE", help="with --test: devices to test instead of all")
    parser.add_argument("--clear-cache", action="store_true", help="delete compiled models, verdicts and load times")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.device and not arguments.test:
        parser.error("--device needs --test MODEL_DIR")
    from . import device_cache, device_report
    from .loading import locate

    if arguments.clear_cache:
        freed = device_cache.clear()
        print(json.dumps({"freed_bytes": freed}) if arguments.json else f"freed {console.human_bytes(freed)}")
        return 0
    if arguments.test:
        return _test(locate(arguments.test), arguments.device, as_json=arguments.json)
    report = device_report.describe(inventory(), locate(arguments.model) if arguments.model else None)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else device_report.render(report))
    return 0


def _test(model_dir: Path, names: list[str] | None, *, as_json: bool) -> int:
    from ..system.console import LoadDisplay
    from . import device_report

    verdicts = {}
    for name in names or [each.name for each in inventory().devices]:
        with LoadDisplay() as on_phase:
            verdict = verdicts[name] = device_report.test(model_dir, name, on_phase)
        label = "emulated NPU" if name.upper() == EMULATED_NPU else name
        if not as_json:
            print(f"{label}: {'passed' if verdict.passed else 'FAILED'}: {verdict.evidence}", flush=True)
    if as_json:
        print(json.dumps({name: asdict(verdict) for name, verdict in verdicts.items()}, ensure_ascii=False))
    return 0 if all(verdict.passed for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    from .devices import main as run

    sys.exit(run())
