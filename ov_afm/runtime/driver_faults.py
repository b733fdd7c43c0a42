"""Driver versions with reported faults.

Reports by users, with their links: a version listed here failed for somebody; a version that is not
listed may never have been tried. The self-test decides; this table has the advice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .rules import kind_of

__all__ = ["FAULTS", "DriverFault", "known_faults"]


@dataclass(frozen=True, slots=True)
class DriverFault:
    """A fault that was reported for some versions of a driver.

    Attributes:
        kind: Kind of device.
        first: Lowest version concerned, dotted.
        last: Highest version concerned.
        what: What happens.
        advice: What to do.
        source: The report.
    """

    kind: str
    first: str
    last: str
    what: str
    advice: str
    source: str


FAULTS: tuple[DriverFault, ...] = (
    DriverFault(
        "NPU",
        "31.0.100.0",
        "31.0.100.3053",
        "language models fail, with or without an error",
        "update the driver, or set DISABLE_OPENVINO_GENAI_NPU_L0=1",
        "https://github.com/openvinotoolkit/openvino/pull/27489",
    ),
    DriverFault(
        "NPU",
        "32.0.100.4023",
        "32.0.100.4023",
        "compilation fails with ZE_RESULT_ERROR_INVALID_ARGUMENT where older drivers compile",
        "use another driver version",
        "https://github.com/openvinotoolkit/openvino/issues/30663",
    ),
    DriverFault(
        "NPU",
        "32.0.100.4239",
        "32.0.100.4239",
        "creating a language model pipeline ends the process at once",
        "update the driver",
        "https://github.com/openvinotoolkit/openvino.genai/issues/2846",
    ),
    DriverFault(
        "NPU",
        "1.13.0",
        "1.16.0",
        "Linux: the NPU does not recover from a failed inference until its module is reloaded",
        "update the kernel, or: sudo rmmod intel_vpu && sudo modprobe intel_vpu",
        "https://github.com/intel/linux-npu-driver/issues/87",
    ),
)


def known_faults(device: str, driver: str | None) -> list[DriverFault]:
    """The reported faults of a device's driver version; none where the version is unknown."""
    if driver is None or not (version := _version(driver)):
        return []
    return [
        fault
        for fault in FAULTS
        if fault.kind == kind_of(device) and _version(fault.first) <= version <= _version(fault.last)
    ]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
