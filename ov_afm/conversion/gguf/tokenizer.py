"""A Hugging Face tokenizer from the metadata of a GGUF file.

A byte-level BPE (`gpt2`) is four things: the tokens, the merges, the rule that cuts text into pieces before merging,
and the special tokens. A GGUF file holds the first two in full, the name of the third (`tokenizer.ggml.pre`), and marks
the fourth by token types. transformers reads only some of that and picks a tokenizer by architecture, which is wrong
for most files; here nothing is guessed. A rule that is unknown is refused by name, and so is a file without one:
llama.cpp then takes its `default`, warns that answers get worse, and cuts text otherwise than the model was trained on.

A SentencePiece BPE (`llama`) has scores in place of merges, and no rule; see `sentence_pieces`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import SourceError
from .. import sentence_pieces
from ..sentence_pieces import CONTROL, UNKNOWN, USER_DEFINED, Pieces, Prefix
from .config import need

__all__ = ["PRE_TOKENIZERS", "pre_tokenizer", "with_defaults", "write_tokenizer"]

# A template for one purpose: `tokenizer.chat_template.tool_use`.
NAMED_TEMPLATE = "tokenizer.chat_template."
BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"
# What llama.cpp takes where a SentencePiece file does not say it (llama_vocab::impl::load, src/llama-vocab.cpp there).
SENTENCE_PIECE_DEFAULTS = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}

# Rules as llama.cpp has them (llm_tokenizer_bpe, src/llama-vocab.cpp). Where llama.cpp applies several regular
# expressions in turn, this is one that cuts in the same places, because OpenVINO joins a sequence of splits into
# alternatives, which cut elsewhere ("  7" would come apart). The tests compare each with the sequence.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# \p{N}, then GPT-2: a run of white space before a digit is one piece, because the digit ends what GPT-2 sees.
_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# Punctuation, then GPT-2, then numbers, then groups of three digits.
_MARKS = r"\p{P}$+<=>^~|"
_DEFAULT = (
    rf"[{_MARKS}]+| ?\p{{L}}+|[0-9]{{3}}|(?:(?![0-9]{{3}})\p{{N}})+"
    rf"| ?[^\s\p{{L}}\p{{N}}{_MARKS}]+|\s+(?![^\s{_MARKS}])|\s+"
)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
# These take a whole piece that is a token before any merge, and start a text with BOS unless told otherwise.
_WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3")


def write_tokenizer(folder: Path, fields: Mapping[str, Any], name: str, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

    Several templates go to tokenizer_config.json, by their names.

    Args:
        folder: Where to write.
        fields: Metadata of the GGUF file.
        name: The file's name, for messages.
        max_length: Context length in tokens.

    Raises:
        SourceError: The tokenizer is of a kind that is not known, or its data contradict each other.
    """
    model = fields.get("tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCE_PIECE):
        raise SourceError(
            f"tokenizer {model!r} of {name} is not supported ({BYTE_LEVEL!r}, byte-level BPE, and {SENTENCE_PIECE!r}, "
            "SentencePiece, are); use the safetensors model",
            code="gguf-tokenizer-unsupported",
        )
    pre = _rule(fields, name) if model == BYTE_LEVEL else None
    tokens = need(fields, "tokenizer.ggml.tokens", name)
    try:
        tokenizer = _byte_level(fields, tokens, pre) if pre is not None else _sentence_piece(fields, tokens)
        _add_edges(tokenizer, fields, tokens, bos=pre is None or pre in _WHOLE_PIECES)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise SourceError(
            f"tokenizer data of {name} contradict each other ({error}); use the safetensors model",
            code="gguf-tokenizer-damaged",
        ) from error
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for key, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            if type(token_id) is not int or not 0 <= token_id < len(tokens):
                raise SourceError(
                    f"{key}_token_id of {name} is {token_id!r}, which is no token of its {len(tokens)}; "
                    "use the safetensors model",
                    code="gguf-tokenizer-damaged",
                )
            config[f"{ours}_token"] = tokens[token_id]
    template = fields.get("tokenizer.chat_template")
    names = fields.get("tokenizer.chat_templates", [])
    named = {each: fields.get(f"{NAMED_TEMPLATE}{each}") for each in names} if isinstance(names, list) else {"": names}
    if not all(isinstance(text, str | None) for text in (template, *named.values())) or not all(
        isinstance(each, str) for each in named
    ):
        raise SourceError(
            f"a chat template of {name} is no text; use the safetensors model", code="gguf-tokenizer-damaged"
        )
    if named:
        named |= {"default": template} if template else {}
        config["chat_template"] = [{"name": each, "template": text} for each, text in named.items()]
    elif template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with what llama.cpp takes for values that a SentencePiece file leaves out."""
    defaults = SENTENCE_PIECE_DEFAULTS if fields.get("tokenizer.ggml.model") == SENTENCE_PIECE else {}
    return {**defaults, **fields}


def _rule(fields: Mapping[str, Any], name: str) -> str:
    """The name of the rule that cuts text."""
    known = ", ".join(sorted(PRE_TOKENIZERS))
    pre = fields.get("tokenizer.ggml.pre")
    if pre is None:
        raise SourceError(
            f"{name} does not say how its tokenizer cuts text (tokenizer.ggml.pre is missing, as in old files); use a "
            f"newer file, or name the rule ({known}) with: gguf-new-metadata --pre-tokenizer RULE {name} NEW.gguf",
            code="gguf-pre-tokenizer-missing",
        )
    if pre not in PRE_TOKENIZERS:
        raise SourceError(
            f"pre-tokenizer {pre!r} of {name} is not supported; known are {known}; use the safetensors model",
            code="gguf-tokenizer-unsupported",
        )
    return str(pre)


def pre_tokenizer(rule: str) -> Any:
    """What cuts a text into pieces by a rule of `PRE_TOKENIZERS`, for `tokenizers`."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[rule]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(fields: Mapping[str, Any], tokens: list[str], pre: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{len(tokens) - len(vocabulary)} tokens occur twice")
    # A token may itself begin with a space-like byte, so the cut is at the first space after its start.
    merges = [
        (merge[:cut], merge[cut + 1 :])
        for merge in fields.get("tokenizer.ggml.merges", ())
        for cut in (merge.index(" ", 1),)
    ]
    for first, second in merges:
        for part in (first, second, first + second):
            if part not in vocabulary:
                raise ValueError(f"a merge needs {part!r}, which is no token")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_PIECES))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for index, kind in enumerate(fields.get("tokenizer.ggml.token_type", ())):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(tokens[index], special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(tokens[index], normalized=False)])
    return tokenizer


def _sentence_piece(fields: Mapping[str, Any], tokens: list[str]) -> Any:
    scores, types = (fields[f"tokenizer.ggml.{name}"] for name in ("scores", "token_type"))
    prefix: Prefix = "always" if fields.get("tokenizer.ggml.add_space_prefix", True) else "never"
    return sentence_pieces.build(Pieces(tokens, scores, types, prefix))


def _add_edges(tokenizer: Any, fields: Mapping[str, Any], tokens: list[str], *, bos: bool) -> None:
    """Let a tokenizer begin and end every text as the file says; `bos` is what holds where it does not."""
    from tokenizers import processors

    def edge(which: str, default: bool) -> list[int]:
        token_id = fields.get(f"tokenizer.ggml.{which}_token_id")
        added = fields.get(f"tokenizer.ggml.add_{which}_token", default)
        return [token_id] if added and token_id is not None else []

    head, tail = edge("bos", bos), edge("eos", False)
    if head or tail:
        single = [*(tokens[index] for index in head), "$A", *(tokens[index] for index in tail)]
        special = [(tokens[index], index) for index in {*head, *tail}]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
