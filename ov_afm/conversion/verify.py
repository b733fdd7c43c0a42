"""Proof that an exported model is its source: same tokens, same template bytes, same weights, same logits.

Everything is compared at f32 (`inference.EXACT`). OpenVINO's defaults round activations and the KV cache, and then a
wrong export and a rounded one look alike. What compression costs is measured in the same way and recorded, not judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..model_dir.geometry import Geometry
from ..model_dir.inference import ir_logits
from ..model_dir.manifest import MODEL_XML
from ..quantization.cost import cost
from .tensors import row_step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CONVERSATIONS",
    "TEXTS",
    "compression_cost",
    "logits_equal",
    "measure",
    "save_reference",
    "tokenizer_equal",
    "weights_equal",
]

# Two f32 programs that sum in different orders differ by about 1e-6 of the largest logit. A hundred times that is far
# below any error of conversion, and above rounding on every CPU.
LOGIT_BOUND = 1e-4
TOP1_BOUND = 0.99

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    (
        {"role": "system", "content": "You are terse.\nAnswer in one line."},
        {"role": "user", "content": "  Zwei führende Leerzeichen, 你好, 🙂 and a tab\there  "},
    ),
    (
        {"role": "user", "content": 'Write <b>bold</b> & "quotes" \'n {{ braces }} {% raw %}'},
        {"role": "assistant", "content": "```python\nprint('hi')\n```\n"},
        {"role": "user", "content": "Again."},
    ),
    ({"role": "user", "content": ""},),
)
TEXTS: tuple[str, ...] = (
    "Hello, world! It's a test, isn't it? They'll say we've won; I'd say he's right.",
    "def fib(n: int) -> int:\n\treturn n if n < 2 else fib(n - 1) + fib(n - 2)  # O(2^n)\n\n\nprint(fib(10))\n",
    'SELECT "name", COUNT(*) FROM users WHERE id >= 100 AND x != \'y\' GROUP BY 1;\r\n{"a": [1, 2.5e-3, null]}',
    "1234567890 3.14159 1,000,000 0x1F 2024-02-29 12:34:56 +49-30-123456",
    "x  1 2  3, v2.0  10%\n\n7 (  8 ) ½  ¾",
    "spaces:    four,  two, \ttab,\n\nblank line,\n   indented,   \n trailing ",
    "你好，世界。これは試験です。한국어 문장도 있습니다. Привет, мир! שלום مرحبا",
    "🙂👩‍👩‍👧‍👦🇫🇷 e\u0301 é ﬁ ½ ² ∑∫√ — “quoted” …",
    "ALLCAPS camelCase snake_case kebab-case https://example.org/a?b=c&d=e#f user@example.org",
    "a" * 40 + " " + "ab" * 20 + " !!!!!!!! ???? ....",
)


def measure(
    checkpoint: Path, model_dir: Path, *, reference: Path | None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """All that is checked once a model directory has its final weights: tokenizer, template, cost of compression.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        model_dir: Model directory.
        reference: File that `save_reference` wrote; None where the source did not fit in memory.
        trust_remote_code: Let transformers run the checkpoint's own code.
    """
    checks = tokenizer_equal(checkpoint, model_dir, trust_remote_code=trust_remote_code)
    if reference is None:
        checks["compression"] = {"skipped": "the uncompressed model does not fit in memory"}
    else:
        checks["compression"] = compression_cost(model_dir / MODEL_XML, reference)
    return checks


# -- Tokenizer and chat template of the model directory against those of the source


def tokenizer_equal(checkpoint: Path, model_dir: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Compare chat template and tokenizer of a model directory with those of its source.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        model_dir: Model directory with converted tokenizers.
        trust_remote_code: Let transformers run the checkpoint's own code.

    Returns:
        The checks `chat_template` and `tokenizer`.

    Raises:
        ExportError: A rendering, an id or a decoded text differs.
    """
    import openvino_genai
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    exported = openvino_genai.Tokenizer(str(model_dir))
    return {"chat_template": _check_template(source, exported), "tokenizer": _check_tokens(source, exported)}


def _check_template(source: Any, exported: Any) -> dict[str, Any]:
    if not source.chat_template:
        return {"skipped": "the source has no chat template"}
    compared = refused = 0
    for conversation, open_turn in itertools.product(CONVERSATIONS, (True, False)):
        messages = list(conversation)
        try:
            expected = source.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
        except Exception:  # a template may refuse a role; then there is nothing to compare
            refused += 1
            continue
        rendered = exported.apply_chat_template(messages, add_generation_prompt=open_turn)
        if rendered != expected:
            at = _first_difference(rendered, expected)
            raise ExportError(
                f"the exported chat template differs from the source's at character {at}: "
                f"{rendered[at : at + 30]!r} where the source renders {expected[at : at + 30]!r}",
                code="chat-template-differs",
            )
        compared += 1
    return {"conversations": compared, "refused_by_source": refused, "equal": True}


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(one, other)) if a != b)


def _check_tokens(source: Any, exported: Any) -> dict[str, Any]:
    count = 0
    for text in TEXTS:
        expected = source(text, add_special_tokens=False)["input_ids"]
        ids = exported.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        if ids != expected:
            at = _first_difference(ids, expected)
            raise ExportError(
                f"the exported tokenizer differs from the source's at token {at} of {text[:24]!r}: "
                f"{ids[at : at + 5]} where the source gives {expected[at : at + 5]}",
                code="tokenizer-differs",
            )
        # The source itself may not return the text, because some tokenizers normalise it.
        decoded = exported.decode(ids)
        expected_text = source.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if decoded not in (expected_text, text):
            raise ExportError(
                f"the exported detokenizer gives {decoded[:24]!r} where the source gives {expected_text[:24]!r}",
                code="detokenizer-differs",
            )
        count += len(ids)
    return {"texts": len(TEXTS), "tokens": count, "equal": True}


# -- Weights and logits of the uncompressed IR against transformers


def weights_equal(model: Any, ir: Path) -> dict[str, Any]:
    """Compare the weight matrices of an IR with the checkpoint's, bit for bit.

    Matrices above 4 MiB are compared on evenly spaced rows.

    Args:
        model: The transformers model that was exported.
        ir: Path of `openvino_model.xml`, constants in the model's own type.

    Raises:
        ExportError: A matrix differs (named) or is not in the IR.
    """
    import torch

    source = {name: value for name, value in model.state_dict().items() if value.ndim == 2 and name.endswith(".weight")}
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        source.pop("lm_head.weight", None)
    compared = sampled = 0
    for name, data in _matrices(ir):
        if name not in source:
            continue
        weight = source.pop(name)
        step = row_step(weight)
        rows = weight[::step].contiguous().view(torch.uint8).numpy()
        if rows.tobytes() != data[::step].tobytes():
            raise ExportError(
                f"the IR's {name} differs from the checkpoint's; the conversion is wrong", code="weights-differ"
            )
        compared += 1
        sampled += step > 1
    if source:
        raise ExportError(
            f"{len(source)} weight matrices were not found in the IR, the first is {next(iter(source))}",
            code="weights-missing",
        )
    return {"matrices": compared, "on_sampled_rows": sampled, "equal": True}


def _matrices(ir: Path) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Weight matrices of an IR under their checkpoint names; Optimum keeps these in the constants' names."""
    import openvino

    for node in openvino.Core().read_model(ir).get_ops():
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 2:
            name = node.get_friendly_name().removeprefix("self.")
            yield name.removesuffix("._openvino_orig_weight").removesuffix(".weight") + ".weight", node.data


def proof_length(config: Any) -> int:
    """Tokens of the proof's prompt: past the YaRN original length where there is one, within the context."""
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or 256
    return int(min(original + 64, config.max_position_embeddings))


def proof_memory(config: Any, tokens: int, **shape: int) -> float:
    """Bytes that the comparison takes: f32 weights and activations in torch and in OpenVINO.

    Args:
        config: The model's configuration.
        tokens: Length of the prompt.
        shape: Fields of `config` that are smaller in what is compared.
    """
    geometry = Geometry.from_config({**config.to_dict(), **shape})
    weights = geometry.parameters(tied=bool(config.tie_word_embeddings))
    # Weights exist twice, once in each engine; the engines run one after the other.
    activations = tokens * (2 * geometry.intermediate + 8 * geometry.hidden + 3 * geometry.vocab) + 4 * tokens * tokens
    return float(1e9 + 4.0 * (2 * weights + activations))


def prompt(config: Any, tokens: int) -> list[int]:
    """Varied token ids, the same on every machine: a walk over the vocabulary."""
    return [(7919 * i * i + 104_729 * i + 11) % config.vocab_size for i in range(1, tokens + 1)]


def logits_equal(model: Any, ir: Path, ids: Sequence[int]) -> dict[str, Any]:
    """Logits of an IR at f32 against transformers at f32, at every position of a prompt.

    Args:
        model: The transformers model, in float32.
        ir: Path of `openvino_model.xml`.
        ids: Token ids of the prompt.

    Returns:
        tokens, max_logit_diff, max_logit, top1_agreement, bound.

    Raises:
        ExportError: A difference is above the bound, or a logit is not finite.
    """
    import numpy as np

    expected = _source_logits(model, ids)
    measured = ir_logits(ir, ids)
    scale = float(np.abs(expected).max())
    difference = float(np.abs(measured - expected).max())
    agreement = float((measured.argmax(-1) == expected.argmax(-1)).mean())
    result = {
        "tokens": len(ids),
        "max_logit_diff": difference,
        "max_logit": scale,
        "top1_agreement": agreement,
        "bound": f"diff <= {LOGIT_BOUND:g} x max(1, max_logit), top-1 >= {TOP1_BOUND:g}",
        "runtime": "f32",
    }
    if not np.isfinite(measured).all():
        raise ExportError("the exported model gives logits that are not finite", code="logits-not-finite")
    if difference > LOGIT_BOUND * max(1.0, scale) or agreement < TOP1_BOUND:
        raise ExportError(
            f"the exported model is not its source: logits differ by up to {difference:.3g} (largest {scale:.3g}), "
            f"top-1 agrees on {agreement:.1%} of {len(ids)} tokens",
            code="logits-differ",
        )
    return result


def _source_logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    return logits


# -- What compression costs


def save_reference(model: Any, ids: Sequence[int], path: Path) -> None:
    """Keep the source's logits for some tokens, for `compression_cost`."""
    import numpy as np

    np.savez(path, ids=np.array(ids), logits=_source_logits(model, ids))


def compression_cost(ir: Path, reference: Path) -> dict[str, Any]:
    """`cost.cost` of a compressed IR against the logits that `save_reference` wrote."""
    import numpy as np

    with np.load(reference) as saved:
        return cost(ir, saved["ids"].tolist(), saved["logits"])
