"""Kill exports at random moments, and look at what they leave: no half model under a final name, nobody's file touched.

`ov-afm export`, `export --force` over an older model, `compress`, `compress --force` and `kernels` run on a tiny
checkpoint. Each gets SIGKILL at a random moment: every second time only the command itself, whose child processes must
then end by themselves, otherwise all of them at once. After each kill:

- the final name is absent, or a model directory that verifies whole, by sha256;
- a model that was to be replaced is whole, under its own name or put aside, or the new one is there;
- the checkpoint, the compressed model's source, and other files in the folder, some with names like those of
  leftovers, have the same bytes;
- no process is left after a few seconds.

Now and then a command runs without a kill. It must work, and afterwards nothing but its result may be beside the
user's files: it takes away what the killed ones left.

    python benchmarks/kill_exports.py WORK_DIR --seconds 220     # in pieces: counts add up in WORK_DIR/kills.jsonl
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from program import check_counts, program

from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.model_dir.manifest import FILE_NAME, sha256
from ov_afm.model_dir.model_directory import PACKED_FOLDER, ModelDirectory

COMMAND = str(Path(sys.executable).with_name("ov-afm"))
TESTS = Path(__file__).parents[1] / "tests"
LIMIT_S = 180
# Time that child processes get to notice that the command was killed.
CHILDREN_S = 5.0
# Files of the user's beside the output, with names that a careless clean-up would take.
BYSTANDERS = (
    "notes.txt",
    ".model.partial",
    ".model.ov-afm.old.txt",
    "model.new/weights.bin",
    ".model.new.7.ov-afm.partial/weights.bin",
)


@dataclass(frozen=True)
class Act:
    """A command that is killed.

    Attributes:
        name: What the records call it.
        arguments: Its arguments.
        replaces: The output holds a whole model when it begins.
        packs: It packs a model in its place instead of making a new directory.
    """

    name: str
    arguments: tuple[str, ...]
    replaces: bool = False
    packs: bool = False


class Workspace:
    """A folder with a checkpoint, models to replace and to compress, and bystanders.

    Args:
        folder: Where all of it is; what an earlier run made is used again.

    Raises:
        ConfigError: Other things lie in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.records = folder / "kills.jsonl"
        self.checkpoint, self.models = folder / "checkpoint", folder / "models"
        self.older, self.output = folder / "older", self.models / "model"
        self.temporary = folder / "tmp"
        self.environment = {**os.environ, "OV_AFM_CACHE": str(folder / "cache"), "TMPDIR": str(self.temporary)}
        self.acts = (
            Act("export", ("export", str(self.checkpoint), "-o", str(self.output), "--kernels", "relu2")),
            Act(
                "export --force",
                ("export", str(self.checkpoint), "-o", str(self.output), "--recipe", "int4", "--force"),
                replaces=True,
            ),
            Act("compress", ("compress", str(self.older), "-o", str(self.output))),
            Act("compress --force", ("compress", str(self.older), "-o", str(self.output), "--force"), replaces=True),
            Act("kernels", ("kernels", str(self.output), "--threshold", "0.01"), replaces=True, packs=True),
        )
        if folder.exists() and not self.records.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds something else; give a new folder, for what is killed there is replaced")
        folder.mkdir(parents=True, exist_ok=True)
        self.records.touch()  # first, so that the folder is known as this program's
        self._prepare()
        self.bystanders = digests(self.checkpoint, self.older, *(self.models / name for name in BYSTANDERS))

    def _prepare(self) -> None:
        self.temporary.mkdir(exist_ok=True)
        self.models.mkdir(exist_ok=True)
        for name in BYSTANDERS:
            path = self.models / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"this is {name}, and the user's")
        if not self.checkpoint.exists():
            sys.path.insert(0, str(TESTS))
            from support import tiny

            tiny.write_arcee(self.checkpoint)
        if not (self.older / FILE_NAME).exists():
            arguments = ("export", str(self.checkpoint), "-o", str(self.older), "--recipe", "fp16", "--force")
            self.run(Act("prepare", arguments))
        self.packed = self.models.parent / "packed"
        if not (self.packed / FILE_NAME).exists():
            arguments = ("export", str(self.checkpoint), "-o", str(self.packed), "--kernels", "relu2", "--force")
            self.run(Act("prepare", arguments))

    def begin(self, act: Act) -> None:
        """What the act begins with: leftovers of earlier kills stay, the output is absent or a whole model."""
        if act.replaces or self.output.exists():
            shutil.rmtree(self.output, ignore_errors=True)
        if act.replaces:
            shutil.copytree(self.packed if act.packs else self.older, self.output)

    def start(self, act: Act) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [COMMAND, *act.arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )

    def run(self, act: Act) -> float:
        """Run a command to its end; returns the seconds that it took."""
        begun = time.monotonic()
        process = self.start(act)
        _, messages = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            sys.exit(f"{act.name} failed by itself: {messages.decode('utf-8', 'replace')[-2000:]}")
        return time.monotonic() - begun


def digests(*paths: Path) -> dict[str, str]:
    """sha256 of every file in some folders, and of files."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file): sha256(file) for file in files if file.is_file()}


def whole(path: Path) -> str:
    """Why a directory is no whole model; empty where it is."""
    try:
        model = ModelDirectory.open(path, hashes=True)
    except OVAFMError as error:
        return str(error)
    return "" if model.manifest is not None and model.manifest.files else "it has no manifest with files"


def kill(process: subprocess.Popen[bytes], *, children: bool) -> tuple[int, str]:
    """SIGKILL to a command, and to all of its children if told so.

    Returns:
        How many processes outlived it too long, and what the command printed.
    """
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGKILL)
    if children:
        for each in family:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
    _, alive = psutil.wait_procs(family, timeout=CHILDREN_S)
    for each in alive:
        each.kill()
    _, messages = process.communicate()
    return len(alive), messages.decode("utf-8", "replace")


def check(workspace: Workspace, act: Act) -> list[str]:
    """What is wrong after a kill."""
    output, problems = workspace.output, []
    aside = output.with_name(f".{output.name}.ov-afm.old")
    if output.exists():
        if problem := whole(output):
            problems.append(f"under the final name: {problem}")
    elif act.replaces:
        problem = whole(aside) if aside.exists() else "it is gone"
        if problem:
            problems.append(f"the model that was to be replaced: {problem}")
    now = digests(workspace.checkpoint, workspace.older, *(workspace.models / name for name in BYSTANDERS))
    problems += [f"changed or gone: {path}" for path, digest in workspace.bystanders.items() if now.get(path) != digest]
    problems += [f"new beside the user's files: {path}" for path in now.keys() - workspace.bystanders.keys()]
    return problems


def strangers(workspace: Workspace, act: Act) -> list[str]:
    """What lies beside the results and the user's files: in the model, and where the act makes a model, around it."""
    expected = {workspace.output.name, *(name.partition("/")[0] for name in BYSTANDERS)}
    found = [path.name for path in workspace.models.iterdir() if path.name not in expected and not act.packs]
    if workspace.output.is_dir():
        found += [path.name for path in workspace.output.iterdir() if path.name[0] == "."]
    return found


def one(workspace: Workspace, act: Act, lasts_s: float, chance: random.Random) -> dict[str, Any]:
    """Start a command, kill it at a random moment, and look."""
    workspace.begin(act)
    moment = chance.uniform(0.0, lasts_s)
    children = chance.random() < 0.5
    process = workspace.start(act)
    try:
        process.wait(moment)
        ended = True
    except subprocess.TimeoutExpired:
        ended = False
    outlived, messages = kill(process, children=children)
    if ended and process.returncode:
        sys.exit(f"{act.name} failed by itself: {messages[-2000:]}")
    packed = (workspace.output / PACKED_FOLDER).exists()
    return {
        "act": act.name,
        "at_s": round(moment, 2),
        "of_s": round(lasts_s, 1),
        "killed": "everything" if children else "the command",
        "ended_before": ended,
        "status": process.returncode,
        "final": workspace.output.exists(),
        "packed": packed,
        "leftovers": len(strangers(workspace, act)),
        "outlived": outlived,
        "problems": check(workspace, act),
    }


def clean(workspace: Workspace, act: Act) -> dict[str, Any]:
    """Run a command to its end after kills: it must work, and take the leftovers away."""
    workspace.begin(act)
    seconds = workspace.run(act)
    problems = check(workspace, act) + [f"still there: {name}" for name in strangers(workspace, act)]
    return {"act": act.name, "clean": True, "of_s": round(seconds, 1), "problems": problems}


def tell(path: Path, show: Callable[[str], object] = print) -> int:
    """Counts over all pieces; returns how many problems there are."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kills = [each for each in records if not each.get("clean") and not each["ended_before"]]
    for name, count in sorted(collections.Counter(each["act"] for each in kills).items()):
        own = [each for each in kills if each["act"] == name]
        left = sum(each["leftovers"] > 0 for each in own)
        late = sum(each["outlived"] for each in own)
        show(f"{name}: {count} kills, leftovers after {left}, processes that outlived {CHILDREN_S:g} s: {late}")
    ended = sum(bool(each.get("ended_before")) for each in records)
    cleaned = sum(bool(each.get("clean")) for each in records)
    problems = [f"{each['act']} at {each.get('at_s')} s: {problem}" for each in records for problem in each["problems"]]
    show(f"{len(kills)} kills; {ended} ended before theirs; {cleaned} runs to the end; {len(problems)} problems")
    for problem in problems:
        show(f"  {problem}")
    return len(problems)


@program
def main() -> int:
    """Kill until enough are counted or the time is over, and tell what was left."""
    parser = argparse.ArgumentParser(description="kill exports at random moments and look at what they leave")
    parser.add_argument("work_dir", type=Path, help="folder of the experiment; nothing else may be in it")
    parser.add_argument("--kills", type=int, default=200, help="kills in all, those in WORK_DIR/kills.jsonl included")
    parser.add_argument("--seconds", type=float, default=220, help="end this piece after that long")
    parser.add_argument("--seed", type=int, help="of the moments (default: the number of kills so far)")
    args = parser.parse_args()
    check_counts(args, {"kills": 1, "seconds": 1})
    begun = time.monotonic()
    workspace = Workspace(args.work_dir.resolve())
    earlier = workspace.records.read_text(encoding="utf-8").splitlines() if workspace.records.exists() else []
    chance = random.Random(len(earlier) if args.seed is None else args.seed)
    # Each act's own length, as the last run without a kill measured it.
    lasts = {each["act"]: each["of_s"] for each in map(json.loads, earlier) if each.get("clean")}
    done = sum(not each.get("clean") and not each["ended_before"] for each in map(json.loads, earlier))

    def note(record: dict[str, Any]) -> None:
        with workspace.records.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    turn = len(earlier)
    while done < args.kills and time.monotonic() - begun < args.seconds:
        act = workspace.acts[turn % len(workspace.acts)]
        turn += 1
        if act.name not in lasts or chance.random() < 0.05:
            record = clean(workspace, act)
            lasts[act.name] = record["of_s"]
        else:
            record = one(workspace, act, lasts[act.name], chance)
            done += not record["ended_before"]
        note(record)
    return 1 if tell(workspace.records) else 0


if __name__ == "__main__":
    sys.exit(main())
