"""`generation_config.json`: how a model's makers want it to be sampled, and where its answers end.

The file is Hugging Face's, and people edit it. Everything here reads it through `read`, which refuses what is not of
its type; `default_config` makes GenAI's configuration of the fields that an engine of ours honours, and `not_used`
names those that would change answers and that none honours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SourceError
from ..system.json_text import parse
from .sampling import UNLIMITED, Params

__all__ = ["FILE_NAME", "default_config", "eos_ids", "is_greedy", "not_used", "read"]

FILE_NAME = "generation_config.json"
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
WHOLE_NUMBERS = ("top_k", "max_new_tokens", "min_new_tokens")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What changes answers in transformers and in no engine here, with the value that changes nothing.
NOT_USED: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "min_length": 0,
}


def read(folder: Path) -> dict[str, Any]:
    """The fields of a folder's generation configuration that are set; none where it has no such file.

    Raises:
        SourceError: The file is no JSON object, or a field is not of its type.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return {}
    try:
        fields = parse(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read as JSON ({error}); correct it, or delete it to do without",
            code="generation-config-unreadable",
        ) from error
    if not isinstance(fields, dict):
        raise SourceError(
            f"{path} holds a JSON {type(fields).__name__} where an object is needed; correct it, or delete it to do "
            "without",
            code="generation-config-unreadable",
        )
    _check_types(fields, path)
    return {name: value for name, value in fields.items() if value is not None}


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _check_types(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse a field that is not of its type; None is a field that is not set."""
    allowed = {
        **dict.fromkeys(NUMBERS, (_is_number, "a number")),
        **dict.fromkeys(WHOLE_NUMBERS, (_is_whole, "a whole number")),
        **dict.fromkeys(TOKENS, (_is_token, "a token id, a whole number")),
        "eos_token_id": (_are_tokens, "a token id or a list of them, whole numbers"),
        "do_sample": (lambda value: isinstance(value, bool), "true or false"),
        "stop_strings": (_are_texts, "a text or a list of texts, none empty"),
    }
    for name, (holds, meaning) in allowed.items():
        value = fields.get(name)
        if value is not None and not holds(value):
            raise SourceError(f"{name} in {path} must be {meaning}, found {value!r}", code="generation-config-invalid")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -UNLIMITED <= value <= UNLIMITED


def _is_token(value: Any) -> bool:
    # -1 means none, as in the first Llama checkpoints.
    return _is_whole(value) and -1 <= value < 2**31


def _are_tokens(value: Any) -> bool:
    return all(map(_is_token, value)) if isinstance(value, list) else _is_token(value)


def _are_texts(value: Any) -> bool:
    return all(isinstance(each, str) and each for each in (value if isinstance(value, list) else [value]))


def eos_ids(fields: Mapping[str, Any]) -> list[int]:
    """The tokens that `eos_token_id` names, each once, in their order."""
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(each for each in ids if each is not None and each >= 0))


def is_greedy(fields: Mapping[str, Any]) -> bool:
    """Whether the file asks for the most probable token each time, in so many words."""
    return fields.get("do_sample") is False or fields.get("temperature") == 0 or fields.get("top_p") == 0


def not_used(fields: Mapping[str, Any]) -> list[str]:
    """Fields that change answers in transformers, and that no engine of ours honours."""
    return [name for name, neutral in NOT_USED.items() if fields.get(name, neutral) not in (neutral, None)]


def default_config(folder: Path) -> Any:
    """GenAI's generation configuration of a model directory; GenAI's own defaults where it records none.

    Made from the file, because an engine that drafts tokens forgets it and reports GenAI's defaults (2026.4).

    Raises:
        SourceError: The file cannot be read, or a value is outside its range.
    """
    import openvino_genai

    fields, config = read(folder), openvino_genai.GenerationConfig()
    values = {name: fields[name] for name in (*NUMBERS, "top_k", "max_new_tokens") if name in fields}
    # Not in a range that an engine takes, though they mean something: greedy decoding (0), and all tokens (0, -1).
    for name in ("temperature", "top_p", "top_k"):
        if values.get(name) == 0 or values.get(name) == -1 and name == "top_k":
            del values[name]
    try:
        Params(**values)
    except ConfigError as error:
        raise SourceError(f"{folder / FILE_NAME}: {error}", code="generation-config-invalid") from error
    for name, value in values.items():
        setattr(config, name, value)
    config.do_sample = bool(fields.get("do_sample")) and not is_greedy(fields)
    config.min_new_tokens = max(0, fields.get("min_new_tokens", 0))
    stop_strings = fields.get("stop_strings", [])
    config.stop_strings = {stop_strings} if isinstance(stop_strings, str) else set(stop_strings)
    if ends := eos_ids(fields):
        config.eos_token_id, config.stop_token_ids = ends[0], set(ends)
    return config
