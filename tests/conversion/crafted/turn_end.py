"""The tokens that end an answer, wherever a source names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import crafted, templates, tiny
from support.crafted import Case, Crafted

END, TEXT, WORD, MORE = 2, 0, 300, 301


def speaker(folder: Path, *, eos: str, ends: Any, template: str = templates.PLAIN) -> None:
    """A checkpoint that answers with one token, then `<|im_end|>`, then goes on: its layers add nothing."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    crafted.checkpoint(folder, "llama")
    tiny.edit_json(folder / "tokenizer_config.json", eos_token=eos)
    (folder / "chat_template.jinja").write_text(template)
    crafted.write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": ends})
    last = AutoTokenizer.from_pretrained(folder)("assistant\n", add_special_tokens=False)["input_ids"][-1]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = torch.nn.functional.normalize(torch.randn(512, 64, generator=torch.Generator().manual_seed(3)), dim=1)
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.zero_()
        for before, after in ((last, WORD), (WORD, END), (END, MORE), (MORE, WORD)):
            model.lm_head.weight[after] += 10 * rows[before]
    model.save_pretrained(folder)
    crafted.write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": ends})


def stops(*ids: int) -> Callable[[Path], None]:
    """Checks that an answer ends where the model says so, here and in any program that reads the file."""

    def check(output: Path) -> None:
        import openvino_genai

        from ov_afm import Pipeline
        from ov_afm.runtime.sampling import Params

        with Pipeline(output, INFERENCE_PRECISION_HINT="f32") as pipeline:
            answer = pipeline.generate("hi", Params(max_new_tokens=12))
        assert (answer.finish_reason, answer.metrics.new_tokens) == ("stop", 2)
        assert "<|" not in answer.text
        assert openvino_genai.GenerationConfig(output / "generation_config.json").stop_token_ids == set(ids)
        named = json.loads((output / "ov_afm.json").read_text())["generation"]["stop_tokens"]
        assert {each["id"] for each in named} == set(ids)

    return check


def of_the_tokenizer(folder: Path) -> Crafted:
    speaker(folder, eos="<|im_end|>", ends=TEXT, template=templates.ALPACA.replace("### Assistant:", "assistant"))
    return Crafted(check=stops(TEXT, END))


def of_the_template(folder: Path) -> Crafted:
    speaker(folder, eos="<|endoftext|>", ends=[TEXT])
    return Crafted(check=stops(TEXT, END))


def without(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    tiny.edit_json(folder / "tokenizer_config.json", eos_token=None)
    (folder / "chat_template.jinja").write_text(templates.ALPACA)
    crafted.edit_config(folder, eos_token_id=None)
    crafted.write_json(folder / "generation_config.json", {"pad_token_id": 2})
    return Crafted(model)


CASES = [
    Case(
        "tokenizer",
        "an `eos_token` of the tokenizer that `generation_config.json` does not name",
        "converted with a note",
        "answers end there too; it is added to `eos_token_id`, for other programs",
        of_the_tokenizer,
        says=("<|im_end|> (2) is the tokenizer's end-of-text token",),
    ),
    Case(
        "template",
        "a chat template that ends turns with `<\\|im_end\\|>`, which nothing else names",
        "converted with a note",
        "answers end there too; it is added to `eos_token_id`, for other programs",
        of_the_template,
        says=("<|im_end|> (2) is the end of a turn in the chat template",),
    ),
    Case(
        "none",
        "no token that ends an answer, anywhere",
        "converted with a note",
        "answers run to their limit",
        without,
        says=("nothing names a token that ends an answer",),
    ),
]
