"""The plan: the shape that a target asks for, and refusals with figures."""

from __future__ import annotations

import pytest

from ov_afm.errors import ConfigError
from ov_afm.pruning.plan import parse_count, plan

AFM = {
    "architectures": ["ArceeForCausalLM"],
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 128_004,
    "max_position_embeddings": 65_536,
    "hidden_act": "relu2",
    "tie_word_embeddings": False,
}


def test_edge_size_is_reached_through_the_mlps_alone() -> None:
    found = plan(AFM, parse_count("2.8B"))
    assert found.geometry.layers == 36
    assert 8_400 <= found.geometry.intermediate <= 8_640
    assert found.geometry.intermediate % 64 == 0
    assert 2.78e9 < found.parameters <= 2.8e9
    assert found.reason == f"the MLPs alone: {found.geometry.intermediate} of 18432 neurons in each, all 36 layers"


def test_iot_size_takes_depth_and_width_and_says_why() -> None:
    found = plan(AFM, parse_count("1.2B"))
    assert found.geometry.layers < 36
    assert found.geometry.intermediate < 18432
    assert 1.1e9 < found.parameters <= 1.2e9
    assert found.reason.endswith("the MLPs alone would have to keep less than 40%")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5_000_000_000, "the model has 4.619 B parameters already, no more than the target of 5.000 B"),
        (700_000_000, "0.700 B parameters cannot be reached: embedding, head and the smallest layers have "),
    ],
)
def test_target_out_of_reach_is_refused_with_figures(target: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(AFM, target)
    assert str(caught.value).startswith(message)


def test_the_minimum_that_is_named_can_be_reached() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(AFM, 1_000_000)
    minimum = float(str(caught.value).split("layers have ")[1].split(" B")[0]) + 0.001
    assert plan(AFM, int(minimum * 1e9)).parameters <= minimum * 1e9


def test_rows_and_heads_that_go_leave_more_for_the_mlps() -> None:
    target = parse_count("2.8B")
    plain, found = plan(AFM, target), plan(AFM, target, vocab=100_004, kv_heads=2)
    # 28,000 rows in two matrices, and half of 36 layers' attention.
    freed = 2 * 28_000 * 2560 + 36 * 2560 * 128 * 2 * (10 + 2)
    assert found.geometry.intermediate - plain.geometry.intermediate == pytest.approx(freed / (36 * 2 * 2560), abs=64)
    assert found.parameters <= target
    assert found.reason == (
        "100004 of 128004 rows of the vocabulary; 2 of 4 KV heads and 10 of 20 query heads in each layer; "
        f"the MLPs alone: {found.geometry.intermediate} of 18432 neurons in each, all 36 layers"
    )


def test_target_that_rows_alone_reach_leaves_the_rest() -> None:
    found = plan(AFM, parse_count("4.5B"), vocab=90_004)
    assert (found.geometry.layers, found.geometry.intermediate, found.geometry.kv_heads) == (36, 18432, 4)
    assert found.reason == "90004 of 128004 rows of the vocabulary"
    assert not found.narrowed


def test_heads_that_transformers_would_refuse_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(AFM, kv_heads=3)
    assert str(caught.value) == (
        "3 KV heads leave 15 query heads, and transformers wants a number that divides the hidden size 2560; "
        "KV heads to keep may be 1, 2, 4"
    )


def test_heads_with_biases_are_refused() -> None:
    with pytest.raises(ConfigError, match="^KV heads are pruned in attention without biases; "):
        plan({**AFM, "attention_bias": True}, kv_heads=2)


@pytest.mark.parametrize("text", ["", "0", "-3B", "big", "2.8Bn"])
def test_target_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no number of parameters; give one such as 2.8B or 120M"):
        parse_count(text)
