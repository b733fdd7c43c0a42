"""Options that several commands share: what is given reaches the library as typed values, the rest is left out."""

from __future__ import annotations

import argparse

import pytest

from ov_afm.cli import options
from ov_afm.errors import ConfigError
from ov_afm.runtime.sampling import Params


def parsed(*words: str) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser()
    options.add_sampling_options(parser)
    options.add_load_options(parser)
    return parser.parse_args(words), parser


def test_sampling_options_that_are_not_given_stay_with_the_model() -> None:
    assert options.sampling(parsed()[0]) == Params()
    chosen = options.sampling(parsed("--temperature", "0.5", "--stop", "a", "--stop", "b", "--greedy")[0])
    assert chosen == Params(temperature=0.5, stop=("a", "b"), greedy=True)


def test_load_options_become_arguments_of_the_pipeline() -> None:
    given = options.pipeline_options(
        *parsed("--threads", "2", "--kv-cache", "f16", "--ov-config", "A=1", "--adapter", "x")
    )
    assert (given["use"].threads, given["use"].kv_cache, given["use"].prefix_caching) == (2, "f16", None)
    assert (given["A"], given["adapters"], given["prompt_lookup"], given["draft_model"]) == (1, ["x"], False, None)


def test_properties_are_json_or_text_and_the_last_one_counts() -> None:
    entries = ["A=1", "B=f32", "C=[1, 2]", "D=", "A=true", "E=x=y"]
    assert options.ov_properties(entries) == {"A": True, "B": "f32", "C": [1, 2], "D": "", "E": "x=y"}


@pytest.mark.parametrize("entry", ["A", "=1", ""])
def test_a_property_of_another_form_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.ov_properties([entry])
    assert str(caught.value) == f"--ov-config takes KEY=VALUE, found {entry!r}"
    assert caught.value.code == "key-value"


@pytest.mark.parametrize(
    ("entries", "code"),
    [(["A"], "key-value"), (["A="], "key-value"), (["=B"], "key-value"), (["A=1", "A=2"], "key-twice")],
)
def test_pairs_are_whole_and_their_keys_differ(entries: list[str], code: str) -> None:
    assert options.key_values(["A=1", "B=x=y"], "--model") == {"A": "1", "B": "x=y"}
    with pytest.raises(ConfigError) as caught:
        options.key_values(entries, "--model")
    assert caught.value.code == code
    assert "--model" in str(caught.value)
