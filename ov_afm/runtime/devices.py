"""Which devices this machine has, and which of them to use.

Loading a GPU or NPU plugin runs a driver, and a bad driver ends the process that calls it. So devices
are listed in a child process; if it dies, each kind of device is tried in a child of its own, which
shows whose driver it was, and the others stay usable.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DeviceError, OVAFMError
from ..presets import Recipe
from ..system.child_process import ChildProcess
from .rules import check, kind_of, violations

__all__ = [
    "EMULATED_NPU",
    "KINDS",
    "Choice",
    "DeviceInfo",
    "Inventory",
    "available",
    "choose",
    "enumerate_devices",
    "find",
    "inventory",
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
        driver: Driver version; None where the plugin does not report it.
        memory_bytes: Memory it can use; None where the plugin does not report it.
        capabilities: What it computes in: `FP16`, `INT8`, ...
        max_alloc_bytes: Largest single allocation by default; None where the plugin does not report it.
    """

    name: str
    full_name: str
    driver: str | None
    memory_bytes: int | None
    capabilities: tuple[str, ...]
    max_alloc_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The devices of this machine.

    Attributes:
        devices: The devices that can be used.
        faults: Kind of device to the reason why it could not be listed.
    """

    devices: tuple[DeviceInfo, ...]
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Choice:
    """A device to try.

    Attributes:
        device: Name to give to the engine.
        why: How it was chosen, for people.
        emulated: The NPU's path runs on CPU; its speed is not an NPU's.
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
        """The device's name for people; names an emulation as one."""
        return "emulated NPU" if self.emulated else self.device


@functools.lru_cache(maxsize=1)
def inventory() -> Inventory:
    """Probe for devices in child processes, once a process."""
    try:
        return Inventory(_probe(KINDS))
    except OVAFMError:
        usable: list[DeviceInfo] = []
        faults: dict[str, str] = {}
        for kind in KINDS:
            try:
                usable += _probe((kind,))
            except OVAFMError as error:
                faults[kind] = str(error)
        return Inventory(tuple(usable), faults)


def available() -> list[DeviceInfo]:
    """The devices that this machine has and that can be used."""
    return list(inventory().devices)


def _probe(kinds: tuple[str, ...]) -> tuple[DeviceInfo, ...]:
    return tuple(ChildProcess(timeout_s=PROBE_TIMEOUT_S).run(enumerate_devices, kinds))


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

    def read(key: str) -> Any:
        try:
            return core.get_property(name, key)
        except RuntimeError:
            return None

    supported = read("SUPPORTED_PROPERTIES") or ()
    driver = next((read(key) for key in supported if key.endswith("DRIVER_VERSION")), None)
    memory = next((read(key) for key in MEMORY_PROPERTIES if key in supported), None)
    return DeviceInfo(
        name,
        full_name=str(read("FULL_DEVICE_NAME") or name),
        driver=None if driver is None else str(driver),
        memory_bytes=psutil.virtual_memory().total if name == "CPU" else memory,
        capabilities=tuple(str(each) for each in read("OPTIMIZATION_CAPABILITIES") or ()),
        max_alloc_bytes=read(MAX_ALLOC_PROPERTY) if MAX_ALLOC_PROPERTY in supported else None,
    )


def find(name: str) -> DeviceInfo | None:
    """A device by its name, where `GPU` means the first of several; None if there is no such device."""
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
        recipe: How the model's weights are stored; None where it is not recorded.
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
    # Every machine has one, and its plugin runs no driver that could crash.
    if name == "CPU":
        return [Choice(name, "as requested")]
    _require(name)
    if recipe is not None:
        check(recipe, name)
    others = [each for each in _auto(recipe, speeds or {}) if each.device != name] if fallback else []
    return [Choice(name, "as requested"), *(Choice(each.device, f"{name} was requested") for each in others)]


def _require(name: str) -> None:
    if find(name) is not None:
        return
    usable = ", ".join(each.name for each in inventory().devices)
    fault = inventory().faults.get(kind_of(name))
    reason = f"could not be probed ({fault})" if fault else "is not here"
    raise DeviceError(
        f"device {name!r} {reason}; available: {usable or 'none'}, or AUTO; details: ov-afm devices",
        code="device-faulty" if fault else "device-missing",
    )


def _auto(recipe: Recipe | None, speeds: Mapping[str, float]) -> list[Choice]:
    choices: list[Choice] = []
    skipped: list[str] = []
    for kind in AUTO_ORDER:
        names = [each.name for each in inventory().devices if kind_of(each.name) == kind]
        if not names:
            skipped.append(f"{kind}: {inventory().faults.get(kind, 'not here')}")
        for name in names:
            broken = [rule.problem(recipe) for rule in violations(recipe, name)] if recipe else []
            if broken:
                skipped.append(f"{name}: cannot run {', '.join(broken)}")
            else:
                choices.append(Choice(name, "AUTO" + (f" ({'; '.join(skipped)})" if skipped else "")))
    if not choices:
        raise DeviceError(f"no device can run this model: {'; '.join(skipped)}", code="no-device-fits")
    measured = sorted((each for each in choices if each.device in speeds), key=lambda each: speeds[each.device])
    if len(measured) < 2:
        return choices
    rates = ", ".join(f"{each.device} {1000 / speeds[each.device]:.1f} tokens/s" for each in measured)
    rest = [each for each in choices if each not in measured]
    return [*(Choice(each.device, f"AUTO (measured here: {rates})") for each in measured), *rest]
