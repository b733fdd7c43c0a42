"""What `generation_config.json` may hold, and what an engine is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ov_afm.errors import SourceError
from ov_afm.runtime.generation_config import FILE_NAME, default_config, eos_ids, is_greedy, not_used, read


def write(folder: Path, fields: Any) -> Path:
    (folder / FILE_NAME).write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"eos"', '{"temperature": NaN}', "\ufeff{}"], ids=repr)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    for use in (read, default_config):
        with pytest.raises(SourceError) as caught:
            use(write(tmp_path, text))
        assert caught.value.code == "generation-config-unreadable"
        assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff")
    with pytest.raises(SourceError) as caught:
        read(tmp_path)
    assert caught.value.code == "generation-config-unreadable"


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": "2"},
        {"eos_token_id": ["</s>"]},
        {"eos_token_id": [[2]]},
        {"eos_token_id": True},
        {"eos_token_id": 2.5},
        {"eos_token_id": {"id": 2}},
        {"eos_token_id": 10**20},
        {"eos_token_id": -2},
        {"pad_token_id": "<pad>"},
        {"bos_token_id": [1]},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_k": 10**20},
        {"do_sample": "yes"},
        {"do_sample": 1},
        {"repetition_penalty": [1.1]},
        {"max_new_tokens": "64"},
        {"stop_strings": [1]},
        {"stop_strings": [""]},
        {"stop_strings": {"a": 1}},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_naming_field_and_value(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(SourceError) as caught:
        read(write(tmp_path, fields))
    ((name, value),) = fields.items()
    assert caught.value.code == "generation-config-invalid"
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": True, "temperature": -1.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"max_new_tokens": 0},
        {"max_new_tokens": -5},
    ],
    ids=str,
)
def test_a_value_outside_its_range_is_refused_before_the_engine_sees_it(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(SourceError) as caught:
        default_config(write(tmp_path, fields))
    assert caught.value.code == "generation-config-invalid"


@pytest.mark.parametrize(
    ("value", "ids"), [(None, []), (2, [2]), ([2, 5, 2], [2, 5]), ([], []), (-1, []), ([-1, 3], [3])]
)
def test_ends_of_an_answer_are_one_token_or_several(tmp_path: Path, value: Any, ids: list[int]) -> None:
    folder = write(tmp_path, {"eos_token_id": value})
    assert eos_ids(read(folder)) == ids
    assert default_config(folder).stop_token_ids == set(ids)


def sampled(folder: Path) -> tuple[Any, ...]:
    config = default_config(folder)
    config.max_new_tokens = 5
    config.validate()
    return config.do_sample, config.temperature, config.top_k, config.top_p


UNLIMITED = 2**64 - 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (False, 1.0, UNLIMITED, 1.0)),
        # What transformers calls invalid and reports without using the file.
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, (False, 0.6, UNLIMITED, 0.9)),
        ({"top_p": 0.9}, (False, 1.0, UNLIMITED, 0.9)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, (True, 0.6, 20, 1.0)),
        ({"do_sample": True, "temperature": 1, "top_p": 1}, (True, 1.0, UNLIMITED, 1.0)),
        # Greedy by another name.
        ({"do_sample": True, "temperature": 0.0}, (False, 1.0, UNLIMITED, 1.0)),
        ({"do_sample": True, "top_p": 0}, (False, 1.0, UNLIMITED, 1.0)),
        # All tokens, in transformers and in vLLM.
        ({"do_sample": True, "top_k": 0}, (True, 1.0, UNLIMITED, 1.0)),
        ({"do_sample": True, "top_k": -1}, (True, 1.0, UNLIMITED, 1.0)),
        ({"do_sample": None, "temperature": None, "top_k": None}, (False, 1.0, UNLIMITED, 1.0)),
    ],
    ids=str,
)
def test_the_engine_is_told_what_the_file_means(tmp_path: Path, fields: Any, expected: tuple[Any, ...]) -> None:
    assert sampled(write(tmp_path, fields)) == pytest.approx(expected)


def test_limits_and_stop_strings_come_from_the_file(tmp_path: Path) -> None:
    fields = {"max_new_tokens": 64, "min_new_tokens": 3, "stop_strings": "###", "repetition_penalty": 1.3}
    config = default_config(write(tmp_path, fields))
    assert (config.max_new_tokens, config.min_new_tokens, config.stop_strings) == (64, 3, {"###"})
    assert config.repetition_penalty == pytest.approx(1.3)
    assert default_config(write(tmp_path, {"stop_strings": ["a", "b"]})).stop_strings == {"a", "b"}


def test_settings_for_drafting_or_beams_do_not_reach_the_engine(tmp_path: Path) -> None:
    fields = {"num_beams": 4, "assistant_confidence_threshold": 0.4, "num_assistant_tokens": 20, "ignore_eos": True}
    config = default_config(write(tmp_path, fields))
    assert (config.num_beams, config.assistant_confidence_threshold, config.ignore_eos) == (1, 0.0, False)


def test_fields_that_change_answers_and_are_not_used_are_named() -> None:
    assert not_used({"num_beams": 4, "typical_p": 1.0, "bad_words_ids": [[5]], "temperature": 0.3}) == [
        "num_beams",
        "bad_words_ids",
    ]
    assert not_used({"num_beams": 1, "transformers_version": "5"}) == []


def test_a_model_without_the_file_has_no_fields(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    assert default_config(tmp_path).stop_token_ids == set()


def test_greedy_is_what_the_file_says_in_so_many_words() -> None:
    assert [is_greedy(fields) for fields in ({"do_sample": False}, {"temperature": 0.0}, {"top_p": 0})] == [True] * 3
    assert not is_greedy({})
    assert not is_greedy({"do_sample": True, "temperature": 0.5})
