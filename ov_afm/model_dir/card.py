"""The README.md of a model directory: a Hub-style model card made from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..system.console import markdown_table
from .manifest import Manifest
from .text_encoder import EMBEDDING, RERANKING

__all__ = ["check_lines", "render"]

CARD = """---
{front}
---

# {name} {recipe} (OpenVINO)

{source} converted to [OpenVINO](https://docs.openvino.ai) IR by ov_afm: recipe `{recipe}`.

{facts}

## Checks made at export

{checks}

The numbers are in `ov_afm.json`, with the sha256 of every file.

## Run it

With ov_afm:

```sh
pip install .  # in a clone of ov_afm
ov-afm generate PATH_TO_THIS_FOLDER "What is the capital of France?"
```

With OpenVINO GenAI:

```python
import openvino_genai

pipeline = openvino_genai.LLMPipeline("PATH_TO_THIS_FOLDER", "CPU")
print(pipeline.generate("What is the capital of France?", max_new_tokens=100))
```

With OpenVINO Model Server:

```sh
ovms --rest_port 8000 --model_path PATH_TO_THIS_FOLDER --model_name {name} --task text_generation
```
"""


ENCODER_CARD = (
    CARD.partition("ov-afm generate")[0]
    + """ov-afm serve --model {name}=PATH_TO_THIS_FOLDER  # answers at {route}
```
"""
)
ENCODER_CHECKS = {"encoder": "before compression, against transformers", "encoder_compression": "compression"}
TAGS = {EMBEDDING: "feature-extraction", RERANKING: "text-ranking"}


def render(manifest: Manifest) -> str:
    """Text of the card."""
    source, recipe, versions = manifest.source, manifest.recipe, manifest.versions
    hub = source["kind"] == "hub"
    front = [
        *([f"license: {source['license']}"] if source.get("license") else []),
        *([f"base_model: {source['id']}", "base_model_relation: quantized"] if hub else []),
        "library_name: openvino",
        "pipeline_tag: text-generation",
        "tags:\n- openvino\n- ov_afm\n- nncf",
    ]
    name = source["id"].rpartition("/")[2]
    origin = f"[{source['id']}](https://huggingface.co/{source['id']})" if hub else f"`{source['id']}`"
    if source.get("synthetic"):
        origin = f"A synthetic checkpoint of random weights ({origin}; it speaks no language)"
    facts = {
        "architecture": manifest.geometry.architecture if manifest.geometry else None,
        "source revision": source.get("revision"),
        "weights": ", ".join(f"{count} × {kind}" for kind, count in recipe.get("layers", {}).items()) or recipe["name"],
        "calibration data": (recipe.get("calibration") or {}).get("name"),
        "context": f"{manifest.geometry.max_positions} tokens" if manifest.geometry else None,
        "made with": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
    }
    if encoder := manifest.text_encoder:
        front[front.index("pipeline_tag: text-generation")] = f"pipeline_tag: {TAGS[encoder.task]}"
        facts["context"] = f"{encoder.max_tokens} tokens"
        facts["embedding"] = f"{encoder.dimensions} numbers, {encoder.pooling} pooling" if encoder.pooling else None
    return (ENCODER_CARD if encoder else CARD).format(
        route="/v1/embeddings" if encoder and encoder.pooling else "/v1/rerank",
        front="\n".join(front),
        source=origin,
        recipe=recipe["name"],
        facts=markdown_table(["", ""], [(key, value) for key, value in facts.items() if value]),
        checks="\n".join(f"- {line}" for line in check_lines(manifest.checks)) or "- none",
        name=name,
    )


def check_lines(checks: Mapping[str, Any]) -> list[str]:
    """The checks of a manifest, one line for people each."""
    lines = []
    if template := checks.get("chat_template"):
        text = template.get("skipped") or "byte for byte as the source renders it"
        if others := template.get("genai_differs"):
            text += f"; but not by OpenVINO GenAI's own engine: {', '.join(others)}"
        lines.append(f"chat template: {text}")
    if tokenizer := checks.get("tokenizer"):
        lines.append(
            f"tokenizer: {tokenizer['tokens']} tokens of {tokenizer['texts']} texts, ids and text as the source"
        )
    if weights := checks.get("weights"):
        how = f" ({weights['on_sampled_rows']} of them on sampled rows)" if weights["on_sampled_rows"] else ""
        cast = ", ".join(f"{count} tensors from {change}" for change, count in weights.get("cast", {}).items())
        equal = f"as the source, cast from its type ({cast})" if cast else "bit for bit as the source"
        lines.append(f"weights before compression: {weights['matrices']} matrices {equal}{how}")
    if parity := checks.get("export_parity"):
        lines.append(f"logits before compression: {_parity(parity)}")
    if merged := checks.get("adapters"):
        lines.append(f"merged adapters against PEFT: {_parity(merged)}")
    lines += [f"{what}: {_encoder(checks[name])}" for name, what in ENCODER_CHECKS.items() if name in checks]
    if cost := checks.get("compression"):
        lines.append(f"compression: {cost.get('skipped') and 'not measured, ' + cost['skipped'] or _cost(cost)}")
    if golden := checks.get("golden"):
        lines.append(f"reference answers: {len(golden['prompts'])}, for the self-test of devices")
    if "skipped" in checks:
        lines.append(f"not verified: {checks['skipped']}")
    return lines


def _parity(parity: Mapping[str, Any]) -> str:
    if not {"tokens", "max_logit", "max_logit_diff", "top1_agreement"} <= parity.keys():
        return f"not compared, {parity['skipped']}"
    text = (
        f"largest difference {parity['max_logit_diff']:.1e} of {parity['max_logit']:.3g}, "
        f"top-1 {parity['top1_agreement']:.1%} on {parity['tokens']} tokens (f32)"
    )
    return f"{text}; left out: {parity['skipped']}" if "skipped" in parity else text


def _encoder(check: Mapping[str, Any]) -> str:
    if "cosine_min" in check:
        return f"cosine at least {check['cosine_min']:.7f} on {check['texts']} texts (f32)"
    return f"scores differ by at most {check['max_diff']:.1e} on {check['texts']} texts (f32)"


def _cost(cost: Mapping[str, Any]) -> str:
    return (
        f"KL divergence {cost['kl_mean']:.4f} nats on average, top-1 {cost['top1_agreement']:.1%} "
        f"on {cost['tokens']} tokens (f32)"
    )
