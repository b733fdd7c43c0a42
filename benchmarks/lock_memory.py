"""The first token after another program has taken the memory, with and without `--lock-memory`; and reading ahead.

An engine and a program that reads files run in a control group of their own, so that they compete for its memory and
nobody else does (Linux, root). The engine answers, then the other program reads a file larger than the group twice,
then the engine is asked again: what the system took from it in between, it reads from the disk. A packed model is
needed: what OpenVINO repacks is no file.

The second table starts an engine whose weights are not in memory at all, with and without reading ahead.

    sudo python benchmarks/lock_memory.py MODEL_DIR --limit-gb 2 --runs 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from program import check_counts, program

from ov_afm.errors import ConfigError
from ov_afm.model_dir.manifest import MODEL_BIN
from ov_afm.model_dir.model_directory import PACKED_FOLDER, ModelDirectory

LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")
NEW_TOKENS = 16
BLOCK = 1 << 20


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A group below this process's own."""
    from ov_afm.system import control_groups

    group = next(control_groups._groups("memory")) / "ov_afm_lock_memory"
    group.mkdir()
    try:
        file = next(group / name for name in LIMIT_FILES if (group / name).exists())
        file.write_text(str(limit))
        yield group
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def evict(path: Path) -> None:
    """Drop a file from the page cache; what a process has mapped stays."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Engine:
    """A process in the group that loads a model, and answers once for each line.

    Args:
        model: The model directory.
        group: Its control group.
        options: `lock`, `read_ahead`.
    """

    def __init__(self, model: Path, group: Path, **options: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", str(model), json.dumps({"group": str(group), **options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Packed weights whatever was measured, because they are what this is about.
            env={**os.environ, "OV_AFM_NO_KERNELS": "0"},
        )
        self.loaded = self._read()

    def ask(self) -> dict[str, Any]:
        """Milliseconds to the first token, and tokens a second after it."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the engine ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def engine(model: str, options: dict[str, Any], out: IO[str]) -> None:
    """The engine's process."""
    Path(options["group"], "cgroup.procs").write_text(str(os.getpid()))
    from ov_afm.pipeline import Params, Pipeline, Use
    from ov_afm.system import resident

    if not options.get("read_ahead", True):
        resident.read_ahead = lambda _: None
    begun = time.perf_counter()
    pipeline = Pipeline(model, use=Use(lock_memory=options.get("lock", False)))
    params = Params(max_new_tokens=NEW_TOKENS, temperature=0.0)

    def tell(**values: Any) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    tell(load_s=time.perf_counter() - begun)
    for number, _ in enumerate(sys.stdin):
        # Another beginning each time: nothing comes from the cache of earlier prompts.
        metrics = pipeline.generate(f"{number} apples and pears", params).metrics
        tell(ttft_ms=metrics.ttft_ms, tokens_per_s=metrics.tokens_per_s)


def read_twice(path: Path, group: Path) -> None:
    """The other program: it reads a file twice, in the group."""
    script = (
        f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        f"for _ in range(2):\n    with open({str(path)!r}, 'rb', 0) as f:\n        while f.read({BLOCK}): pass"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def pressure(model: Path, weights: Path, group: Path, other: Path, *, lock: bool) -> dict[str, float]:
    """One answer in peace, one after the other program, one more."""
    evict(weights)
    running = Engine(model, group, lock=lock)
    try:
        running.ask()
        peace = running.ask()
        read_twice(other, group)
        after = running.ask()
        again = running.ask()
    finally:
        running.close()
        evict(other)
    return {
        "peace_ttft_ms": peace["ttft_ms"],
        "after_ttft_ms": after["ttft_ms"],
        "after_tokens_per_s": after["tokens_per_s"],
        "again_ttft_ms": again["ttft_ms"],
        "peace_tokens_per_s": peace["tokens_per_s"],
    }


def cold_start(model: Path, weights: Path, group: Path, *, read_ahead: bool) -> dict[str, float]:
    """Load a model of which nothing is in memory, and ask once."""
    evict(weights)
    running = Engine(model, group, read_ahead=read_ahead)
    try:
        return {"load_s": running.loaded["load_s"], "first_ttft_ms": running.ask()["ttft_ms"]}
    finally:
        running.close()


def show(title: str, rows: list[dict[str, float]]) -> None:
    """Median and range of each figure."""
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{title:14} {name:20} {statistics.median(values):10.2f}  ({min(values):.2f} to {max(values):.2f})")


@program
def main() -> None:
    """Measure both tables."""
    parser = argparse.ArgumentParser(description="the first token after memory was short, with and without a lock")
    parser.add_argument("model", type=Path, help="model directory with packed weights (relu2/)")
    parser.add_argument("--limit-gb", type=float, default=2.0, help="memory of the control group")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    check_counts(args, {"runs": 1})
    ModelDirectory.open(args.model)
    weights, limit = args.model / PACKED_FOLDER / MODEL_BIN, int(args.limit_gb * 1e9)
    if not weights.exists():
        raise ConfigError(f"{args.model} has no packed weights; run: ov-afm kernels {args.model}")
    with control_group(limit) as group, tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        other = Path(folder) / "other"
        with other.open("wb") as stream:  # holes read as zeros, and take memory like any other page
            stream.truncate(2 * limit)
        ways = {"unlocked": False, "locked": True}
        tables: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        starts: dict[str, list[dict[str, float]]] = {"read ahead": [], "on demand": []}
        for _ in range(args.runs):
            for name, lock in ways.items():
                tables[name].append(pressure(args.model, weights, group, other, lock=lock))
            for name, rows in starts.items():
                rows.append(cold_start(args.model, weights, group, read_ahead=name == "read ahead"))
    for table in (tables, starts):
        for name, rows in table.items():
            show(name, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        # What libraries print must not come between the answers.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        engine(sys.argv[2], json.loads(sys.argv[3]), answers)
    else:
        sys.exit(main())
