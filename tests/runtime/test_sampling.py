"""Sampling values are refused by name before the engine sees them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ov_afm.errors import ConfigError
from ov_afm.runtime.sampling import DEFAULT_MAX_NEW_TOKENS, Params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", 1.0),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", "###"),
    ],
)
def test_bad_value_is_refused_naming_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be .*, found " + re.escape(repr(value))):
        Params(**{field: value})


def config() -> Any:
    import openvino_genai

    defaults = openvino_genai.GenerationConfig()
    defaults.temperature, defaults.top_k, defaults.do_sample = 0.5, 50, True
    return defaults


def test_what_is_not_given_comes_from_the_model() -> None:
    applied = Params().apply(config())
    assert (applied.do_sample, applied.temperature, applied.top_k) == (True, 0.5, 50)
    assert applied.max_new_tokens == DEFAULT_MAX_NEW_TOKENS


def test_a_least_length_of_the_model_gives_way_to_the_limit_of_the_request() -> None:
    defaults = config()
    defaults.min_new_tokens = 100
    applied = Params(max_new_tokens=2).apply(defaults)
    assert (applied.min_new_tokens, applied.max_new_tokens) == (2, 2)
    applied.validate()


@pytest.mark.parametrize("params", [Params(greedy=True), Params(temperature=0), Params(greedy=True, temperature=1.0)])
def test_greedy_wins_over_sampling(params: Params) -> None:
    assert params.apply(config()).is_greedy_decoding()


def test_a_sampling_value_turns_sampling_on() -> None:
    defaults = config()
    defaults.do_sample = False
    assert Params(top_p=0.9).apply(defaults).do_sample


def test_top_k_zero_keeps_all() -> None:
    assert Params(top_k=0).apply(config()).top_k > 2**31


def test_answer_is_limited_to_the_room_in_the_context() -> None:
    assert Params(max_new_tokens=100).apply(config(), room=7).max_new_tokens == 7
