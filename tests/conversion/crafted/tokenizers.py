"""Forms of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import crafted, pieces, tiny
from support.crafted import Case, Crafted


def ids_of(folder: Path) -> Callable[[str], list[int]]:
    """The tokenizer of an exported model, in OpenVINO."""
    import openvino_genai

    tokenizer: Any = openvino_genai.Tokenizer(folder)
    return lambda text: list(map(int, tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]))


def of_another_class(folder: Path) -> Crafted:
    from tokenizers import Tokenizer

    model = crafted.checkpoint(folder)
    tiny.edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    declared = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def check(output: Path) -> None:
        ids = ids_of(output)
        for text in tiny.TEXTS:
            assert ids(text) == declared.encode(text, add_special_tokens=False).ids

    return Crafted(model, check=check)


def sentencepiece_alone(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    pieces.write_model(folder / "tokenizer.model")

    def check(output: Path) -> None:
        import openvino_genai

        ids = ids_of(output)
        for case in pieces.recorded()["texts"]:
            # OpenVINO takes text that spells a byte's token for that byte.
            if "<0x" not in case["text"]:
                assert ids(case["text"]) == case["llama_cpp"], case["text"]
        tokenizer: Any = openvino_genai.Tokenizer(output)
        assert tokenizer.encode("x").input_ids.data[0][0] == tokenizer.get_bos_token_id() == 1

    return Crafted(model, check=check)


def sentencepiece_that(**normalizer: Any) -> Callable[[Path], Crafted]:
    def make(folder: Path) -> Crafted:
        crafted.checkpoint(folder)
        (folder / "tokenizer.json").unlink()
        pieces.write_model(folder / "tokenizer.model", **normalizer)
        return Crafted()

    return make


def tiktoken(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    return Crafted()


def beyond_the_embedding(folder: Path) -> Crafted:
    crafted.checkpoint(folder, vocab_size=300)
    return Crafted()


def padding_beyond_the_embedding(folder: Path) -> Crafted:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_plain(folder))
    crafted.checkpoint(folder, vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    return Crafted()


def _plain(folder: Path) -> Path:
    folder.mkdir()
    tiny.write_tokenizer(folder)
    return folder


CASES: list[Case] = [
    Case(
        "other-class",
        "byte-level `tokenizer.json` under the class `LlamaTokenizerFast`",
        "exact",
        "the file counts; transformers 5 would cut text by the rules of the class",
        of_another_class,
    ),
    Case(
        "sentencepiece",
        "`tokenizer.model` alone (SentencePiece BPE)",
        "converted with a note",
        "the ids of SentencePiece; but OpenVINO takes text that spells a byte's token, such as `<0x0A>`, for that byte",
        sentencepiece_alone,
        says=("<0x0A>",),
    ),
    Case(
        "sentencepiece-unigram",
        "`tokenizer.model` alone, unigram",
        "refused",
        "OpenVINO has no unigram with bytes; save it with transformers",
        sentencepiece_that(algorithm=1),
        code="tokenizer-unsupported",
        says=("is no BPE",),
    ),
    Case(
        "sentencepiece-spaces",
        "`tokenizer.model` alone that normalizes text",
        "refused",
        "save it with transformers",
        sentencepiece_that(remove_extra_whitespaces=True),
        code="tokenizer-unsupported",
        says=("removes spaces",),
    ),
    Case(
        "tiktoken",
        "`tokenizer.model` alone in tiktoken's form",
        "refused",
        "it has no rule for cutting text; save it with transformers",
        tiktoken,
        code="tokenizer-unsupported",
        says=("no SentencePiece model",),
    ),
    Case(
        "beyond-embedding",
        "more tokens than the embedding has rows",
        "refused",
        "a prompt with such a token would fail",
        beyond_the_embedding,
        code="tokens-beyond-embedding",
        says=("300 rows",),
    ),
    Case(
        "padding-beyond-embedding",
        "a padding token beyond the embedding",
        "refused",
        "text can hold it; take it out of the tokenizer files, or resize the embedding",
        padding_beyond_the_embedding,
        code="tokens-beyond-embedding",
        says=("'<pad>'",),
    ),
]
