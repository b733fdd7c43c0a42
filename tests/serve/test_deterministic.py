"""What makes answers repeatable, and prompts that survive a restart, over HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.serving import Server, server

from ov_afm.cli import serve

WORDS = ("dragon", "river", "robot")
# Some longer than a block of the KV cache, and one than a piece of a prompt.
PROMPTS = [
    f"Write about a {word} and tell what happens next, in detail. " * (3 * number + 1)
    for number, word in enumerate(WORDS)
]


def answer(running: Server, number: int) -> str:
    reply = running.chat(PROMPTS[number], temperature=1.0, seed=number, max_tokens=24)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def answers(running: Server, together: int, rounds: int = 1) -> list[list[str]]:
    """The answers to all prompts, so many requests at once."""
    numbers = [*range(len(PROMPTS))] * rounds
    with ThreadPoolExecutor(together) as threads:
        found = list(threads.map(lambda number: answer(running, number), numbers))
    return [list(batch) for batch in itertools.zip_longest(*[iter(found)] * len(PROMPTS))]


@pytest.fixture(scope="module")
def deterministic(smollm2_model: Path) -> Iterator[Server]:
    with server(smollm2_model, "--deterministic") as running:
        yield running


@pytest.mark.slow
def test_same_seed_gives_the_same_text_alone_and_at_once_cold_and_warm(deterministic: Server) -> None:
    (cold,) = answers(deterministic, 1)
    assert answers(deterministic, 1) == [cold]
    assert answers(deterministic, 6, rounds=3) == [cold] * 3


@pytest.mark.slow
def test_a_request_that_was_given_up_changes_nothing(deterministic: Server) -> None:
    (before,) = answers(deterministic, 1)
    messages = [{"role": "user", "content": PROMPTS[2]}]
    deterministic.connection("/v1/chat/completions", messages=messages, max_tokens=200).close()
    assert answers(deterministic, 1) == [before]


@pytest.mark.slow
def test_several_answers_are_those_of_their_seeds(deterministic: Server) -> None:
    reply = deterministic.chat(PROMPTS[0], temperature=1.0, seed=10, max_tokens=16, n=2).json()
    alone = [deterministic.chat(PROMPTS[0], temperature=1.0, seed=seed, max_tokens=16).json() for seed in (10, 11)]
    texts = [choice["message"]["content"] for choice in sorted(reply["choices"], key=lambda each: each["index"])]
    assert texts == [each["choices"][0]["message"]["content"] for each in alone]


@pytest.mark.slow
def test_prompts_are_used_after_a_restart_and_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    content = " ".join(f"Paris {number}: the quick fox, the lazy dog." for number in range(30))
    sampling = {"temperature": 1.0, "seed": 3, "max_tokens": 16}
    with server(tiny_model, "--prompt-cache", tmp_path, "--prompt-cache-gb", "1") as running:
        first = running.chat(content, **sampling).json()["choices"]
        assert running.chat(content, **sampling).json()["choices"] == first
        (file,) = tmp_path.glob("*.kv")
    used = file.stat().st_mtime_ns
    with server(tiny_model, "--prompt-cache", tmp_path) as running:
        assert running.chat(content, **sampling).json()["choices"] == first
        shaped = running.chat(content, response_format={"type": "json_object"}, max_tokens=60)
        assert shaped.json()["choices"][0]["message"]["content"].startswith("{")
    assert file.stat().st_mtime_ns > used


@pytest.mark.parametrize(
    "options",
    [
        ["--deterministic", "--max-running", "4"],
        ["--prompt-cache", "prompts", "--max-running", "2"],
        ["--prompt-cache", "prompts", "--cache-size-gb", "1"],
        ["--prompt-cache", "prompts", "--device", "NPU-EMULATED"],
        ["--prompt-cache", "prompts", "--prompt-cache-gb", "0"],
        ["--prompt-cache-gb", "1"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_refused(
    tiny_model: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main([str(tiny_model), *options]) == 1
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert options[-2] in message or "prompt cache" in message
