"""Records of benchmark runs in docs/figures: what was measured, on which CPU, with which model, by which command.

`figures.py` makes every table of speeds in the documents from them, so that no figure is typed and none is without
its CPU.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matrices import bits_per_weight, kinds, read_matrices

from ov_afm.bench.statistics import Spread
from ov_afm.conversion.synthetic import GEOMETRIES
from ov_afm.errors import ConfigError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures"
SCHEMA = 1
# What a figure is of, in the order of the tables.
KINDS = ("decode", "prefill", "together", "start", "memory")
# Flags of /proc/cpuinfo that decide which kernels run.
FEATURES = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
}


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        kind: One of `KINDS`.
        what: What was measured, such as `decode, 10% of neurons active`.
        unit: Of `ours` and `theirs`.
        peer: What ov_afm is compared with.
        ours: ov_afm's runs.
        theirs: The peer's runs.
        ratio: How many times better ov_afm is, pair by pair; below 1 it is worse.
        note: What else is to be said of ov_afm's side.
    """

    kind: str
    what: str
    unit: str
    peer: str
    ours: Spread
    theirs: Spread
    ratio: Spread
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A figure that stands for itself, and its bound.

    Attributes:
        what: What was measured.
        value: The figure.
        unit: Its unit.
        bound: Most that it may be; None where nothing is asked of it.
    """

    what: str
    value: float
    unit: str = ""
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.bound is None or self.value <= self.bound

    @property
    def text(self) -> str:
        """The figure with its unit."""
        return f"{self.value:.3g} {self.unit}".rstrip()

    @property
    def limit(self) -> str:
        """The bound with the unit."""
        return "" if self.bound is None else f"≤ {self.bound:g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        program: Name of the benchmark's file.
        command: Its command line; of paths only the last name.
        time: When it ended, UTC, as ISO 8601.
        commit: The commit that ran, with `+` where the code was changed; None outside a checkout.
        versions: Of the packages, and of other engines.
        cpu: Of `describe_cpu`.
        model: Of `describe_model`.
        figures: What was measured.
        settings: What both sides ran with that is not their default.
        schema: Version of this layout.
        checks: Figures without a peer.
    """

    program: str
    command: str
    time: str
    commit: str | None
    versions: dict[str, str | None]
    cpu: dict[str, Any]
    model: dict[str, Any]
    figures: Sequence[Figure]
    settings: str = ""
    schema: int = SCHEMA
    checks: Sequence[Check] = ()


def describe_cpu(threads: int, isa: str | None, *, limit: str | None = None) -> dict[str, Any]:
    """The CPU.

    Args:
        threads: Threads that every engine had.
        isa: Variant of the kernels that ran; None where none did.
        limit: The instruction set that all engines were limited to; None for all that the CPU has.
    """
    import psutil

    info = _cpuinfo()
    flags = info.get("flags", "").split()
    return {
        "name": re.sub(r"\((?:R|TM)\)|\bCPU\b", "", info.get("model name") or platform.processor()).strip(),
        "family": info.get("cpu family"),
        "model": info.get("model"),
        "features": [name for flag, name in FEATURES.items() if flag in flags],
        "cores": psutil.cpu_count(logical=False),
        "threads": threads,
        "isa": isa,
        "limit": limit,
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): re.sub(r" +", " ", value.strip()) for name, _, value in pairs}


def describe_model(model: ModelDirectory) -> dict[str, Any]:
    """A model directory: geometry, recipe, and how its weights are really stored."""
    matrices = read_matrices(model.xml)
    geometry = model.geometry.to_dict()
    known = (name for name, each in GEOMETRIES.items() if geometry.items() <= asdict(each).items())
    return {
        "name": next(known, model.name),
        "synthetic": bool(model.manifest and model.manifest.source.get("synthetic")),
        "geometry": geometry,
        "recipe": model.recipe_name,
        "weights": kinds(matrices),
        "weights_bytes": model.weights_bytes,
        "bits_per_weight": round(bits_per_weight(matrices), 3),
    }


def new_record(
    model: ModelDirectory,
    cpu: Mapping[str, Any],
    figures: Sequence[Figure],
    *,
    versions: Mapping[str, str] | None = None,
    settings: str = "",
    checks: Sequence[Check] = (),
) -> Record:
    """The record of this process's run.

    Args:
        model: The model directory.
        cpu: Of `describe_cpu`.
        figures: What was measured.
        versions: Of engines that are no packages of ov_afm.
        settings: What both sides ran with that is not their default.
        checks: Figures without a peer.
    """
    program = Path(sys.argv[0]).name
    words = [Path(word).name if "/" in word or Path(word).exists() else word for word in sys.argv[1:]]
    return Record(
        program,
        shlex.join(["python", f"benchmarks/{program}", *words]),
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        _commit(),
        {**manifest.installed_versions(), **(versions or {})},
        dict(cpu),
        describe_model(model),
        list(figures),
        settings,
        checks=tuple(checks),
    )


def _commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ov_afm", "csrc", "benchmarks")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(record: Record, folder: Path) -> Path:
    """Write a record as a new file of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{record.time[:10]}-{Path(record.program).stem}"
    number = 1
    while (path := folder / f"{stem}-{number}.json").exists():
        number += 1
    write_json(path, asdict(record))
    return path


def read(folder: Path) -> list[Record]:
    """All records of a folder, the oldest first.

    Raises:
        ConfigError: A file is no record (named).
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields["schema"] > SCHEMA:
                raise ValueError(f"layout {fields['schema']}, this figures.py reads up to {SCHEMA}")
            checks = tuple(Check(**each) for each in fields.get("checks", ()))
            figures = [_figure(each) for each in fields["figures"]]
            records.append(Record(**{**fields, "figures": figures, "checks": checks}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no record of a benchmark ({error}); delete it or measure again") from error
    return sorted(records, key=lambda record: record.time)


def times(ratio: Spread) -> str:
    """How many times better: `1.70× (1.62–1.81)`."""
    median, _, around = ratio.text().partition(" ")
    return f"{median}× {around}".rstrip()


def _figure(fields: Mapping[str, Any]) -> Figure:
    figure = Figure(**{**fields, **{name: Spread(**fields[name]) for name in ("ours", "theirs", "ratio")}})
    if figure.kind not in KINDS:
        raise ValueError(f"kind {figure.kind!r}, known: {', '.join(KINDS)}")
    return figure
