"""Drafting changes speed, never the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ov_afm.pipeline import Pipeline, Use
from ov_afm.runtime.sampling import Params

PROMPTS = ["1 2 3 4 1 2 3 4 1 2 3", "The quick brown fox jumps over the lazy dog. The quick brown"]


@pytest.fixture(scope="session")
def plain_answers(tiny_model: Path) -> list[str]:
    return answers(tiny_model)


def answers(model: Path, **options: Any) -> list[str]:
    params = Params(max_new_tokens=64, greedy=True, ignore_eos=True, repetition_penalty=1.0)
    with Pipeline(model, use=Use(exact=True), **options) as pipeline:
        return [pipeline.generate(prompt, params, raw=True).text for prompt in PROMPTS]


def test_prompt_lookup_gives_the_same_greedy_tokens(tiny_model: Path, plain_answers: list[str]) -> None:
    assert answers(tiny_model, prompt_lookup=True) == plain_answers


@pytest.mark.slow
def test_draft_model_gives_the_same_greedy_tokens(
    tiny_model: Path, drafting_model: Path, plain_answers: list[str]
) -> None:
    assert answers(drafting_model) != plain_answers
    assert answers(tiny_model, draft_model=drafting_model) == plain_answers
