"""Is an engine's process still doing anything?

It says so itself once a second, from a thread of its own. But openvino-genai (2026.4) computes a step without giving
Python's lock away, so the process is silent in a step, which may take minutes. Then the operating system is asked: a
process that was stopped, or that uses no processor, is stuck. One that is busy has the time that a step may take.

Seconds are counted by calls of `tick`, not by a clock: where the server was stopped as well, both go on together.
"""

from __future__ import annotations

__all__ = ["BEAT_S", "STEP_S", "Liveness"]

# Time between two signs of life, and between two looks.
BEAT_S = 1.0
# Silence after which the operating system is asked.
SILENT_S = 5
# A process is idle that uses less than this share of a processor for so long. Waiting for memory that was swapped out
# is work: reading it takes more than this.
IDLE_S = 60
IDLE_SHARE = 0.01
# Least bound of one step, and of preparing one prompt.
STEP_S = 600


class Liveness:
    """Decides whether a process is stuck.

    Args:
        pid: The process.
        step_s: Longest time that a step may take.
    """

    def __init__(self, pid: int, step_s: float) -> None:
        self._pid, self._step_s = pid, step_s
        self._silent = self._idle = 0
        self._cpu_s = 0.0

    def heard(self) -> None:
        """The process has said something."""
        self._silent = self._idle = 0

    def tick(self, *, loading: bool = False) -> str | None:
        """A second has passed; why the process is stuck, None if it is not.

        Args:
            loading: It loads a model, for which there is no time limit.
        """
        import psutil

        self._silent += 1
        if self._silent < SILENT_S:
            return None
        try:
            process = psutil.Process(self._pid)
            stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            times = process.cpu_times()
        except psutil.Error:
            # It has ended, which is noticed elsewhere.
            return None
        if stopped:
            return f"it was stopped, and did not answer for {self._silent} s"
        if loading:
            return None
        cpu_s = times.user + times.system
        if self._idle == 0 or cpu_s - self._cpu_s > IDLE_SHARE * self._idle:
            self._idle, self._cpu_s = 0, cpu_s
        self._idle += 1
        if self._idle > IDLE_S:
            return f"it did nothing for {IDLE_S} s"
        if self._silent > self._step_s:
            return f"one step took more than {self._step_s:g} s"
        return None
