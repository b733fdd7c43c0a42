"""Tasks are graded by what programs do and by the number that an answer ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ov_afm.errors import ConfigError
from ov_afm.evaluation.tasks import MAX_NEW_TOKENS, Result, Task, grade, load_tasks, run_tasks, wilson
from ov_afm.system.console import Progress

SUM = Task("sum", "math", "What is 40 + 2?", answer=42.0)


@pytest.mark.parametrize(
    "answer", ["42", "Answer: 42", "40 + 2 is easy.\nAnswer: 42.", "It is 7 + 35 = 42", "Answer: 42.0 (not 43)"]
)
def test_right_number_is_found(answer: str) -> None:
    assert grade(SUM, answer) == ""


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("", "no number in the answer"),
        ("Answer: I do not know, 42 was never mine", ""),
        ("42, or rather 41", "41 where 42 is right"),
        ("Answer: 1,042", "1042 where 42 is right"),
        ("Answer: none", "no number in the answer"),
    ],
)
def test_wrong_number_is_told(answer: str, failure: str) -> None:
    assert grade(SUM, answer) == failure


@pytest.mark.parametrize(
    "answer",
    [
        "def f(x):\n    return 2 * x",
        "Sure!\n```python\ndef f(x):\n    return 2 * x\n```\nThat is all.",
        "```\ndef f(x):\n    return 2 * x\n```\n```python\nprint(f(1))\n```",
        "```python\ndef f(x):\n    return 2 * x",
    ],
    ids=["bare", "block", "with-call", "cut-off"],
)
def test_function_is_found_in_an_answer(answer: str) -> None:
    assert grade(Task("f", "code", "", tests="assert f(3) == 6"), answer) == ""


def test_wilson_interval_stays_within_bounds() -> None:
    none, all_right, half = wilson(0, 20), wilson(20, 20), wilson(10, 20)
    assert none.low == 0.0
    assert none.high == pytest.approx(0.1611, abs=1e-4)
    assert all_right.high == 1.0
    assert (half.low, half.high) == (pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4))


@pytest.mark.parametrize("name", ["code", "math"])
def test_packaged_tasks_are_well_formed(name: str) -> None:
    found, tasks = load_tasks(name)
    assert found == name
    assert len(tasks) >= 20
    assert {task.kind for task in tasks} == {name}


SOLUTIONS = {
    "add_squares": "def sum_of_squares(n):\n    return sum(x * x for x in n)",
    "change": (
        "def fewest_coins(amount, coins):\n    best = [0] + [None] * amount\n    for a in range(1, amount + 1):\n"
        "        found = [best[a - c] + 1 for c in coins if c <= a and best[a - c] is not None]\n"
        "        best[a] = min(found) if found else None\n    return -1 if best[amount] is None else best[amount]"
    ),
    "roman": (
        "def roman(n):\n    out = ''\n    for v, s in zip((1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),\n"
        "            'M CM D CD C XC L XL X IX V IV I'.split()):\n        out += s * (n // v)\n        n %= v\n"
        "    return out"
    ),
}


def test_packaged_code_tasks_accept_right_programs_and_no_empty_ones() -> None:
    tasks = {task.id: task for task in load_tasks("code")[1]}
    for name in ("add_squares", "change", "roman"):
        assert grade(tasks[name], SOLUTIONS[name]) == ""
        assert grade(tasks[name], "pass") != ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "t.jsonl line 2 is no task (JSONDecodeError('Expecting value: line 1 column 1 (char 0)'))"),
        ('{"id": "b", "kind": "math", "prompt": "x"}', "t.jsonl line 2 is no task (KeyError('answer'))"),
        ('{"id": "b", "kind": "essay", "prompt": "x"}', "t.jsonl line 2: kind must be code or math, found 'essay'"),
        ('{"id": "a", "kind": "math", "prompt": "x", "answer": 1}', "t.jsonl has two tasks of one id"),
    ],
)
def test_file_that_holds_no_tasks_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "a", "kind": "math", "prompt": "1", "answer": 1}\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_tasks(str(path))
    assert caught.value.code == "tasks-unreadable"
    assert str(caught.value).startswith(said)


def test_unknown_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tasks 'physics': give code, math or a readable .jsonl file") as caught:
        load_tasks("physics")
    assert caught.value.code == "tasks-unknown"


class Scripted:
    """Stands in for a pipeline: answers from a list, and can be interrupted."""

    def __init__(self, answers: list[str]) -> None:
        self.answers, self.asked, self.closed = answers, 0, False

    def generate(self, prompt: str, params: Any) -> Any:
        """The next answer."""
        assert params.greedy
        assert params.max_new_tokens == MAX_NEW_TOKENS
        if self.asked == len(self.answers):
            raise KeyboardInterrupt
        self.asked += 1
        return type("Completion", (), {"text": self.answers[self.asked - 1]})

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def asked(model: Path, path: Path, pipeline: Scripted | None) -> Result:
    with Progress() as progress:
        return run_tasks(model, [str(path)], progress, load=lambda _: pipeline)[0]


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"id": str(n), "kind": "math", "prompt": f"{n} + 1?", "answer": n + 1} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_interrupted_tasks_go_on_and_finished_ones_load_nothing(tiny_model: Path, sums: Path) -> None:
    first = Scripted(["1", "7"])
    with pytest.raises(KeyboardInterrupt):
        asked(tiny_model, sums, first)
    assert first.closed
    second = Scripted(["3", "4"])
    found = asked(tiny_model, sums, second)
    assert second.asked == 2
    assert (found.tasks, found.correct, found.total) == ("sums", 3, 4)
    assert found.failures == {"1": "7 where 2 is right"}
    assert asked(tiny_model, sums, None) == found


@pytest.mark.slow
def test_real_pipeline_is_asked(tiny_model: Path, sums: Path) -> None:
    with Progress() as progress:
        found = run_tasks(tiny_model, [str(sums)], progress)[0]
    assert found.total == 4
    assert found.accuracy.high is not None
