"""Tensors: names, shapes and types that the files hold and the architecture expects."""

from __future__ import annotations

from pathlib import Path

from support import crafted
from support.crafted import Case, Crafted


def arcee(folder: Path) -> Crafted:
    return Crafted(crafted.checkpoint(folder))


def llama(folder: Path) -> Crafted:
    return Crafted(crafted.checkpoint(folder, "llama"))


def missing(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    crafted.edit_tensors(folder, {"model.layers.0.mlp.up_proj.weight": None})
    return Crafted()


CASES = [
    Case("arcee", "`ArceeForCausalLM`", "exact", "every tensor is compared with its file", arcee),
    Case("llama", "`LlamaForCausalLM`", "exact", "every tensor is compared with its file", llama),
    Case(
        "missing",
        "a tensor of the architecture that no file holds",
        "refused",
        "transformers would fill it with random numbers; fetch the checkpoint again",
        missing,
        code="weights-missing",
        says=("model.layers.0.mlp.up_proj.weight",),
    ),
]
