"""A sweep: every combination in a child process, its records kept as they come."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OVAFMError
from ..model_dir import manifest
from ..runtime import device_cache, devices
from ..runtime.properties import KV_BYTES
from ..system import child_process, console
from .bandwidth import kv_bytes_per_token
from .plan import OPTIONS, Combination, Model, Settings
from .records import Record, Store
from .summary import summarize

__all__ = ["Runner", "Sweep", "sweep_id"]

logger = logging.getLogger(__name__)

MEASURE = "ov_afm.bench.run:measure"
CEILING = "ov_afm.bench.run:measure_ceiling"
TIMEOUT_S = 3600.0
# Steps of a combination besides its runs: loading, first inference, warm-up.
STEPS = 3


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a comparison found.

    Attributes:
        records: One a run, and one for each combination that could not run.
        interrupted: Ctrl-C ended it early.
    """

    records: list[Record]
    interrupted: bool = False


def sweep_id(models: list[Model], settings: Settings) -> str:
    """Digest of everything that makes two sweeps comparable: settings, models, versions, machine."""
    parts = [[model.key for model in models], asdict(settings), _versions(), _machine()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    return {name: version for name, version in manifest.installed_versions().items() if version}


def _machine() -> dict[str, Any]:
    import psutil

    cpu = devices.find("CPU")
    return {
        "cpu": cpu.full_name if cpu else platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


class Runner:
    """Runs the rows of one sweep."""

    def __init__(
        self,
        models: dict[str, Model],
        settings: Settings,
        store: Store,
        blocked: dict[Combination, str],
        command: str,
    ) -> None:
        self._models, self._settings, self._store, self._blocked = models, settings, store, blocked
        self._common: dict[str, Any] = {
            "sweep": sweep_id(list(models.values()), settings),
            "prompts": settings.prompts,
            "seed": settings.seed,
            "runs_asked": settings.runs,
            "command": command,
            "versions": _versions(),
            "machine": _machine(),
        }

    def run(self, rows: list[Combination], progress: console.Progress | None) -> Sweep:
        """Measure what is not there yet; Ctrl-C ends the sweep, not the program."""
        todo = [row for row in rows if row not in self._blocked and not self._store.done(row, self._settings.runs)]
        for row in (*self._blocked, *todo):
            self._store.drop(row)
        for row, reason in self._blocked.items():
            self._add(row, status="cannot run", reason=reason)
        interrupted = False
        try:
            if todo:
                self._measure_all(todo, progress)
        except KeyboardInterrupt:
            interrupted = True
        self._remember_speeds()
        order = {row: index for index, row in enumerate(rows)}
        return Sweep(sorted(self._store.records, key=lambda record: order[Combination.of(record)]), interrupted)

    def _measure_all(self, todo: list[Combination], progress: console.Progress | None) -> None:
        ceiling = self._ceiling()
        if progress is None:
            for row in todo:
                self._measure(row, ceiling, lambda _: None)
            return
        each = self._settings.runs + STEPS
        with progress.step(f"{len(todo)} combinations", total=len(todo) * each) as whole:
            done = 0
            # A bar for each model and device: one for each combination would fill the terminal.
            for (model, device), rows in itertools.groupby(todo, key=lambda row: (row.model, row.device)):
                group = list(rows)
                with progress.step(f"{model} {device}", total=len(group) * each) as part:

                    def advance(_: str, part: Callable[..., None] = part) -> None:
                        part(1)
                        whole(1)

                    for index, row in enumerate(group, 1):
                        self._measure(row, ceiling, advance)
                        done += 1
                        # A row that failed has made fewer steps.
                        part(to=index * each)
                        whole(to=done * each)

    def _ceiling(self) -> dict[str, Any] | None:
        """Bandwidth and bytes a token; None where they cannot be found out, which is no reason not to measure."""
        threads = self._settings.threads or self._common["machine"]["cores"] or 1
        folders = {name: str(model.path) for name, model in self._models.items()}
        try:
            found = child_process.run(CEILING, {"threads": threads, "models": folders}, timeout_s=TIMEOUT_S)
        except (OVAFMError, RuntimeError) as error:
            logger.warning("no ceiling is told: %s", str(error).splitlines()[0])
            return None
        return {"threads": threads, **found}

    def _measure(self, row: Combination, ceiling: dict[str, Any] | None, advance: Callable[[str], None]) -> None:
        """Measure a row; its failure becomes a record, and the sweep goes on."""
        model = self._models[row.model]
        shared = self._ceiling_of(row, ceiling)

        def on_event(event: dict[str, Any]) -> None:
            fields = {name: value for name, value in event.items() if name != "event"}
            if event["event"] == "loaded":
                shared.update(fields)
                return
            advance(event["event"])
            if event["event"] == "run":
                self._add(row, status="ok", **shared, **fields)

        arguments = {
            "model_dir": str(model.path),
            "combination": row.to_dict(),
            "settings": asdict(self._settings),
        }
        try:
            child_process.run(MEASURE, arguments, on_event=on_event, timeout_s=TIMEOUT_S, env=OPTIONS[row.option].env)
        except (OVAFMError, RuntimeError) as error:
            self._add(row, status="failed", reason=str(error).strip().splitlines()[0])

    def _ceiling_of(self, row: Combination, ceiling: dict[str, Any] | None) -> dict[str, Any]:
        """The ceiling of a row; only where a token is one pass over the weights, from the memory that was measured."""
        if ceiling is None or row.concurrency > 1 or OPTIONS[row.option].drafts or devices.kind_of(row.device) != "CPU":
            return {}
        asked = str(self._settings.properties.get("KV_CACHE_PRECISION", "f16" if row.option == "kv-f16" else "u8"))
        # At the middle of the answer.
        context = row.prompt_tokens + row.new_tokens // 2
        shape = self._models[row.model].geometry
        cache = kv_bytes_per_token(shape, context, KV_BYTES.get(asked, KV_BYTES["u8"]))
        token_bytes = ceiling["weight_bytes"][row.model] + cache
        return {
            "token_bytes": token_bytes,
            "bandwidth_bytes_per_s": ceiling["bandwidth"],
            "bandwidth_threads": ceiling["threads"],
            "ceiling_tokens_per_s": ceiling["bandwidth"] / token_bytes,
        }

    def _add(self, row: Combination, **fields: Any) -> None:
        emulated = row.device == devices.EMULATED_NPU
        info = devices.find("CPU" if emulated else row.device)
        self._store.add(
            row,
            {
                **self._models[row.model].describe(),
                **self._common,
                "emulated": emulated,
                "device_name": info.full_name if info else None,
                "driver": info.driver if info else None,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **fields,
            },
        )

    def _remember_speeds(self) -> None:
        """Tell `AUTO` what was measured: the plain engine, one request, no emulation."""
        for summary in summarize(self._store.records):
            row = summary.combination
            if summary.tpot_ms and row.option == "plain" and row.concurrency == 1 and not summary.emulated:
                key = f"{self._models[row.model].key}/{row.device}"
                device_cache.remember("tpot_ms", key, round(summary.tpot_ms.median, 3))
