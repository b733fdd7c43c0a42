"""Models that read text and write none: what makes an embedding of a text, or scores a text for a query.

An encoder gives a vector for each token. What becomes of these vectors is not in its weights: sentence-transformers
keeps it in files beside them, and the manifest keeps it as `text_encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ..errors import ConfigError

__all__ = ["EMBEDDING", "POOLING_FILE", "RERANKING", "TASKS", "TEXT_GENERATION", "Pooling", "TextEncoder"]

TEXT_GENERATION = "text-generation"
EMBEDDING, RERANKING = "feature-extraction", "text-classification"
TASKS = (TEXT_GENERATION, EMBEDDING, RERANKING)
# Where sentence-transformers keeps how the vectors of a text's tokens become one.
POOLING_FILE = "1_Pooling/config.json"
Pooling = Literal["mean", "cls", "last_token"]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """What is done with the vectors of an encoder.

    Attributes:
        task: `feature-extraction` for embeddings, `text-classification` for scores.
        max_tokens: Longest text in tokens, the tokens around it included; a query and a text count together.
        dimensions: Numbers of an embedding; 0 where there is none.
        parameters: Weights of the model.
        pooling: How the vectors of the tokens become one; None where a score is made of them.
        normalize: The embedding gets the length 1.
        prompts: Texts that are put in front, by their names, such as `query` and `document`.
        default_prompt: Name of the one that is used unless another is asked for; None for no prompt.
        shorter: Numbers of an embedding that it may be cut to; empty where any number may be.
        can_shorten: The model was trained so that an embedding may be cut.
    """

    task: str
    max_tokens: int
    dimensions: int = 0
    parameters: int = 0
    pooling: Pooling | None = None
    normalize: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    shorter: tuple[int, ...] = ()
    can_shorten: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextEncoder:
        """The encoder of a manifest; keys that a newer ov_afm added are ignored.

        Raises:
            TypeError: A value is of another kind than is needed.
            KeyError: One is missing.
        """
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        kinds: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("max_tokens", "dimensions", "parameters"), (int,)),
            **dict.fromkeys(("normalize", "can_shorten"), (bool,)),
            "prompts": (dict,),
            "shorter": (list, tuple),
            "default_prompt": (str, type(None)),
        }
        for name, value in known.items():
            # In Python, true is a number; `type` tells them apart.
            if name in kinds and type(value) not in kinds[name]:
                raise TypeError(f"text_encoder.{name} is {value!r}")
        texts = known.get("prompts", {})
        if not all(isinstance(text, str) for text in texts.values()):
            raise TypeError(f"text_encoder.prompts is {texts!r}")
        if values["task"] not in (EMBEDDING, RERANKING) or known.get("pooling") not in (*get_args(Pooling), None):
            raise TypeError(f"text_encoder.task is {values['task']!r}, its pooling {known.get('pooling')!r}")
        if known["max_tokens"] < 1 or (values["task"] == EMBEDDING) != ("pooling" in known and bool(known["pooling"])):
            raise TypeError(f"text_encoder.max_tokens is {known['max_tokens']}, its pooling {known.get('pooling')!r}")
        return cls(**{**known, "shorter": tuple(known.get("shorter", ()))})

    def to_dict(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {**asdict(self), "shorter": list(self.shorter)}

    @property
    def purpose(self) -> str:
        """What the model is for, for people."""
        return "embeddings" if self.task == EMBEDDING else "reranking"

    def refused(self, name: str) -> ConfigError:
        """The error of what needs a model that writes text."""
        route = "/v1/embeddings" if self.task == EMBEDDING else "/v1/rerank"
        return ConfigError(
            f"{name} is a model for {self.purpose} ({self.task}) and writes no text; serve it with ov-afm serve, which "
            f"answers at {route}",
            code="model-writes-no-text",
        )
