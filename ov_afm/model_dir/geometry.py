"""The shape of a decoder: how many layers, heads and neurons it has, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

__all__ = ["Geometry"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a decoder-only model, as the manifest records them.

    Attributes:
        architecture: Class name of the model in transformers, such as `ArceeForCausalLM`.
        hidden: Width of the residual stream.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        intermediate: Neurons of an MLP.
        vocab: Rows of the embedding.
        max_positions: Longest context in tokens.
        activation: The MLP's activation as `config.json` names it; None where it names none.
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    activation: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """The geometry that a Hugging Face `config.json` describes.

        Raises:
            ConfigError: The configuration lacks a value that every decoder has, or a value is of another kind.
        """
        try:
            hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
            kv_heads = heads if config.get("num_key_value_heads") is None else _whole(config, "num_key_value_heads")
            if heads % kv_heads:
                raise _wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
            return cls(
                architecture=_architecture(config),
                hidden=hidden,
                layers=_whole(config, "num_hidden_layers"),
                heads=heads,
                kv_heads=kv_heads,
                head_dim=hidden // heads if config.get("head_dim") is None else _whole(config, "head_dim"),
                intermediate=_whole(config, "intermediate_size"),
                vocab=_whole(config, "vocab_size"),
                max_positions=_whole(config, "max_position_embeddings"),
                activation=None if config.get("hidden_act") is None else _text(config["hidden_act"], "hidden_act"),
            )
        except KeyError as error:
            raise ConfigError(
                f"config.json has no {error.args[0]!r}; it is not the configuration of a decoder model",
                code="config-incomplete",
            ) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """The geometry that `to_dict` gave.

        Raises:
            KeyError: A value is missing.
            TypeError: A value is of another kind.
        """
        required = {each.name: values[each.name] for each in fields(cls) if each.name != "activation"}
        for name, value in required.items():
            if type(value) is not (str if name == "architecture" else int):
                raise TypeError(f"geometry.{name} is {value!r}")
        return cls(**required, activation=values.get("activation"))

    def to_dict(self) -> dict[str, Any]:
        """As the manifest records it."""
        return asdict(self)

    @property
    def kv_values_per_token(self) -> int:
        """Values that the KV cache holds for one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def table_parameters(self, *, tied: bool) -> int:
        """Weights of embedding and head; `tied` says that they are one matrix."""
        return self.vocab * self.hidden * (1 if tied else 2)

    @property
    def layer_parameters(self) -> int:
        """Weights of all decoder layers, norms left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        matrices = 2 if self.activation == "relu2" else 3
        return self.layers * (attention + matrices * self.hidden * self.intermediate)

    def parameters(self, *, tied: bool) -> int:
        """Weights of the whole model, norms left out."""
        return self.table_parameters(tied=tied) + self.layer_parameters


def _whole(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 1:
        raise _wrong(name, value, "a whole number above 0")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config["model_type"]]
    if not isinstance(names, list):
        raise _wrong("architectures", names, "a list")
    return _text(names[0], "architectures")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _wrong(name: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f"{name} in config.json must be {needed}, found {value!r}; correct it", code="config-value")
