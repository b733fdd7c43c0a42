"""A Hugging Face tokenizer from the metadata of a GGUF file.

A byte-level BPE is four things: the tokens, the merges, the rule that cuts text into pieces before merging, and the
special tokens. A GGUF file holds the first two in full, the name of the third (`tokenizer.ggml.pre`), and marks the
fourth by token types. transformers reads only some of that and picks a tokenizer by architecture, which is wrong for
most files; here nothing is guessed, and an unknown rule is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import SourceError

__all__ = ["PRE_TOKENIZERS", "pre_tokenizer", "write_tokenizer"]

# Token types of GGUF (enum llama_token_type, include/llama.h in ggml-org/llama.cpp).
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
# A template for one purpose: `tokenizer.chat_template.tool_use`.
NAMED_TEMPLATE = "tokenizer.chat_template."

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
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise SourceError(
            f"tokenizer {model!r} of {name} is not supported (byte-level BPE, 'gpt2', is); use the safetensors model",
            code="gguf-tokenizer-unsupported",
        )
    if pre not in PRE_TOKENIZERS:
        raise SourceError(
            f"pre-tokenizer {pre!r} of {name} is not supported; known are {', '.join(sorted(PRE_TOKENIZERS))}; "
            "use the safetensors model",
            code="gguf-tokenizer-unsupported",
        )
    tokens = fields["tokenizer.ggml.tokens"]
    try:
        tokenizer = _build(fields, tokens, pre)
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
            config[f"{ours}_token"] = tokens[token_id]
    template = fields.get("tokenizer.chat_template")
    named = {each: fields.get(f"{NAMED_TEMPLATE}{each}") for each in fields.get("tokenizer.chat_templates", ())}
    if named:
        named |= {"default": template} if template else {}
        config["chat_template"] = [{"name": each, "template": text} for each, text in named.items()]
    elif template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def pre_tokenizer(rule: str) -> Any:
    """What cuts a text into pieces by a rule of `PRE_TOKENIZERS`, for `tokenizers`."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[rule]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _build(fields: Mapping[str, Any], tokens: list[str], pre: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

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
    whole_pieces = pre in _WHOLE_PIECES
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_pieces))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    for index, kind in enumerate(fields.get("tokenizer.ggml.token_type", ())):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(tokens[index], special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(tokens[index], normalized=False)])

    def edge(which: str, default: bool) -> list[int]:
        token_id = fields.get(f"tokenizer.ggml.{which}_token_id")
        added = fields.get(f"tokenizer.ggml.add_{which}_token", default)
        return [token_id] if added and token_id is not None else []

    head, tail = edge("bos", whole_pieces), edge("eos", False)
    if head or tail:
        single = [*(tokens[index] for index in head), "$A", *(tokens[index] for index in tail)]
        special = [(tokens[index], index) for index in {*head, *tail}]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer
