"""The model card says what the manifest knows, in the Hub's form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ov_afm.model_dir import card, manifest
from ov_afm.model_dir.geometry import Geometry


def front_of(text: str) -> str:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return found[1]


def contents(**source: Any) -> manifest.Manifest:
    return manifest.Manifest(
        source={"kind": "hub", "id": "arcee-ai/AFM-4.5B", "revision": "abc", "license": "apache-2.0", **source},
        geometry=Geometry("ArceeForCausalLM", 2560, 36, 20, 4, 128, 18432, 128004, 65536, "relu2"),
        recipe={"name": "int4", "layers": {"int4_sym g128": 252}, "calibration": {"name": "data.txt"}},
        versions={"openvino": "2026.4.1", "torch": None},
    )


def test_front_matter_names_licence_base_model_and_task() -> None:
    assert front_of(card.render(contents())).splitlines() == [
        "license: apache-2.0",
        "base_model: arcee-ai/AFM-4.5B",
        "base_model_relation: quantized",
        "library_name: openvino",
        "pipeline_tag: text-generation",
        "tags:",
        "- openvino",
        "- ov_afm",
        "- nncf",
    ]


def test_unknown_licence_and_local_source_are_not_invented() -> None:
    front = front_of(card.render(contents(kind="folder", id="mine", license=None)))
    assert "license" not in front
    assert "base_model" not in front


def test_facts_are_there_and_empty_ones_are_not() -> None:
    text = card.render(contents())
    assert "| weights | 252 × int4_sym g128 |" in text
    assert "| source revision | abc |" in text
    assert "| calibration data | data.txt |" in text
    assert "| context | 65536 tokens |" in text
    assert "| made with | openvino 2026.4.1 |" in text
    assert "None" not in text


def test_synthetic_weights_are_called_so() -> None:
    assert "A synthetic checkpoint of random weights" in card.render(contents(synthetic=True))


def test_card_of_a_real_export_lists_its_checks_and_three_ways_to_run_it(tiny_model: Path) -> None:
    text = (tiny_model / "README.md").read_text(encoding="utf-8")
    for line in (
        "- chat template: byte for byte as the source renders it",
        "- weights before compression: 14 matrices bit for bit as the source",
        "- compression: KL divergence 0.",
        "ov-afm generate ",
        "openvino_genai.LLMPipeline(",
        "ovms --rest_port",
    ):
        assert line in text


def test_what_was_left_out_is_said() -> None:
    lines = card.check_lines(
        {
            "chat_template": {"skipped": "the source has no chat template"},
            "export_parity": {"skipped": "one layer needs 9.0 GB of memory, 1.0 GB are free"},
            "compression": {"skipped": "the uncompressed model does not fit in memory"},
            "skipped": "asked for with --no-verify",
        }
    )
    assert lines == [
        "chat template: the source has no chat template",
        "logits before compression: not compared, one layer needs 9.0 GB of memory, 1.0 GB are free",
        "compression: not measured, the uncompressed model does not fit in memory",
        "not verified: asked for with --no-verify",
    ]


def test_what_genai_renders_differently_is_said() -> None:
    template = {"conversations": 24, "equal": True, "genai_differs": {"tools": "it fails", "a tool call": "it fails"}}
    assert card.check_lines({"chat_template": template}) == [
        "chat template: byte for byte as the source renders it; but not by OpenVINO GenAI's own engine: "
        "tools, a tool call"
    ]


def test_partial_proof_says_what_it_left_out() -> None:
    parity = {"tokens": 9, "max_logit_diff": 1e-6, "max_logit": 8.0, "top1_agreement": 1.0, "skipped": "layers 3 to 36"}
    assert card.check_lines({"export_parity": parity}) == [
        "logits before compression: largest difference 1.0e-06 of 8, top-1 100.0% on 9 tokens (f32); "
        "left out: layers 3 to 36"
    ]


def test_weights_of_another_type_are_not_called_bit_for_bit() -> None:
    weights = {"matrices": 14, "on_sampled_rows": 2, "equal": True, "cast": {"bfloat16 to float16": 19}}
    assert card.check_lines({"weights": weights}) == [
        "weights before compression: 14 matrices as the source, cast from its type "
        "(19 tensors from bfloat16 to float16) (2 of them on sampled rows)"
    ]
