"""Forms of `generation_config.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import crafted
from support.crafted import Case, Crafted

from ov_afm.runtime.generation_config import default_config

FILE = "generation_config.json"
# transformers finds `do_sample: false` with a temperature invalid, and then uses nothing of the file.
CONTRADICTION = '{"do_sample": false, "temperature": 0.6,\n "eos_token_id": [2, 5]}'


def unchanged(text: str, **values: Any) -> Callable[[Path], None]:
    """Checks that the file is the source's, byte for byte, and what an engine is told of it."""

    def check(output: Path) -> None:
        assert (output / FILE).read_text() == text
        assert json.loads((output / "ov_afm.json").read_text())["generation"]["added"] == {}
        config = default_config(output)
        assert {name: getattr(config, name) for name in values} == values

    return check


def contradiction(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    (folder / FILE).write_text(CONTRADICTION)
    return Crafted(model, check=unchanged(CONTRADICTION, do_sample=False, stop_token_ids={2, 5}, top_k=2**64 - 1))


def missing(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder, "llama")
    (folder / FILE).unlink()
    old = {"eos_token_id": [2, 5], "do_sample": True, "top_k": 7}
    crafted.edit_config(folder, **old)

    def check(output: Path) -> None:
        found = json.loads((output / FILE).read_text())
        assert {name: found[name] for name in old} == old
        added = json.loads((output / "ov_afm.json").read_text())["generation"]["added"]
        assert {name: added[name] for name in old} == old

    return Crafted(model, check=check)


def beams(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    crafted.write_json(folder / FILE, {"eos_token_id": 2, "num_beams": 4, "do_sample": False})
    return Crafted(model)


def holding(text: str) -> Callable[[Path], Crafted]:
    """A checkpoint with this generation configuration."""

    def make(folder: Path) -> Crafted:
        crafted.checkpoint(folder)
        (folder / FILE).write_text(text)
        return Crafted()

    return make


CASES = [
    Case(
        "contradiction",
        "`do_sample: false` with a temperature, which transformers calls invalid",
        "exact",
        "carried byte for byte, its list of EOS tokens with it; no sampling is added to greedy decoding",
        contradiction,
    ),
    Case(
        "in-config",
        "none, and EOS tokens and sampling in `config.json`, as in old checkpoints",
        "exact",
        "written to `generation_config.json`; the manifest records what was added",
        missing,
    ),
    Case(
        "beams",
        "`num_beams` and other settings that no engine here uses",
        "converted with a note",
        "carried, but answers are those of one beam",
        beams,
        says=("num_beams 4",),
    ),
    Case(
        "no-json",
        "no JSON object",
        "refused",
        "correct the file, or delete it",
        holding("{eos: 2}"),
        code="generation-config-unreadable",
        says=(FILE,),
    ),
    Case(
        "eos-text",
        "a value of another type, such as a text in `eos_token_id`",
        "refused",
        "correct it: token ids are whole numbers",
        holding('{"eos_token_id": "<|im_end|>"}'),
        code="generation-config-invalid",
        says=("eos_token_id", "'<|im_end|>'"),
    ),
]
