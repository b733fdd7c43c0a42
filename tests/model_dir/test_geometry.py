"""The shape of a decoder from its configuration, and the sizes that follow from it."""

from __future__ import annotations

from typing import Any

import pytest

from ov_afm.errors import ConfigError
from ov_afm.model_dir.geometry import Geometry

AFM: dict[str, Any] = {
    "architectures": ["ArceeForCausalLM"],
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 128004,
    "max_position_embeddings": 65536,
    "hidden_act": "relu2",
}


def test_sizes_of_afm() -> None:
    shape = Geometry.from_config(AFM)
    assert (
        shape.parameters(tied=False) == 2 * 128004 * 2560 + 36 * (2560 * 128 * 48 + 2 * 2560 * 18432) == 4_618_997_760
    )
    assert shape.parameters(tied=False) - shape.parameters(tied=True) == 128004 * 2560
    assert shape.kv_values_per_token == 2 * 36 * 4 * 128


def test_a_gated_mlp_has_a_third_matrix() -> None:
    relu2, silu = Geometry.from_config(AFM), Geometry.from_config({**AFM, "hidden_act": "silu"})
    assert silu.layer_parameters - relu2.layer_parameters == 36 * 2560 * 18432


def test_values_that_a_config_may_leave_out() -> None:
    absent = ("architectures", "num_key_value_heads", "head_dim", "hidden_act")
    shape = Geometry.from_config({"model_type": "llama", **{key: AFM[key] for key in AFM if key not in absent}})
    assert (shape.architecture, shape.kv_heads, shape.head_dim, shape.activation) == ("llama", 20, 128, None)


def test_a_recorded_geometry_reads_back() -> None:
    shape = Geometry.from_config(AFM)
    assert Geometry.from_dict(shape.to_dict()) == shape
    older = {key: value for key, value in shape.to_dict().items() if key != "activation"}
    assert Geometry.from_dict(older).activation is None
    with pytest.raises(KeyError):
        Geometry.from_dict({"hidden": 3})


def test_configuration_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Geometry.from_config({"model_type": "clip", "num_attention_heads": 2})
    assert caught.value.code == "config-incomplete"
    assert str(caught.value) == "config.json has no 'hidden_size'; it is not the configuration of a decoder model"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "2560"),
        ("hidden_size", 2560.0),
        ("num_hidden_layers", 0),
        ("num_attention_heads", [20]),
        ("num_key_value_heads", 3),
        ("head_dim", -1),
        ("vocab_size", True),
        ("max_position_embeddings", None),
        ("hidden_act", {"relu2": 1}),
        ("architectures", "ArceeForCausalLM"),
        ("architectures", [5]),
    ],
)
def test_value_of_the_wrong_kind_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} in config.json must be ") as caught:
        Geometry.from_config({**AFM, name: value})
    assert caught.value.code == "config-value"
