"""LoRA adapters that are merged into their base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import adapters, crafted, tiny
from support.crafted import Case, Crafted

MERGED = "as PEFT computes it beside the model; the proof of the export compares both"


def of(*, tied: bool = False, edit: Callable[[Path], object] | None = None, **changes: Any) -> Any:
    """A maker of a checkpoint with an adapter of PEFT to merge.

    Args:
        tied: The base model's embedding is its head.
        edit: Changes the adapter's folder, which is then refused.
        changes: Fields of the adapter's `LoraConfig`.
    """

    def make(folder: Path) -> Crafted:
        crafted.checkpoint(folder, dtype="float32", tie_word_embeddings=tied)
        adapter = adapters.write(folder, folder.parent / "adapter", **changes)
        reference = None
        if edit is None:
            reference = adapters.attached(folder, adapter)
        else:
            edit(adapter)
        return Crafted(reference, options={"adapters": [adapter]})

    return make


def as_it_is(folder: Path) -> None:
    """No edit: refused as PEFT wrote it."""


def config(**changes: Any) -> Callable[[Path], object]:
    """An edit of `adapter_config.json`."""
    return lambda folder: tiny.edit_json(folder / "adapter_config.json", **changes)


def pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def elsewhere(folder: Path) -> Crafted:
    made: Crafted = of()(folder)
    config(base_model_name_or_path="org/another-model")(folder.parent / "adapter")
    return made


BOTH = ["q_proj", "embed_tokens", "lm_head"]
PEFT = "merge it with PEFT and export the result"

CASES: list[Case] = [
    Case(
        "scales",
        "LoRA on any layer, embedding and head included, with rsLoRA, `rank_pattern`, `alpha_pattern`",
        "exact",
        MERGED,
        of(target_modules=BOTH, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"lm_head": 3}),
    ),
    Case(
        "pissa",
        "PiSSA or OLoRA (`init_lora_weights`)",
        "exact",
        "what the adapter started with is taken out of the base model, as PEFT does when it loads it",
        of(init_lora_weights="pissa"),
    ),
    Case(
        "tied-dora",
        "LoRA or DoRA on embedding and head, of a model where both are one matrix",
        "exact",
        "the head gets its own matrix; PEFT's own merge changes both with either",
        of(tied=True, target_modules=BOTH, use_dora=True),
    ),
    Case(
        "tied-saved",
        "`modules_to_save` with embedding and head, of a model where both are one matrix",
        "exact",
        "the head gets its own matrix",
        of(tied=True, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    Case(
        "tokens",
        "`trainable_token_indices`, of a model where embedding and head are one matrix",
        "exact",
        "rows of both are replaced",
        of(tied=True, trainable_token_indices=[11, 21, 500]),
    ),
    Case(
        "another-base",
        "an adapter that names another base model",
        "converted with a note",
        "it may be a copy under another name; shapes that differ are refused",
        elsewhere,
        says=("'org/another-model'", "same model"),
    ),
    Case(
        "fast-pissa",
        "starts that cannot be computed again: fast PiSSA, CorDA, LoRA-GA, LoftQ",
        "refused",
        "save it with PEFT's `path_initial_model_for_weight_conversion`, which makes it a plain LoRA",
        of(edit=config(init_lora_weights="pissa_niter_4")),
        "adapter-start",
        ("pissa_niter_4", "path_initial_model_for_weight_conversion"),
    ),
    Case(
        "alora",
        "what no merge can express: aLoRA, Arrow, MonteCLoRA, layer replication, QALoRA",
        "refused",
        "run it with PEFT",
        of(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM", edit=as_it_is),
        "adapter-unsupported",
        ("aLoRA", "PEFT"),
    ),
    Case(
        "parameters",
        "`target_parameters`, KaSA, BD-LoRA",
        "refused",
        PEFT,
        of(target_modules=["q_proj"], target_parameters=["up_proj.weight"], edit=as_it_is),
        "adapter-unsupported",
        ("target_parameters", "merge_and_unload"),
    ),
    Case(
        "other-kind",
        "PEFT's other kinds: IA3, AdaLoRA, LoHa, prompt tuning, …",
        "refused",
        f"{PEFT}, where PEFT can merge it",
        of(edit=config(peft_type="IA3")),
        "adapter-kind",
        ("IA3", "merge_and_unload"),
    ),
    Case(
        "unknown-field",
        "a field of `adapter_config.json` that is not known, and not empty",
        "refused",
        f"{PEFT}, or delete the field if it changes nothing after training",
        of(edit=config(use_newest=True)),
        "adapter-field-unknown",
        ("use_newest", "merge_and_unload"),
    ),
    Case(
        "ignored",
        "tensors that the configuration does not ask for (PEFT ignores them)",
        "refused",
        "correct the configuration",
        of(edit=config(target_modules=["q_proj"])),
        "adapter-inconsistent",
        ("up_proj", "target_modules"),
    ),
    Case(
        "pickle",
        "`adapter_model.bin` alone",
        "refused",
        "the message has the command that writes it as safetensors without running code",
        of(edit=pickle),
        "adapter-pickled",
        ("weights_only=True",),
    ),
]
