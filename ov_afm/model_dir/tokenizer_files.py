"""What the tokenizer files of a folder say beside the vocabulary: control tokens, special tokens, chat templates.

Checkpoints and model directories have the same files, and they are read here as transformers reads them. One file more
counts: `chat_template.json`, which transformers reads for processors only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..system.json_text import parse

__all__ = [
    "ADDITIONAL_TEMPLATES",
    "SPECIAL_TOKENS",
    "TEMPLATE_FILE",
    "chat_templates",
    "control_tokens",
    "special_tokens",
    "superseded_templates",
]

TEMPLATE_FILE = "chat_template.jinja"
ADDITIONAL_TEMPLATES = "additional_chat_templates"
# Names become names of files.
NAME = re.compile(r"\w[\w-]*")
# Files that may hold the template as a field, the first one that does counts.
TEMPLATE_FIELDS = ("tokenizer_config.json", "chat_template.json")
# `PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES` in huggingface/transformers: what a template may name.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def control_tokens(folder: Path, *, special: bool = False) -> dict[str, int]:
    """Text and id of the tokens that a tokenizer recognizes as a whole in any text.

    Args:
        folder: A folder with a tokenizer; without `tokenizer.json` or `tokenizer_config.json` it has none.
        special: Only those that are no part of what people read: `<|im_end|>`, but not `</think>`.
    """
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    entries = {int(index): entry for index, entry in decoder.items()}
    entries |= {int(entry["id"]): entry for entry in _json(folder / "tokenizer.json").get("added_tokens", [])}
    return {
        entry["content"]: index
        for index, entry in entries.items()
        if len(entry["content"]) > 1 and (entry.get("special") or not special)
    }


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens by the names that a template has for them, such as `bos_token`."""
    fields = {**_json(folder / "tokenizer_config.json"), **_json(folder / "special_tokens_map.json")}
    values = {name: fields.get(name) for name in SPECIAL_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name; a template without a name is `default`.

    Raises:
        SourceError: A file that should hold one holds something else.
    """
    found = _places(folder)
    return next(iter(found.values()), {})


def superseded_templates(folder: Path) -> list[str]:
    """Files of a folder that hold other chat templates than those which are used."""
    used = chat_templates(folder)
    return [file for file, templates in _places(folder).items() if templates != used]


def _places(folder: Path) -> dict[str, dict[str, str]]:
    """Templates by name, for each place that has any, the one that counts first."""
    named = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    named |= {path.stem: path for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))}
    places = {TEMPLATE_FILE: {name: _text(path) for name, path in named.items()}}
    for file in TEMPLATE_FIELDS:
        declared = _json(folder / file).get("chat_template")
        places[file] = {} if declared is None else _by_name(declared, folder / file)
    return {file: templates for file, templates in places.items() if templates}


def _by_name(declared: Any, path: Path) -> dict[str, str]:
    """Templates by name: from a text, from names and texts, or from a list of `{"name": ..., "template": ...}`."""
    if isinstance(declared, str):
        return {"default": declared} if declared else {}
    if isinstance(declared, list) and all(isinstance(each, Mapping) for each in declared):
        declared = {each.get("name"): each.get("template") for each in declared}
    if not isinstance(declared, Mapping) or not all(
        isinstance(name, str) and NAME.fullmatch(name) and isinstance(text, str) for name, text in declared.items()
    ):
        raise SourceError(
            f"chat_template in {path} is neither a text nor a list of named templates; fetch the file again",
            code="chat-template-invalid",
        )
    return dict(declared)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}; fetch it again", code="chat-template-invalid") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        fields = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}; fetch it again", code="json-unreadable") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{path} holds no JSON object; fetch it again", code="json-no-object")
    return fields
