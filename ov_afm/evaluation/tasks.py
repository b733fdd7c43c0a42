"""Small tasks with an answer that a program can check: functions to write, sums to do.

The model answers each task once, greedily, through its chat template. A code task passes when its tests raise nothing
in a sandbox, a math task when the number that the answer ends with is the right one. A set of tasks is a JSONL file,
a packaged one or anyone's: `{"id", "kind": "code", "prompt", "tests"}` or `{"id", "kind": "math", "prompt", "answer"}`.
Answers are stored, so that an interrupted run continues.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..model_dir.model_directory import ModelDirectory
from ..pipeline import Pipeline
from ..runtime.sampling import Params
from ..system import console
from ..system.json_text import parse
from . import sandbox
from .cache import Journal, identity, key_of
from .divergence import Interval

__all__ = ["PACKAGED", "Result", "Task", "ask", "grade", "load_tasks", "run_tasks", "wilson"]

FOLDER = Path(__file__).parent.parent / "quantization" / "data"
PACKAGED = ("code", "math")
MAX_NEW_TOKENS = 384
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Of a normal distribution, for 95% on both sides.
Z = 1.959964


@dataclass(frozen=True, slots=True)
class Task:
    """One question.

    Attributes:
        id: Its name within its set.
        kind: How it is graded.
        prompt: The question.
        tests: Python source that raises when the answer is wrong; code only.
        answer: The right number; math only.
    """

    id: str
    kind: Literal["code", "math"]
    prompt: str
    tests: str = ""
    answer: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a model on a set of tasks.

    Attributes:
        tasks: Name of the set.
        correct: Tasks passed.
        total: Tasks in all.
        accuracy: Share passed, with Wilson's 95% interval.
        failures: Task id to what was wrong.
    """

    tasks: str
    correct: int
    total: int
    accuracy: Interval
    failures: dict[str, str]

    @property
    def share(self) -> str:
        """Tasks passed of all, with the interval."""
        low, high = self.accuracy.low, self.accuracy.high
        interval = "" if low is None or high is None else f" ({low:.0%}–{high:.0%})"
        return f"{self.correct} of {self.total}, {self.accuracy.value:.0%}{interval}"


# Whatever answers a prompt, greedily: a `Pipeline`, or a server.
Answerer = Callable[[str], str]


def load_tasks(name: str) -> tuple[str, list[Task]]:
    """A packaged set by name, or a `.jsonl` file; returns its name and its tasks.

    Raises:
        ConfigError: There is no such set, or a line of it is no task.
    """
    path = FOLDER / f"{name}.jsonl" if name in PACKAGED else Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"no tasks {name!r}: give {', '.join(PACKAGED)} or a readable .jsonl file", code="tasks-unknown"
        ) from error
    tasks = [_task(line, f"{path.name} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise ConfigError(f"{path.name} holds no tasks", code="tasks-unreadable")
    if len({task.id for task in tasks}) < len(tasks):
        raise ConfigError(f"{path.name} has two tasks of one id; give each its own", code="tasks-unreadable")
    return path.stem, tasks


def _task(line: str, where: str) -> Task:
    try:
        fields = parse(line)
        if fields["kind"] == "code":
            return Task(str(fields["id"]), "code", str(fields["prompt"]), tests=str(fields["tests"]))
        if fields["kind"] == "math":
            return Task(str(fields["id"]), "math", str(fields["prompt"]), answer=float(fields["answer"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where} is no task ({error!r}); it needs id, kind, prompt, and tests or answer", code="tasks-unreadable"
        ) from error
    raise ConfigError(f"{where}: kind must be code or math, found {fields['kind']!r}", code="tasks-unreadable")


def grade(task: Task, answer: str) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if task.kind == "code":
        blocks = CODE.findall(answer)
        # The last block that defines something: models like to show how their function is called in another one.
        program = next((block for block in reversed(blocks) if "def " in block), blocks[0] if blocks else answer)
        return sandbox.run(program, task.tests).reason
    _, marker, after = answer.rpartition("Answer:")
    numbers = NUMBER.findall(after) if marker else NUMBER.findall(answer)[-1:]
    if not numbers:
        return "no number in the answer"
    number = float(numbers[0].replace(",", ""))
    return "" if math.isclose(number, task.answer, rel_tol=1e-6) else f"{number:g} where {task.answer:g} is right"


def wilson(correct: int, total: int) -> Interval:
    """A share with its 95% score interval (Wilson 1927), which stays within 0 and 1 for few tasks."""
    share, spread = correct / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def run_tasks(
    model: str | Path, sets: Sequence[str], progress: console.Progress, *, load: Callable[[Path], Any] = Pipeline
) -> list[Result]:
    """Give a model directory sets of tasks, on CPU.

    Args:
        model: The model directory; not loaded if all its answers are stored.
        sets: Names or files, see `load_tasks`.
        progress: Where to draw progress.
        load: Makes the pipeline.

    Raises:
        ConfigError: A set cannot be read.
        OVAFMError: The model cannot be loaded.
    """
    folder = ModelDirectory.open(model).path
    loaded = [load_tasks(name) for name in sets]
    fingerprint = identity(folder, progress)
    results = []
    with ExitStack() as stack:

        @functools.cache
        def pipeline() -> Any:
            return stack.enter_context(closing(load(folder)))

        def answer(prompt: str) -> str:
            return str(pipeline().generate(prompt, Params(greedy=True, max_new_tokens=MAX_NEW_TOKENS)).text)

        for name, tasks in loaded:
            key = key_of(model=fingerprint, tasks=[asdict(task) for task in tasks], tokens=MAX_NEW_TOKENS)
            results.append(ask(name, tasks, answer, progress, Journal("answers", key)))
    return results


def ask(
    name: str, tasks: Sequence[Task], answerer: Answerer, progress: console.Progress, journal: Journal | None = None
) -> Result:
    """Give one set of tasks to a model.

    Args:
        name: Name of the set.
        tasks: Its tasks.
        answerer: The model.
        progress: Where to draw progress.
        journal: Answers that are known already; new ones are added.
    """
    failures = {}
    with progress.step(f"{name} tasks", total=len(tasks)) as advance:
        for task in tasks:
            answer = journal.entries.get(task.id) if journal else None
            if answer is None:
                answer = answerer(task.prompt)
                if journal:
                    journal.add(task.id, answer)
            if failure := grade(task, answer):
                failures[task.id] = failure
            advance(1)
    correct = len(tasks) - len(failures)
    return Result(name, correct, len(tasks), wilson(correct, len(tasks)), failures)
