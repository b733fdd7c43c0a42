"""`ov-afm export` beside `optimum-cli export openvino`: same checkpoint, same recipe, in turn.

ov-afm does more in that time (it compares tokenizer, template, weights and logits with the source, and
hashes source and result), so a ratio a little above 1.0 is expected; up to 1.15 is acceptable.

    ov-afm synth --geometry afm-4.5b --output synth
    python benchmarks/export.py synth --work-dir /big/disk --runs 2
    sudo python benchmarks/export.py synth --work-dir /big/disk --runs 1 --memory-gb 8 --only ov-afm

`--memory-gb` puts the export into a control group with that limit (Linux; root).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from program import check_counts, last_words, program

from ov_afm.errors import OVAFMError
from ov_afm.model_dir.model_directory import read_config

BIN = Path(sys.executable).parent
GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)


def commands(checkpoint: Path, output: Path) -> dict[str, list[str]]:
    """The two commands, each without its output directory's earlier content."""
    return {
        # Without the packed copy for the kernels, which optimum-cli does not make.
        "ov-afm": [
            *(str(BIN / "ov-afm"), "export", str(checkpoint), "--recipe", "int4", "--kernels", "none"),
            *("--output", str(output)),
        ],
        "optimum-cli": [
            *(str(BIN / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)),
            *("--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "128"),
            *("--ratio", "1.0", str(output)),
        ],
    }


def limited(memory_gb: float | None) -> Path | None:
    """A new control group with a memory limit; None without a limit."""
    if memory_gb is None:
        return None
    for root, limit in GROUPS:
        if (root / "cgroup.procs").exists() and (root / "memory.stat").exists():
            group = root / "ov_afm_benchmark"
            group.mkdir(exist_ok=True)
            (group / limit).write_text(str(int(memory_gb * 1e9)))
            return group
    raise OVAFMError("no memory control group can be made here; run as root on Linux")


def measure(command: list[str], output: Path, group: Path | None) -> dict[str, Any]:
    """Wall time, processor time and peak resident memory of one export."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    begun = time.perf_counter()
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=enter,
        env={**os.environ, "TMPDIR": str(output.parent)},
    )
    assert child.stderr is not None
    messages = child.stderr.read().decode("utf-8", "replace")
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begun
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise OVAFMError(f"{Path(command[0]).name} failed with status {code}: {last_words(messages)}")
    size = sum(path.stat().st_size for path in output.glob("openvino_model.bin"))
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "bin_gb": round(size / 1e9, 2),
    }


@program
def main() -> None:
    parser = argparse.ArgumentParser(description="ov-afm export beside optimum-cli export openvino")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for outputs and temporary files")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--memory-gb", type=float, help="memory limit of each export")
    parser.add_argument("--only", choices=["ov-afm", "optimum-cli"])
    args = parser.parse_args()
    check_counts(args, {"runs": 1, "memory_gb": 1})
    read_config(args.checkpoint)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    group = limited(args.memory_gb)
    output = args.work_dir / "export-benchmark"
    records: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.runs):
        for name, command in commands(args.checkpoint, output).items():
            if args.only in (None, name):
                records.setdefault(name, []).append(measure(command, output, group))
                print(json.dumps({"program": name, **records[name][-1]}), flush=True)
    shutil.rmtree(output, ignore_errors=True)
    if len(records) == 2:
        pairs = zip(records["ov-afm"], records["optimum-cli"], strict=True)
        ratios = [ours["wall_s"] / theirs["wall_s"] for ours, theirs in pairs]
        print(
            f"ov-afm / optimum-cli, wall: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; "
            f"median {statistics.median(ratios):.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
