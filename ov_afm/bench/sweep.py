"""A sweep: every combination runs in a child process, and each record is stored as soon as it is measured."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DeviceError, OVAFMError
from ..model_dir import manifest
from ..runtime import device_cache, devices
from ..runtime.properties import KV_BYTES
from ..runtime.rules import kind_of
from ..system import console, control_groups, resources
from ..system.child_process import ChildProcess, Step
from . import report
from .bandwidth import Ceiling, measure_ceiling
from .plan import OPTIONS, Combination, Model, Settings, combinations, obstacle, read_models
from .records import Record, Store
from .run import Loaded, Run, measure
from .statistics import summarize

__all__ = ["Sweep", "bench", "sweep_id"]

logger = logging.getLogger(__name__)

TIMEOUT_S = 3600.0
# Steps of a combination besides its runs: loading, first inference, warm-up.
STEPS = 3
SETTINGS = Settings()


@dataclass(frozen=True, slots=True)
class Sweep:
    """Results of a comparison.

    Attributes:
        records: One a run, and one for each combination that could not run.
        interrupted: Ctrl-C ended it early.
    """

    records: list[Record]
    interrupted: bool = False


def bench(
    *models: str | Path,
    settings: Settings = SETTINGS,
    report_dir: str | Path | None = None,
    command: str = "",
    progress: console.Progress | None = None,
) -> Sweep:
    """Measure every combination of models, devices, prompt lengths and options that can run here.

    Args:
        models: Model directories.
        settings: What to measure.
        report_dir: Folder for `records.jsonl`, `report.md` and `report.html`; an unfinished sweep in it is
            continued. None writes nothing.
        command: The command line, for the record.
        progress: Where to draw progress.

    Returns:
        The records; after Ctrl-C those of the runs that were finished.

    Raises:
        SourceError: A model directory is missing, damaged or no text-generation model.
        DeviceError: No combination can run; with the reasons.
        ConfigError: The report folder holds something else, or its records are damaged.
    """
    if not models:
        raise ConfigError("bench needs at least one model directory")
    if report_dir is not None:
        resources.require("bench", "matplotlib", "jinja2")
    by_name = {model.name: model for model in read_models(models, settings.draft_model)}
    rows = combinations(list(by_name.values()), settings)
    blocked = {row: reason for row in rows if (reason := obstacle(row, by_name[row.model], settings))}
    if len(blocked) == len(rows):
        raise DeviceError(
            f"nothing to measure: {'; '.join(dict.fromkeys(blocked.values()))}", code="nothing-to-measure"
        )
    folder = None if report_dir is None else Path(report_dir)
    runner = _Runner(by_name, settings, folder, command)
    with progress if progress is not None else console.Progress() as bars:
        sweep = runner.run(rows, blocked, bars)
    if folder is not None and sweep.records:
        report.write(folder, sweep.records, interrupted=sweep.interrupted)
    return sweep


def sweep_id(models: Sequence[Model], settings: Settings) -> str:
    """Digest of everything that makes two sweeps comparable: settings, models, versions, machine."""
    parts = [[model.directory.key for model in models], asdict(settings), _versions(), _machine()]
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


class _Runner:
    """Runs the rows of one sweep.

    Args:
        models: The models by name.
        settings: What to measure.
        folder: The report folder; None keeps records in memory.
        command: The command line, for the record.
    """

    def __init__(self, models: Mapping[str, Model], settings: Settings, folder: Path | None, command: str) -> None:
        self._models, self._settings = models, settings
        sweep = sweep_id(list(models.values()), settings)
        self._store = Store(folder, sweep)
        self._common: dict[str, Any] = {
            "sweep": sweep,
            "prompts": settings.prompts,
            "seed": settings.seed,
            "runs_asked": settings.runs,
            "command": command,
            "versions": _versions(),
            "machine": _machine(),
        }

    def run(self, rows: Sequence[Combination], blocked: Mapping[Combination, str], bars: console.Progress) -> Sweep:
        """Measure what no earlier run did; Ctrl-C ends the sweep, not the program."""
        missing = [row for row in rows if row not in blocked and not self._store.done(row, self._settings.runs)]
        for row in (*blocked, *missing):
            self._store.drop(row)
        for row, reason in blocked.items():
            self._add(row, status="cannot run", reason=reason)
        interrupted = False
        try:
            if missing:
                self._measure_all(missing, bars)
        except KeyboardInterrupt:
            interrupted = True
        self._remember_speeds()
        order = {row: index for index, row in enumerate(rows)}
        records = sorted(self._store.records, key=lambda record: order[Combination.from_record(record)])
        return Sweep(records, interrupted)

    def _measure_all(self, rows: Sequence[Combination], bars: console.Progress) -> None:
        ceiling = self._ceiling()
        steps = self._settings.runs + STEPS
        with bars.step(f"{len(rows)} combinations", total=len(rows) * steps) as advance_all:
            # A bar for each model and device: one for each combination would fill the terminal.
            for (model, device), grouped in itertools.groupby(rows, key=lambda row: (row.model, row.device)):
                group = list(grouped)
                with bars.step(f"{model} {device}", total=len(group) * steps) as advance_group:

                    def advance(count: int, advance_group: Callable[..., None] = advance_group) -> None:
                        advance_group(count)
                        advance_all(count)

                    for row in group:
                        advance(steps - self._measure(row, ceiling, advance))

    def _ceiling(self) -> Ceiling | None:
        """Bandwidth and bytes a token; None where they cannot be measured, which is no reason to stop."""
        threads = self._settings.threads or control_groups.quota_threads() or self._common["machine"]["cores"] or 1
        folders = {name: model.directory.path for name, model in self._models.items()}
        try:
            return ChildProcess(timeout_s=TIMEOUT_S).run(measure_ceiling, threads, folders)
        except (OVAFMError, RuntimeError) as error:
            logger.warning("no ceiling is reported: %s", str(error).splitlines()[0])
            return None

    def _measure(self, row: Combination, ceiling: Ceiling | None, advance: Callable[[int], None]) -> int:
        """Measure a row; its failure becomes a record, and the sweep continues. Returns the steps that it advanced."""
        shared = self._ceiling_of(row, ceiling)
        steps = 0

        def on_event(event: Step | Loaded | Run) -> None:
            nonlocal steps
            if isinstance(event, Loaded):
                shared.update(asdict(event))
                return
            if isinstance(event, Run):
                self._add(row, status="ok", **shared, **event.to_dict())
            steps += 1
            advance(1)

        child = ChildProcess(on_event=on_event, timeout_s=TIMEOUT_S, env=OPTIONS[row.option].env)
        try:
            child.run(measure, self._models[row.model].directory, row, self._settings)
        except (OVAFMError, RuntimeError) as error:
            self._add(row, status="failed", reason=str(error).strip().splitlines()[0])
        return steps

    def _ceiling_of(self, row: Combination, ceiling: Ceiling | None) -> dict[str, Any]:
        """The ceiling of a row; only where a token is one pass over the weights, from the memory that was measured."""
        if ceiling is None or row.concurrency > 1 or OPTIONS[row.option].drafts or kind_of(row.device) != "CPU":
            return {}
        default = "f16" if row.option == "kv-f16" else "u8"
        precision = str(self._settings.properties.get("KV_CACHE_PRECISION", default))
        values = self._models[row.model].directory.geometry.kv_values_per_token
        # At the middle of the answer.
        context = row.prompt_tokens + row.new_tokens // 2
        cache_bytes = int(values * KV_BYTES.get(precision, KV_BYTES["u8"]) * context)
        token_bytes = ceiling.weight_bytes[row.model] + cache_bytes
        return {
            "token_bytes": token_bytes,
            "bandwidth_bytes_per_s": ceiling.bandwidth,
            "bandwidth_threads": ceiling.threads,
            "ceiling_tokens_per_s": ceiling.bandwidth / token_bytes,
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
        """Keep for device `AUTO` what was measured: the plain engine, one request, no emulation."""
        for summary in summarize(self._store.records):
            if summary.plain and "tpot_ms" in summary.figures:
                row = summary.combination
                key = f"{self._models[row.model].directory.key}/{row.device}"
                device_cache.remember("tpot_ms", key, round(summary.figures["tpot_ms"].median, 3))
