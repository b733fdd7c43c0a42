"""Energy that the processor package used, read from its own counters.

codecarbon reads them: RAPL on Linux, the Energy Meter Interface on Windows. Without a
counter, or permission to read it, there is no figure: an estimate from a table of TDPs would say more
about the table than about the model.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import DeviceError

__all__ = ["Meter", "open_meter"]

RAPL_DIR = Path("/sys/class/powercap/intel-rapl/subsystem")
J_PER_KWH = 3.6e6


class Meter:
    """A running energy counter.

    Attributes:
        source: Name of the sensor.
    """

    def __init__(self, reader: Any, source: str) -> None:
        """Start at the counter's present value."""
        self.source = source
        self._reader = reader
        reader.start()
        self._last = time.perf_counter()

    def read_j(self) -> float:
        """Joules used since the last reading."""
        from codecarbon.core.units import Time

        now = time.perf_counter()
        duration, self._last = now - self._last, now
        details = self._reader.get_cpu_details(Time(seconds=duration))
        return float(sum(value for name, value in details.items() if "Energy" in name)) * J_PER_KWH

    def idle_w(self, seconds: float) -> float:
        """Mean power while this process sleeps."""
        self.read_j()
        begin = time.perf_counter()
        time.sleep(seconds)
        return self.read_j() / (time.perf_counter() - begin)


def open_meter(rapl_dir: Path = RAPL_DIR) -> Meter:
    """The machine's package energy counter.

    Args:
        rapl_dir: Linux: where the kernel shows the counters.

    Raises:
        DeviceError: There is none, or it may not be read; the message is the reason alone.
    """
    if importlib.util.find_spec("codecarbon") is None:
        raise DeviceError("codecarbon is not installed (pip install 'ov-afm[bench]')")
    if sys.platform == "win32":
        return _windows()
    if not rapl_dir.exists():
        raise DeviceError("this machine shows no RAPL energy counter")
    from codecarbon.core import cpu

    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    rapl: Any = cpu.IntelRAPL
    reader = rapl(rapl_dir=str(rapl_dir))
    names = [Path(each.path).with_name("name") for each in reader._rapl_files]
    if not names:
        raise DeviceError(
            "the RAPL energy counters may not be read by this user (try: sudo chmod -R a+r /sys/class/powercap)"
        )
    return Meter(reader, "RAPL " + ", ".join(name.read_text(encoding="utf-8").strip() for name in names))


def _windows() -> Meter:
    from codecarbon.core.windows_emi import WindowsEMI

    try:
        reader = WindowsEMI()
    except (OSError, SystemError) as error:
        raise DeviceError(f"no energy meter: {error}") from error
    channels = [names[index] for _, names, selected in reader._devices for index in selected]
    return Meter(reader, "EMI " + ", ".join(channels))
