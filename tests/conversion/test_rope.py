"""Rotary embeddings that would be exported wrongly, or that can be meant in two ways, are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from ov_afm.conversion.rope import check_rope
from ov_afm.errors import SourceError

THETA = {"rope_theta": 10000.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096}
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_parameters": None, "rope_scaling": {}},
        {**THETA, "rope_scaling": LINEAR},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "beta_fast": 32, "beta_slow": 1, "attention_factor": None, "finetuned": True}},
        {**THETA, "rope_scaling": LINEAR, "rope_parameters": {**THETA, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {**LINEAR, "rope_type": "linear"}, "partial_rotary_factor": 1.0},
    ],
)
def test_what_means_one_thing_is_taken(config: dict[str, Any]) -> None:
    check_rope(config, "model")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "kind dynamic"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "kind su"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "kind longrope"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "supported are default, linear, yarn, llama3"),
        ({"rope_parameters": {**YARN, "type": "linear"}}, "type linear and rope_type yarn"),
        ({"rope_scaling": LINEAR, "rope_parameters": YARN}, "contradict each other"),
        ({"rope_theta": 5e5, "rope_parameters": YARN}, "rope_theta 10000.0, and beside it is 500000.0"),
        ({"rope_scaling": [1]}, r"\[1\], where an object is needed"),
        ({"rope_parameters": {"full_attention": THETA}}, "each type of layer"),
        ({"rope_parameters": {**THETA, "factor": 8.0}}, "kind default has factor 8.0"),
        ({"rope_parameters": {**YARN, "factor": "20"}}, "factor '20', where a number is needed"),
        ({"rope_parameters": {**YARN, "factor": True}}, "where a number is needed"),
        ({"rope_parameters": {**YARN, "extrapolation_factor": 1.0}}, "extrapolation_factor 1.0, which would have no"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    ],
)
def test_what_would_be_wrong_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        check_rope(config, "model")
    assert caught.value.code == "rope-unsupported"
