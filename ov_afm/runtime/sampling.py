"""Sampling parameters of one request, checked before the engine sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "UNLIMITED", "Params"]

# Where neither the request nor the model directory sets a limit: an answer, not a whole context of 65,536 tokens.
DEFAULT_MAX_NEW_TOKENS = 1024
UNLIMITED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Params:
    """How tokens are chosen and when to stop. None takes the value of `generation_config.json`.

    Attributes:
        max_new_tokens: Most tokens to generate; the room left in the context limits it further.
        temperature: Divides the logits; 0 is greedy decoding.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens that together reach this probability.
        min_p: Drop tokens below this share of the most probable one's probability.
        repetition_penalty: Above 1 makes tokens that occurred less likely; also in greedy decoding.
        presence_penalty: Taken off the logit of a token that was generated already.
        frequency_penalty: Taken off the logit for each time that a token was generated.
        seed: Where the random numbers begin; None draws a new one. The same seed alone does not give the same text: see
            docs/repeatability.md.
        stop: Strings that end the answer; they are not part of it.
        greedy: Always the most probable token, whatever the other fields say.
        ignore_eos: Continue after an end-of-text token; for measurements.
        min_new_tokens: Fewest tokens before the model may end the answer.
        stop_tokens: Ids of further tokens that end the answer.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    greedy: bool = False
    ignore_eos: bool = False
    min_new_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            ConfigError: Names the field, what it may be, and the value found.
        """
        self._whole("max_new_tokens", 1)
        self._whole("top_k", 0)
        self._whole("seed", 0)
        self._whole("min_new_tokens", 0)
        self._within("temperature", "at least 0", lambda value: value >= 0)
        self._within("top_p", "above 0 and at most 1", lambda value: 0 < value <= 1)
        self._within("min_p", "at least 0 and below 1", lambda value: 0 <= value < 1)
        self._within("repetition_penalty", "above 0", lambda value: value > 0)
        self._within("presence_penalty", "between -2 and 2", lambda value: -2 <= value <= 2)
        self._within("frequency_penalty", "between -2 and 2", lambda value: -2 <= value <= 2)
        if isinstance(self.stop, str) or not all(isinstance(each, str) and each for each in self.stop):
            raise ConfigError(f"stop must be a tuple of non-empty strings, found {self.stop!r}")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= UNLIMITED:
            raise ConfigError(f"{name} must be a whole number of at least {least}, found {value!r}")

    def _within(self, name: str, allowed: str, holds: Any) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not holds(value):
            raise ConfigError(f"{name} must be a number {allowed}, found {value!r}")

    def apply(self, config: Any, *, room: int | None = None) -> Any:
        """Fill GenAI's generation config with these values.

        Args:
            config: The model's defaults (see `generation_config.default_config`); changed and returned.
            room: Tokens left in the context after the prompt.
        """
        fields = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in fields:
            value = getattr(self, name)
            if value is not None and not (name == "temperature" and value == 0):
                setattr(config, name, float(value))
        if self.top_k is not None:
            config.top_k = self.top_k if self.top_k else UNLIMITED
        if self.greedy or self.temperature == 0:
            config.do_sample = False
        elif any(value is not None for value in (self.temperature, self.top_k, self.top_p, self.min_p)):
            config.do_sample = True
        if self.seed is not None:
            config.rng_seed = self.seed
        limit = self.max_new_tokens
        if limit is None:
            limit = config.max_new_tokens if config.max_new_tokens <= UNLIMITED else DEFAULT_MAX_NEW_TOKENS
        config.max_new_tokens = limit if room is None else min(limit, room)
        # The model's default must not exceed the limit of the request.
        config.min_new_tokens = min(max(config.min_new_tokens, self.min_new_tokens), config.max_new_tokens)
        if self.stop_tokens:
            config.stop_token_ids = {*config.stop_token_ids, *self.stop_tokens}
        config.ignore_eos = self.ignore_eos
        return config
