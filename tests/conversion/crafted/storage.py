"""Weight files: which of the files in a folder are the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import crafted
from support.crafted import Case, Crafted

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
# The test compares logits itself.
QUICK = {"verify": False}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def shard(folder: Path) -> dict[str, str]:
    """Split the weights of a checkpoint; returns the map of its index."""
    from safetensors.torch import save_file

    held = crafted.tensors_of(folder)
    names = sorted(held)
    halves = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, its in halves.items():
        save_file({name: held[name] for name in its}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, its in halves.items() for name in its}
    crafted.write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    (folder / SINGLE).unlink()
    return places


def hashed(*names: str) -> Callable[[Path], None]:
    """Checks that the manifest has the digests of these files and of no other."""

    def check(output: Path) -> None:
        recorded = json.loads((output / "ov_afm.json").read_text())["source"]["weights"]
        assert sorted(recorded) == sorted(names)

    return check


def shards(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    shard(folder)
    return Crafted(model, options=QUICK, check=hashed(*SHARDS))


def stale_beside_shards(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    shutil.copy(folder / SINGLE, folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / SINGLE)
    return Crafted()


def index_of_one(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    crafted.write_json(folder / INDEX, {"weight_map": dict.fromkeys(crafted.tensors_of(folder), SINGLE)})
    return Crafted(model, options=QUICK, check=hashed(SINGLE))


def shard_gone(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    shard(folder)
    (folder / SHARDS[1]).unlink()
    return Crafted()


def index_elsewhere(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    places = shard(folder)
    shutil.copy(folder / SHARDS[1], folder.parent / SHARDS[1])
    places = {name: file.replace(SHARDS[1], f"../{SHARDS[1]}") for name, file in places.items()}
    crafted.write_json(folder / INDEX, {"weight_map": places})
    return Crafted()


def twice(folder: Path) -> Crafted:
    from safetensors.torch import load_file, save_file

    crafted.checkpoint(folder)
    shard(folder)
    first, second = (load_file(folder / name) for name in SHARDS)
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, folder / SHARDS[1], metadata={"format": "pt"})
    return Crafted()


def without_index(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    shard(folder)
    (folder / INDEX).unlink()
    return Crafted()


def others_beside(folder: Path) -> Crafted:
    """Other weights under names that are not the model's: none of them may be read."""
    model = crafted.checkpoint(folder)
    other = folder.parent / "other"
    stale = crafted.checkpoint(other, seed=1).state_dict()
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        shutil.copy(other / SINGLE, folder / name)
    torch.save(stale, folder / "pytorch_model.bin")
    torch.save({"state": 1}, folder / "optimizer.pt")
    return Crafted(model, options={"allow_pickle": True, **QUICK}, check=hashed(SINGLE))


def pickled(*names: str) -> Callable[[Path], Crafted]:
    """A checkpoint of pickles, beside what a trainer leaves."""

    def make(folder: Path) -> Crafted:
        model = crafted.checkpoint(folder)
        held = list(crafted.tensors_of(folder).items())
        (folder / SINGLE).unlink()
        for index, name in enumerate(names):
            torch.save(dict(held[index :: len(names)]), folder / name)
        if len(names) > 1:
            places = {tensor: names[index % len(names)] for index, (tensor, _) in enumerate(held)}
            crafted.write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
            torch.save({"state": torch.zeros(3)}, folder / name)
        return Crafted(model, options={"allow_pickle": True, **QUICK}, check=hashed(*names))

    return make


def optimizer_only(folder: Path) -> Crafted:
    pickled("pytorch_model.bin")(folder)
    (folder / "pytorch_model.bin").unlink()
    return Crafted(options={"allow_pickle": True})


def pickle_of(content: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Crafted]:
    def make(folder: Path) -> Crafted:
        crafted.checkpoint(folder)
        torch.save(content(crafted.tensors_of(folder)), folder / "pytorch_model.bin")
        (folder / SINGLE).unlink()
        return Crafted(options={"allow_pickle": True})

    return make


def adapter_beside(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    crafted.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "other/model"})
    return Crafted()


def chosen_by_config(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    other = folder.parent / "other"
    crafted.checkpoint(other, seed=1)
    shutil.copy(other / SINGLE, folder / "other.safetensors")
    crafted.edit_config(folder, transformers_weights="other.safetensors")
    return Crafted()


CASES = [
    Case("shards", "several files with an index", "exact", "all of them are loaded and hashed", shards),
    Case("index-of-one", "one file with an index that lists it", "exact", "there is only one choice", index_of_one),
    Case(
        "others-beside",
        "`consolidated.safetensors`, `pytorch_model.bin`, `optimizer.pt` beside `model.safetensors`",
        "exact",
        "`model.safetensors` is the model; nothing else is loaded or hashed, also with `--allow-pickle`",
        others_beside,
    ),
    Case(
        "stale-file",
        "`model.safetensors` beside shards and their index",
        "refused",
        "transformers would load the file, other programs the shards; delete what is not meant",
        stale_beside_shards,
        "weights-ambiguous",
        (SINGLE, INDEX),
    ),
    Case(
        "shard-gone",
        "an index that lists a file that is not there",
        "refused",
        "fetch it again",
        shard_gone,
        "weights-incomplete",
        (SHARDS[1],),
    ),
    Case(
        "index-elsewhere",
        "an index that lists a file in another folder",
        "refused",
        "only files of the checkpoint are read",
        index_elsewhere,
        "weights-index-damaged",
        (f"../{SHARDS[1]}",),
    ),
    Case(
        "tensor-twice",
        "one tensor in two shards",
        "refused",
        "which is read would be chance; fetch the checkpoint again",
        twice,
        "weights-ambiguous",
        ("both hold",),
    ),
    Case(
        "without-index",
        "shards without an index",
        "refused",
        "fetch `model.safetensors.index.json`",
        without_index,
        "weights-missing",
        (SHARDS[0], "index"),
    ),
    Case(
        "pickle",
        "`pytorch_model.bin` and what a trainer leaves, with `--allow-pickle`",
        "exact",
        "only `pytorch_model.bin` is loaded and hashed",
        pickled("pytorch_model.bin"),
    ),
    Case(
        "pickled-shards",
        "several pickles with an index, with `--allow-pickle`",
        "exact",
        "only those that the index lists are loaded and hashed",
        pickled("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    ),
    Case(
        "optimizer-only",
        "`optimizer.pt` and no weights, with `--allow-pickle`",
        "refused",
        "a trainer's state is no model",
        optimizer_only,
        "weights-missing",
        ("no weights",),
    ),
    Case(
        "pickle-of-more",
        "a pickle of a whole training state",
        "refused",
        "save the model's `state_dict` alone",
        pickle_of(lambda held: {"model": held, "epoch": 3}),
        "weights-damaged",
        ("state_dict",),
    ),
    Case(
        "adapter-beside",
        "a LoRA adapter in the model's own folder",
        "refused",
        "transformers would apply it; move it out, and merge it with `--merge-adapter`",
        adapter_beside,
        "source-holds-adapter",
        ("adapter_config.json",),
    ),
    Case(
        "chosen-by-config",
        "`transformers_weights` in `config.json` that names another file",
        "refused",
        "other programs read `model.safetensors`; rename the file that is meant",
        chosen_by_config,
        "weights-ambiguous",
        ("other.safetensors",),
    ),
]
