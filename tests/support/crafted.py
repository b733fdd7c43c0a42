"""Crafted checkpoints: each form that a source can have, what becomes of it, and why.

Every case is exported by the real function and compared with something that does not go through ov_afm: the model as it
was in memory before it was saved, PEFT, or the facts that a refusal must name. The same cases are the table of
`docs/sources.md`, so that the page says only what was tried.

To add a case, put it in the list `CASES` of its area, `tests/conversion/crafted/AREA.py`:

    def stray_bias(folder: Path) -> Crafted:
        model = crafted.checkpoint(folder)
        crafted.edit_tensors(folder, {"model.layers.0.mlp.up_proj.bias": torch.ones(128)})
        return Crafted(model)

    Case("stray-bias", "a bias that the architecture does not have", "refused", "the model would ignore it", stray_bias,
         code="tensors-unknown", says=("mlp.up_proj.bias",))

and write the page again: `PYTHONPATH=tests .venv/bin/python -m support.crafted > docs/sources.md`.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import tiny

__all__ = ["AREAS", "IDS", "Case", "Crafted", "cases", "checkpoint", "edit_tensors", "page", "tensors_of"]

Outcome = Literal["exact", "converted with a note", "refused"]
# Modules of tests/conversion/crafted, in the order of the page, with their headings there.
AREAS = {
    "tensors": "Tensors",
    "storage": "Weight files",
    "configs": "Configurations",
    "adapters": "LoRA adapters",
    "tokenizers": "Tokenizers",
    "gguf": "GGUF files",
    "chat_templates": "Chat templates",
    "generation_config": "Generation configurations",
    "turn_end": "The end of an answer",
}
# A prompt that every crafted model knows: ids below 500.
IDS = tuple((7 * i * i + 3 * i + 11) % 500 for i in range(1, 41))


@dataclass(frozen=True, slots=True)
class Crafted:
    """A source that was made for a case.

    Attributes:
        reference: What the export's logits must equal at f32: a torch model, or logits (`IDS`, vocabulary). None
            where only `check` judges, or where the export is refused.
        source: What is exported, if it is not the folder that the case was given.
        options: Further arguments of `export`.
        check: Judges the exported model directory, after its logits.
        prompt: Tokens whose logits are compared.
    """

    reference: Any = None
    source: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Path], None] | None = None
    prompt: Sequence[int] = IDS


@dataclass(frozen=True, slots=True)
class Case:
    """One form of a source.

    Attributes:
        name: Name of the test: `stray-bias`.
        form: What is special about the source, for the page.
        outcome: `exact`: exported, and equal to the reference. `converted with a note`: the same, and the notes of the
            result name the facts of `says`. `refused`: an error with `code` that names the facts of `says`.
        why: Reason of the outcome, and what to do about a refusal, for the page.
        make: Writes the source into the folder that it is given, which does not exist yet.
        code: Code of the refusal.
        says: Words that the refusal, or one of the notes, must hold.
    """

    name: str
    form: str
    outcome: Outcome
    why: str
    make: Callable[[Path], Crafted]
    code: str = ""
    says: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a case that could not fail."""
        if (self.outcome == "refused") != bool(self.code):
            raise ValueError(f"case {self.name}: exactly the refused ones have a code")
        if self.outcome != "exact" and not self.says:
            raise ValueError(f"case {self.name}: name the facts that the user must be told")


def cases() -> dict[str, tuple[Case, ...]]:
    """All cases by area."""
    return {area: tuple(importlib.import_module(f"conversion.crafted.{area}").CASES) for area in AREAS}


# -- Builders


def checkpoint(folder: Path, arch: str = "arcee", *, dtype: str = "bfloat16", seed: int = 0, **changes: Any) -> Any:
    """Write a random checkpoint of one layer with its tokenizer.

    Args:
        folder: Where to write it.
        arch: `arcee` or `llama`.
        dtype: Type of its weights, as torch names it.
        seed: Of its weights.
        changes: Fields of its configuration (see `tiny.ARCEE`).

    Returns:
        The model in memory, at f32, for `Crafted.reference`.
    """
    import torch
    import transformers

    name = {"arcee": "Arcee", "llama": "Llama"}[arch]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**tiny.ARCEE, "num_hidden_layers": 1, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = 2
    kind = getattr(torch, dtype)
    copy.deepcopy(model).to(kind).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    # Only what the file holds is rounded: frequencies of the rotary embedding are computed at f32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind).float()
    return model


def tensors_of(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint of one file."""
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}


def edit_tensors(folder: Path, changes: Mapping[str, Any]) -> None:
    """Add or replace tensors of a checkpoint of one file; None deletes one."""
    from safetensors.torch import save_file

    tensors = {**tensors_of(folder), **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of `config.json`; None deletes one."""
    tiny.edit_json(folder / "config.json", **changes)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(fields), encoding="utf-8")


# -- The page

HEAD = """\
# Sources: what is exported, and what is refused

A source is exported as it is, or it is refused with the reason; nothing of it is left out in silence. Each row below is
a small checkpoint that the test suite makes, exports by the real function, and compares with a reference that does not
go through ov_afm: the model as it was before it was saved, PEFT, or transformers.

- **exact**: logits at f32 equal the reference's, tokens and templates are the same.
- **converted with a note**: the same; `export` says what the source leaves open, and what was done.
- **refused**: one line that names what was found, and what to do. Nothing is written.

This page is generated from the tests (`tests/support/crafted.py`); a test holds it up to date.
"""


def page() -> str:
    """The text of `docs/sources.md`."""
    parts = [HEAD]
    for area, held in cases().items():
        if held:
            rows = [f"| {case.form} | {_outcome(case)} | {case.why} |" for case in held]
            parts.append("\n".join([f"\n## {AREAS[area]}\n", "| form | outcome | why |", "|---|---|---|", *rows, ""]))
    return "".join(parts)


def _outcome(case: Case) -> str:
    return f"refused (`{case.code}`)" if case.code else case.outcome


if __name__ == "__main__":
    print(page(), end="")
