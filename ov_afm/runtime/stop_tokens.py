"""Where an answer ends: the tokens that stop generation.

Three places of a model name them, and often not the same ones: `eos_token_id` of its generation configuration, the
tokenizer's end-of-text token, and the token that the chat template writes after the assistant's words. An answer that
passes one of them runs on to its limit, so each of them stops it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import GenerationError, SourceError, last_line
from ..model_dir.tokenizer_files import control_tokens, special_tokens
from .chat_template import ChatTemplate
from .generation_config import eos_ids, read

__all__ = ["GENERATION_CONFIG", "StopToken", "disagreements", "load_tokenizer", "of_folder", "shown", "stop_tokens"]

GENERATION_CONFIG, TOKENIZER, TEMPLATE = "generation_config", "tokenizer", "chat_template"
# What an assistant says in the conversations that show where a turn ends; templates may trim it, none changes it.
WORDS = ("Firstanswer", "Secondanswer")


@dataclass(frozen=True, slots=True)
class StopToken:
    """A token that ends an answer.

    Attributes:
        id: The token.
        text: Its text.
        named_by: What names it: `generation_config`, `tokenizer`, `chat_template`.
    """

    id: int
    text: str
    named_by: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"id": self.id, "text": self.text, "named_by": list(self.named_by)}


def shown(text: str) -> str:
    """The text of a token for people: as it is, or quoted where it would not be seen."""
    return text if text.strip() and text.isprintable() else repr(text)


def of_folder(folder: Path) -> tuple[StopToken, ...]:
    """The stop tokens of a model directory that is not loaded.

    Raises:
        SourceError: Its generation configuration, template or tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    return stop_tokens(folder, tokenizer, ChatTemplate.read(folder, tokenizer))


def load_tokenizer(folder: Path) -> Any:
    """GenAI's tokenizer of a model directory.

    Raises:
        SourceError: It cannot be loaded.
    """
    import openvino_genai

    try:
        return openvino_genai.Tokenizer(folder)
    except RuntimeError as error:
        raise SourceError(
            f"the tokenizer of {folder} cannot be loaded: {last_line(error)}; export the model again",
            code="tokenizer-unreadable",
        ) from error


def stop_tokens(folder: Path, tokenizer: Any, template: ChatTemplate | None) -> tuple[StopToken, ...]:
    """All tokens that end an answer of a model.

    Args:
        folder: The model directory.
        tokenizer: GenAI's tokenizer of it.
        template: Its chat template.

    Raises:
        SourceError: The generation configuration cannot be read.
    """
    named = {
        GENERATION_CONFIG: eos_ids(read(folder)),
        TOKENIZER: _end_of_text(folder, tokenizer),
        TEMPLATE: _ends_of_turn(template, tokenizer, control_tokens(folder)) if template else [],
    }
    ids = dict.fromkeys(token for tokens in named.values() for token in tokens)
    return tuple(
        StopToken(
            token,
            tokenizer.decode([token], skip_special_tokens=False),
            tuple(place for place, tokens in named.items() if token in tokens),
        )
        for token in ids
    )


def _end_of_text(folder: Path, tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-text token, as its own files name it."""
    texts = special_tokens(folder)
    if not texts:
        # Without such files GenAI knows it from the tokenizer's IR.
        token = tokenizer.get_eos_token_id()
        return [token] if token >= 0 else []
    # GenAI would also take the one of config.json, where transformers writes a default for every architecture.
    text = texts.get("eos_token")
    ids = [int(each) for each in tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]] if text else []
    return ids if len(ids) == 1 else []


def _ends_of_turn(template: ChatTemplate, tokenizer: Any, controls: Mapping[str, int]) -> list[int]:
    """The control tokens that follow the assistant's words, in the middle of a conversation and at its end."""
    messages = [
        {"role": role, "content": content}
        for question, answer in zip(("First?", "Second?"), WORDS, strict=True)
        for role, content in (("user", question), ("assistant", answer))
    ]
    try:
        text = template.render(messages, open_turn=False)
    except GenerationError:
        return []
    found = []
    for words in WORDS:
        rest = text.rpartition(words)[2].lstrip() if words in text else ""
        token = _control_token_at_start(rest, tokenizer, controls)
        if token is not None and token not in found:
            found.append(token)
    return found


def _control_token_at_start(text: str, tokenizer: Any, controls: Mapping[str, int]) -> int | None:
    """The control token that a text begins with; None where it begins with ordinary text."""
    known = [token for token in controls if text.startswith(token)]
    if known or not text:
        return controls[max(known, key=len)] if known else None
    # Without tokenizer files: what the detokenizer leaves out is special.
    first = int(tokenizer.encode(text, add_special_tokens=False).input_ids.data[0][0])
    special = not tokenizer.decode([first]) and text.startswith(tokenizer.decode([first], skip_special_tokens=False))
    return first if special else None


def disagreements(tokens: tuple[StopToken, ...]) -> list[str]:
    """Notes on stop tokens that the generation configuration does not name."""
    names = {TOKENIZER: "the tokenizer's end-of-text token", TEMPLATE: "the end of a turn in the chat template"}
    return [
        f"{shown(token.text)} ({token.id}) is {' and '.join(names[place] for place in token.named_by)}, but not "
        "among the eos_token_id of the source's generation_config.json; answers end there too"
        for token in tokens
        if GENERATION_CONFIG not in token.named_by
    ]
