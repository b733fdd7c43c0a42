"""Drafts from the prompt are as long as pays, by a replay of the lookup on the answer so far."""

from __future__ import annotations

import random

import pytest

from ov_afm.runtime.drafting import LENGTHS, LOOK, NGRAM, SEEN, Drafting


def lookup(ids: list[int], length: int) -> list[int]:
    """Prompt lookup as openvino-genai has it: the most of the last tokens that occurred before, there."""
    for size in range(min(NGRAM, len(ids) // 2), 0, -1):
        for start in range(len(ids) - size):
            if ids[start : start + size] == ids[-size:]:
                return ids[start + size : start + size + length]
    return []


def steps(prompt: list[int], answer: list[int], length: int) -> int:
    """Steps in which an engine would have made an answer."""
    ids, count = [*prompt], 0
    while len(ids) < len(prompt) + len(answer):
        rest = answer[len(ids) - len(prompt) :]
        draft = lookup(ids, length)
        accepted = next((i for i, token in enumerate(draft) if i >= len(rest) or token != rest[i]), len(draft))
        ids += rest[: accepted + 1]
        count += 1
    return count


def test_the_replay_takes_the_steps_that_the_engine_takes() -> None:
    random.seed(0)
    for _ in range(20):
        prompt, answer = ([random.randrange(6) for _ in range(count)] for count in (40, SEEN))
        drafting = Drafting(prompt, 1000)
        for token in answer:
            drafting.push(token)
        assert [drafting._steps(length, SEEN) for length in LENGTHS] == [steps(prompt, answer, k) for k in LENGTHS]


def test_drafts_grow_where_the_answer_quotes_and_shrink_where_it_ceases_to() -> None:
    prompt = list(range(1000, 1200))
    drafting = Drafting(prompt, 1000)
    assert drafting.length == LENGTHS[0]
    assert [drafting.push(token) for token in prompt[:LOOK]] == [False] * (LOOK - 1) + [True]
    assert drafting.length == LENGTHS[-1]
    new = range(SEEN)
    assert sum(drafting.push(token) for token in new) == 1
    assert drafting.length == LENGTHS[0]
    assert drafting.ids == [*prompt, *prompt[:LOOK], *new]
    assert drafting.left == 1000 - LOOK - SEEN


def test_new_text_keeps_the_shortest_drafts() -> None:
    drafting = Drafting(range(100), 1000)
    assert not any(drafting.push(token) for token in range(200, 400))
    assert drafting.length == LENGTHS[0]


@pytest.mark.parametrize("limit", [LOOK + 1, 2 * LOOK - 1])
def test_a_rest_too_short_to_pay_is_not_continued_anew(limit: int) -> None:
    prompt = list(range(200))
    drafting = Drafting(prompt, limit)
    assert not any(drafting.push(token) for token in prompt[:limit])


def test_costs_of_this_machine_decide_how_long_drafts_are() -> None:
    prompt = list(range(200))
    # Half of the drafts' second tokens are wrong.
    answer = [token if token % 2 else 500 + token for token in prompt]
    cheap, dear = (dict(zip(LENGTHS, costs, strict=True)) for costs in ((1.0, 0.1, 2.0, 2.0), (1.0, 1.5, 2.0, 2.0)))
    lengths = []
    for costs in (cheap, dear):
        drafting = Drafting(prompt, 1000, costs)
        for token in answer[:SEEN]:
            drafting.push(token)
        lengths.append(drafting.length)
    assert lengths == [LENGTHS[1], LENGTHS[0]]
