"""Tensors: names, shapes and types that the files hold and the architecture expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import crafted
from support.crafted import IDS, Case, Crafted

from ov_afm.model_dir.inference import ir_logits

# The test compares logits itself.
QUICK = {"verify": False}
LAYER = "model.layers.0"


def arcee(folder: Path) -> Crafted:
    return Crafted(crafted.checkpoint(folder))


def llama(folder: Path) -> Crafted:
    return Crafted(crafted.checkpoint(folder, "llama", attention_bias=True, mlp_bias=True))


def edited(changes: Mapping[str, Any], **config: Any) -> Callable[[Path], Crafted]:
    """An Arcee checkpoint with tensors added, replaced, or, where None, taken out; the model in memory is unchanged."""

    def make(folder: Path) -> Crafted:
        model = crafted.checkpoint(folder, **config)
        crafted.edit_tensors(folder, changes)
        return Crafted(model, options=QUICK)

    return make


def layers_beyond(folder: Path) -> Crafted:
    crafted.checkpoint(folder, num_hidden_layers=2)
    crafted.edit_config(folder, num_hidden_layers=1)
    return Crafted()


def vocabulary_of_another(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    crafted.edit_config(folder, vocab_size=500)
    return Crafted()


def wrapped(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    held = crafted.tensors_of(folder)
    crafted.edit_tensors(folder, {**dict.fromkeys(held), **{f"module.{name}": value for name, value in held.items()}})
    return Crafted()


# -- The rotary embedding's frequencies, as older versions of transformers wrote them into each layer


def frequencies(theta: float) -> dict[str, Any]:
    return {f"{LAYER}.self_attn.rotary_emb.inv_freq": theta ** -(torch.arange(8) / 8)}


# -- Embedding and head


def without_head(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder, tie_word_embeddings=True)
    held = crafted.tensors_of(folder)
    assert "lm_head.weight" not in held
    bare = {name.removeprefix("model."): value for name, value in held.items()}
    crafted.edit_tensors(folder, {**dict.fromkeys(held), **bare})
    return Crafted(model, options=QUICK)


def head_twice(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder, tie_word_embeddings=True)
    embedding = crafted.tensors_of(folder)["model.embed_tokens.weight"]
    crafted.edit_tensors(folder, {"lm_head.weight": embedding.clone()})
    return Crafted(model, options=QUICK)


def own_head(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    crafted.edit_config(folder, tie_word_embeddings=True)

    def check(output: Path) -> None:
        assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
        weights = json.loads((output / "ov_afm.json").read_text())["checks"]["weights"]
        assert weights["matrices"] == 8

    return Crafted(model, check=check)


# -- Types


def at_int8(model: Any, cast: Mapping[str, int]) -> Crafted:
    """An export whose recipe leaves the type in memory to the source; the result is within what int8 costs."""

    def check(output: Path) -> None:
        weights = json.loads((output / "ov_afm.json").read_text())["checks"]["weights"]
        assert weights.get("cast", {}) == cast
        with torch.inference_mode():
            expected = model(torch.tensor([list(IDS)]), use_cache=False).logits[0].numpy()
        difference = np.abs(ir_logits(output / "openvino_model.xml", IDS) - expected)
        assert difference.max() < 0.05 * np.abs(expected).max()

    return Crafted(check=check, options={"recipe": "int8"})


def other_type(config: str, stored: str) -> Callable[[Path], Crafted]:
    def make(folder: Path) -> Crafted:
        model = crafted.checkpoint(folder, dtype=stored)
        crafted.edit_config(folder, dtype=config)
        return at_int8(model, {})

    return make


def norms_wider(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    norms = {name: value.float() for name, value in crafted.tensors_of(folder).items() if "norm" in name}
    crafted.edit_tensors(folder, norms)
    return at_int8(model, {"float32 to bfloat16": len(norms)})


def in_float64(folder: Path) -> Crafted:
    return at_int8(crafted.checkpoint(folder, dtype="float64"), {"float64 to float32": 11})


def beyond_float16(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    up = crafted.tensors_of(folder)[f"{LAYER}.mlp.up_proj.weight"]
    up[3, 5] = 1e5
    crafted.edit_tensors(folder, {f"{LAYER}.mlp.up_proj.weight": up})
    return Crafted(options={"recipe": "fp16"})


# -- Weights that are quantized already, by what gives them away


def in_float8(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    matrices = {name: value for name, value in crafted.tensors_of(folder).items() if "_proj" in name}
    scales = {f"{name}_scale": torch.tensor(0.01) for name in matrices}
    small = {name: (value.float() / 0.01).to(torch.float8_e4m3fn) for name, value in matrices.items()}
    crafted.edit_tensors(folder, {**small, **scales})
    return Crafted()


def says(file: str, fields: Mapping[str, Any]) -> Callable[[Path], Crafted]:
    def make(folder: Path) -> Crafted:
        crafted.checkpoint(folder)
        crafted.write_json(folder / file, fields)
        return Crafted()

    return make


def mlx(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    crafted.edit_config(folder, quantization={"group_size": 64, "bits": 4})
    return Crafted()


def kv_cache_only(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    fields = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    crafted.write_json(folder / "hf_quant_config.json", fields)
    return Crafted(model, options=QUICK)


QUANTIZED = "the values mean nothing without their scales; start from the bf16, fp16 or fp32 checkpoint"
UNKNOWN = "transformers would leave it out, and the model would be another; correct config.json"


def unknown(name: str, form: str, tensor: str, shape: tuple[int, ...], *also: str) -> Case:
    make = edited({tensor: torch.full(shape, 0.5, dtype=torch.bfloat16)})
    return Case(name, form, "refused", UNKNOWN, make, "tensors-unknown", (tensor, *also))


def quantized(name: str, form: str, make: Callable[[Path], Crafted], *facts: str) -> Case:
    return Case(name, form, "refused", QUANTIZED, make, "weights-quantized", facts)


CASES = [
    Case("arcee", "`ArceeForCausalLM`", "exact", "every tensor is compared with its file", arcee),
    Case("llama", "`LlamaForCausalLM` with biases", "exact", "every tensor is compared with its file", llama),
    unknown("bias", "a bias that `config.json` does not mention", f"{LAYER}.self_attn.q_proj.bias", (64,), "bias"),
    unknown("gate", "`gate_proj` in an Arcee checkpoint", f"{LAYER}.mlp.gate_proj.weight", (128, 64), "architectures"),
    unknown("q-norm", "`q_norm` in a Llama or Arcee checkpoint", f"{LAYER}.self_attn.q_norm.weight", (16,)),
    Case(
        "layers-beyond",
        "more layers than `config.json` says",
        "refused",
        UNKNOWN,
        layers_beyond,
        "tensors-unknown",
        ("model.layers.1.", "num_hidden_layers 1"),
    ),
    Case(
        "wrapped",
        "names with a prefix of a training program (`module.model…`)",
        "refused",
        "transformers would find none of them; save the model itself",
        wrapped,
        "tensors-unknown",
        ("module.lm_head.weight", "lacks 11"),
    ),
    Case(
        "missing",
        "a tensor of the architecture that no file holds",
        "refused",
        "transformers would fill it with random numbers; fetch the checkpoint again",
        edited({f"{LAYER}.mlp.up_proj.weight": None}),
        "weights-missing",
        (f"{LAYER}.mlp.up_proj.weight",),
    ),
    Case(
        "misshapen",
        "a tensor of another shape than `config.json` gives it",
        "refused",
        "the configuration is that of another model; fetch it again",
        vocabulary_of_another,
        "weights-misshapen",
        ("512 x 64", "500 x 64"),
    ),
    Case(
        "frequencies",
        "`rotary_emb.inv_freq` in the layers (older transformers)",
        "exact",
        "the frequencies follow from `config.json`; they are compared with those",
        edited(frequencies(10000.0)),
    ),
    Case(
        "frequencies-differ",
        "`rotary_emb.inv_freq` of another `rope_theta` than that of `config.json`",
        "refused",
        "one of the two is wrong",
        edited(frequencies(500000.0)),
        "rope-differs",
        ("inv_freq", "rope_theta 10000"),
    ),
    Case(
        "without-head", "a tied model saved without head and prefix", "exact", "the embedding is the head", without_head
    ),
    Case("head-twice", "a tied head that the file holds as well", "exact", "both are the same", head_twice),
    Case(
        "own-head",
        "`tie_word_embeddings`, and a head that is not the embedding",
        "converted with a note",
        "the files are the model: their head is used, and the result's `config.json` says so",
        own_head,
        says=("tie_word_embeddings",),
    ),
    Case(
        "no-head",
        "no head, and no `tie_word_embeddings`",
        "refused",
        "set `tie_word_embeddings` in `config.json`, or fetch the checkpoint again",
        edited({"lm_head.weight": None}),
        "weights-missing",
        ("lm_head.weight", "tie_word_embeddings"),
    ),
    Case(
        "wider-than-said",
        "float32 values, and float16 in `config.json`",
        "exact",
        "the files' own type is kept, unless the recipe is `fp32` or `fp16`",
        other_type("float16", "float32"),
    ),
    Case(
        "narrower-than-said",
        "bfloat16 values, and float32 in `config.json`",
        "exact",
        "the files' own type is kept",
        other_type("float32", "bfloat16"),
    ),
    Case(
        "norms-wider",
        "bfloat16 matrices with float32 norms",
        "converted with a note",
        "a model has one type in memory, that of most bytes; `--weight-format fp32` keeps all digits",
        norms_wider,
        says=("3 tensors were rounded", "float32 to bfloat16"),
    ),
    Case(
        "float64",
        "float64 values",
        "converted with a note",
        "rounded to float32",
        in_float64,
        says=("float64 to float32",),
    ),
    Case(
        "beyond-float16",
        "values beyond float16, exported with `--weight-format fp16`",
        "refused",
        "they would become infinite; use another recipe",
        beyond_float16,
        "weights-beyond-float16",
        (f"{LAYER}.mlp.up_proj.weight",),
    ),
    quantized("float8", "8-bit floats that only their type shows", in_float8, "F8_E4M3"),
    quantized(
        "scales",
        "`weight_scale` beside matrices",
        edited({f"{LAYER}.mlp.up_proj.weight_scale": torch.ones(1)}),
        "weight_scale",
    ),
    quantized(
        "int8",
        "8-bit integers",
        edited({f"{LAYER}.mlp.up_proj.weight": torch.ones(128, 64, dtype=torch.int8)}),
        "up_proj",
        "I8",
    ),
    quantized(
        "packed",
        "packed integers (`qweight`, `weight_packed`)",
        edited({f"{LAYER}.mlp.up_proj.qweight": torch.ones(16, 64, dtype=torch.int32)}),
        "qweight",
        "I32",
    ),
    quantized(
        "modelopt",
        "`hf_quant_config.json` with a `quant_algo`",
        says("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
        "hf_quant_config.json",
        "FP8",
    ),
    quantized(
        "gptq-file",
        "`quantize_config.json` (GPTQ)",
        says("quantize_config.json", {"bits": 4, "group_size": 128}),
        "quantize_config.json",
    ),
    quantized("mlx", "`quantization` in `config.json` (mlx-lm)", mlx, "quantized already"),
    Case(
        "kv-cache-only",
        "`hf_quant_config.json` for the KV cache alone",
        "exact",
        "the weights are not quantized",
        kv_cache_only,
    ),
]
