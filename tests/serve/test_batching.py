"""Requests that exceed the KV cache together, and what others leave in it: every answer is the one given alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openvino_genai
import pytest
from support.exact import EXACT

from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime.detokenize import TextAssembler
from ov_afm.serve.batching import BatchingEngine, Job
from ov_afm.serve.cache_room import CacheRoom
from ov_afm.serve.messages import EngineSpec

Answers = dict[int, list[int]]


class Batch:
    """An engine in this process, with a cache of about 1,200 tokens."""

    def __init__(self, model: Path, cache_tokens: int = 1200) -> None:
        size_gb = cache_tokens * ModelDirectory.open(model).geometry.kv_values_per_token * 4 / 1e9
        self.engine = BatchingEngine(EngineSpec(model, cache_size_gb=size_gb, kv_cache="f32", ov_config=EXACT))
        self.context = self.engine.session.context_length
        self.ends: dict[int, str] = {}
        self.answers: Answers = {}
        self._number = 0

    def add(self, prompt: Sequence[int], new_tokens: int = 8, change: Callable[[Any], None] = lambda _: None) -> int:
        """Hand over a request; its answer's tokens are collected."""
        self._number += 1
        number, config = self._number, self.engine.session.greedy_config(new_tokens)
        change(config)
        answer = self.answers[number] = []

        class Collect(TextAssembler):
            def push(self, token: int) -> str:
                answer.append(token)
                return ""

        self.engine.add(Job(number, list(prompt), config, Collect(lambda _: "", {}, ())))
        return number

    def run(self, steps: int | None = None) -> None:
        """Step until nothing is left, or so many times."""
        while self.engine.busy and steps != 0:
            for piece in self.engine.step():
                if piece.end:
                    self.ends[piece.id] = piece.end
            steps = None if steps is None else steps - 1

    def alone(self, prompt: Sequence[int], new_tokens: int = 8, change: Callable[[Any], None] = lambda _: None) -> Any:
        """The answer to a prompt that has the engine to itself."""
        number = self.add(prompt, new_tokens, change)
        self.run()
        assert self.ends[number] in ("length", "stop")
        return self.answers[number]


Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Batch:
    """An engine that has one request at a time."""
    return Batch(tiny_model)


@pytest.fixture(scope="module")
def batch(tiny_model: Path) -> Batch:
    """An engine that has many."""
    return Batch(tiny_model)


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(100, 250) for _ in range(length)]


def plain(config: Any) -> None:
    pass


def sampled(config: Any) -> None:
    config.do_sample, config.temperature, config.top_p, config.rng_seed = True, 1.5, 1.0, 7


def penalized(config: Any) -> None:
    config.presence_penalty, config.frequency_penalty = 1.0, 0.5


def structured(config: Any) -> None:
    config.structured_output_config = openvino_genai.StructuredOutputConfig(regex="[a-z ]+")


def same_as_alone(batch: Batch, reference: Batch, requests: Sequence[tuple[list[int], int, Change]]) -> None:
    """Requests at once get the answers that each gets alone."""
    numbers = [batch.add(*each) for each in requests]
    batch.run()
    for number, each in zip(numbers, requests, strict=True):
        assert batch.ends[number] in ("length", "stop")
        assert batch.answers[number] == reference.alone(*each)


def test_cached_prompts_that_exceed_the_cache_together_are_all_answered(batch: Batch, reference: Batch) -> None:
    prompts = [prompt_of(batch.context * 6 // 10, seed) for seed in range(3)]
    for prompt in prompts:
        batch.alone(prompt)
    uncached = prompt_of(batch.context // 2, 3)
    for _ in range(3):
        same_as_alone(batch, reference, [(prompt, 8, plain) for prompt in [*prompts, uncached]])


def test_answers_that_fill_the_cache_beside_a_shared_prompt_are_complete(batch: Batch, reference: Batch) -> None:
    shared = prompt_of(batch.context // 2, 10)
    same_as_alone(batch, reference, [(shared + prompt_of(5, 20 + i), 300, plain) for i in range(4)])


def test_prompt_that_was_cancelled_leaves_nothing_wrong_in_the_cache(batch: Batch, reference: Batch) -> None:
    for seed in range(8):
        prompt = prompt_of(700, 100 + seed)
        other = batch.add(prompt_of(10, 200 + seed), 60)
        batch.run(3)
        cancelled = batch.add(prompt)
        batch.run(2)
        batch.engine.cancel(cancelled)
        batch.run(1)
        assert batch.alone(prompt) == reference.alone(prompt)
        assert not batch.answers[cancelled]
        assert len(batch.answers[other]) == 60


def mixture(batch: Batch, seed: int) -> list[tuple[list[int], int, Change]]:
    """Requests of all kinds, which do not fit together."""
    source = random.Random(seed)
    shared = prompt_of(400, seed)
    requests: list[tuple[list[int], int, Change]] = []
    for _ in range(12):
        new = prompt_of(source.choice([5, 40, 300, 900]), source.randrange(30))
        prompt = source.choice([new, shared + new[: batch.context - 450]])[: batch.context - 8]
        new_tokens = min(source.choice([1, 8, 60, 400]), batch.context - len(prompt))
        requests.append((prompt, new_tokens, source.choice([plain, sampled, penalized, structured])))
    return requests


@pytest.mark.parametrize("seed", range(4))
def test_mixtures_get_the_answers_that_each_request_gets_alone(batch: Batch, reference: Batch, seed: int) -> None:
    same_as_alone(batch, reference, mixture(batch, seed))


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_the_engine_ends_for_want_of_room_go_on_where_they_were(
    batch: Batch, reference: Batch, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # Everything seems to fit.
    monkeypatch.setattr(CacheRoom, "used", -(10**6))
    same_as_alone(batch, reference, mixture(batch, seed))


def test_requests_cancelled_at_any_time_leave_the_others_and_the_cache_alone(batch: Batch, reference: Batch) -> None:
    for seed in range(4):
        source = random.Random(seed)
        kept: list[tuple[int, tuple[list[int], int, Change]]] = []
        for index, request in enumerate(mixture(batch, seed)):
            number = batch.add(*request)
            batch.run(source.randrange(6))
            if index % 3:
                batch.engine.cancel(number)
            else:
                kept.append((number, request))
        batch.run()
        for number, request in kept:
            assert batch.answers[number] == reference.alone(*request)
        batch.alone(prompt_of(5, seed))
        # The one block that this needed.
        assert batch.engine.cache_usage() < 0.05


def test_room_counts_a_shared_prompt_once_and_one_that_is_not_computed_twice() -> None:
    room = CacheRoom(10, 4)
    names = room.names(range(10))
    assert (len(names), room.count(10), room.missing(names)) == (2, 3, 2)
    room.take(1, names)
    room.take(2, names)
    assert room.used == 4
    room.give_back(2)
    room.share(1)
    assert room.missing(room.names([*range(8), 0, 0, 0, 0])) == 1
    room.take(3, names)
    assert room.used == 2
    room.give_back(1)
    assert room.used == 2
    room.give_back(3)
    room.give_back(3)
    assert (room.used, room.missing(names)) == (0, 2)


def test_what_was_not_used_for_the_longest_time_is_expected_to_be_overwritten() -> None:
    room = CacheRoom(3, 4)
    old, new = room.names(range(8)), room.names(range(100, 108))
    room.remember(old)
    assert room.cached_tokens(old) == 8
    room.remember(new)
    assert (room.cached_tokens(new), room.cached_tokens(old)) == (8, 0)
    assert room.cached_tokens(room.names([*range(100, 104), 0, 0, 0, 0])) == 4
