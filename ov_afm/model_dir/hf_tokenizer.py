"""The tokenizer of a folder in transformers, as `tokenizer.json` has it.

transformers 5 takes vocabulary and merges from that file for some classes, and the rest from the class that
`tokenizer_config.json` names. A byte-level BPE under the name `LlamaTokenizerFast`, as distilled Llama models have it,
is then cut by the rules of Llama 2. Every other program reads the file, so the file counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["load_hf_tokenizer"]

# What decides how text is cut, in a tokenizer of Hugging Face's library.
CUTTING = ("normalizer", "pre_tokenizer", "model")


def load_hf_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint or a model directory.

    Args:
        folder: The folder.
        trust_remote_code: Let transformers run the checkpoint's own code, which then decides alone.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    file = folder / "tokenizer.json"
    if trust_remote_code or not file.is_file():
        return tokenizer
    declared = json.loads(file.read_text(encoding="utf-8"))
    built = json.loads(tokenizer.backend_tokenizer.to_str())
    if all(built.get(part) == declared.get(part) for part in CUTTING):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(folder)
