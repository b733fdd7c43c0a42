"""Proof that an exported model is its source: same tokens, same template bytes, same logits.

Everything is compared at f32 (`INFERENCE_PRECISION_HINT` and `KV_CACHE_PRECISION`), because the
plugin's defaults round activations and cache: at the defaults a wrong export and a rounded one look
alike. What compression costs is measured on the same footing and recorded, not judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..model_dir import manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CONVERSATIONS",
    "F32",
    "TEXT",
    "TEXTS",
    "check_bundle",
    "compression_cost",
    "logits_equal",
    "weights_equal",
]

F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
# Two f32 programs that sum in different orders differ by about 1e-6 of the largest logit (FACTS: 2e-6).
# A hundred times that is far below any error of conversion, and above rounding on every CPU.
LOGIT_BOUND = 1e-4
TOP1_BOUND = 0.99
# Bytes of one tensor's rows that are compared; whole below it.
SAMPLE_BYTES = 4 << 20
# Tokens of TEXT on which the cost of compression is measured; a byte-level tokenizer would make three times as many.
TEXT_TOKENS = 512

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
# Own words, one paragraph of prose, one of code: the text on which compression is measured after an export.
TEXT = """The harbour was built in three stages. First came the stone quay, which the merchants of the
old town paid for with a tax on salt; then, a century later, the long breakwater that still turns the
winter swell; and last the iron pier, which nobody loved and everybody used. When the railway reached the
coast, the fishing boats moved to the northern basin, and the warehouses behind the pier were filled with
timber, machine parts and tea. A visitor in those years would have seen clerks with ledgers under their
arms, children selling oranges, and at the end of the day a line of lamps along the water, lit one by one by
a man with a ladder. Engineers admired the harbour for another reason. Its basin empties and fills through a
narrow gate, and the tide keeps the channel deep enough for ships of moderate draught without any dredging.
The principle is simple: water that leaves quickly carries sand away, and water that arrives slowly drops it
elsewhere. To estimate the depth of such a channel, measure the volume of the basin, divide it by the time
of the falling tide, and compare the resulting speed with the speed at which sand begins to move.

def channel_speed(volume_m3, falling_tide_s, width_m, depth_m):
    \"\"\"Mean speed of the water in the gate, in metres per second.\"\"\"
    if falling_tide_s <= 0 or width_m * depth_m <= 0:
        raise ValueError("time and area must be positive")
    return volume_m3 / falling_tide_s / (width_m * depth_m)

for depth in (2.0, 2.5, 3.0):
    print(depth, round(channel_speed(180_000, 6 * 3600, 14.0, depth), 3))
"""


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens, by a transformers tokenizer."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def measure(
    checkpoint: str | Path, bundle: str | Path, reference: Path | None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """All that is checked once a model directory has its final weights: tokenizer, template, cost of compression.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        bundle: Model directory.
        reference: File that `save_reference` wrote; None where the source did not fit in memory.
        trust_remote_code: Let transformers run the checkpoint's own code.
    """
    checks = check_bundle(checkpoint, bundle, trust_remote_code)
    if reference is None:
        checks["compression"] = {"skipped": "the uncompressed model does not fit in memory"}
    else:
        checks["compression"] = compression_cost(Path(bundle) / "openvino_model.xml", reference)
    return checks


# -- (a) and (b): the bundle's own tokenizer and template against the source's


def check_bundle(checkpoint: str | Path, bundle: str | Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Compare chat template and tokenizer of a model directory with those of its source.

    Args:
        checkpoint: Hugging Face checkpoint folder.
        bundle: Model directory with converted tokenizers.
        trust_remote_code: Let transformers run the checkpoint's own code.

    Returns:
        The checks `chat_template` and `tokenizer`.

    Raises:
        ExportError: A rendering, an id or a decoded text differs.
    """
    import openvino_genai
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    exported = openvino_genai.Tokenizer(str(bundle))
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
        found = exported.apply_chat_template(messages, add_generation_prompt=open_turn)
        if found != expected:
            at = _first_difference(found, expected)
            raise ExportError(
                f"the exported chat template differs from the source's at character {at}: "
                f"{found[at : at + 30]!r} where the source renders {expected[at : at + 30]!r}"
            )
        compared += 1
    return {"conversations": compared, "refused_by_source": refused, "equal": True}


def _first_difference(found: Sequence[Any], expected: Sequence[Any]) -> int:
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(found, expected)) if a != b)


def _check_tokens(source: Any, exported: Any) -> dict[str, Any]:
    count = 0
    for text in TEXTS:
        expected = token_ids(source, text)
        found = exported.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        if found != expected:
            at = _first_difference(found, expected)
            raise ExportError(
                f"the exported tokenizer differs from the source's at token {at} of {text[:24]!r}: "
                f"{found[at : at + 5]} where the source gives {expected[at : at + 5]}"
            )
        # Judge decoding by the text where the source itself can return it (some normalise on the way in).
        decoded = exported.decode(found)
        wanted = source.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if decoded != wanted and decoded != text:
            raise ExportError(f"the exported detokenizer gives {decoded[:24]!r} where the source gives {wanted[:24]!r}")
        count += len(found)
    return {"texts": len(TEXTS), "tokens": count, "equal": True}


# -- (c): weights and logits of the uncompressed IR against transformers


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
    if model.config.tie_word_embeddings:
        source.pop("lm_head.weight", None)
    compared = sampled = 0
    for name, data in _matrices(ir):
        if name not in source:
            continue
        weight = source.pop(name)
        step = max(1, weight.numel() * weight.element_size() // SAMPLE_BYTES)
        rows = weight[::step].contiguous().view(torch.uint8).numpy()
        if rows.tobytes() != data[::step].tobytes():
            raise ExportError(f"the IR's {name} differs from the checkpoint's; the conversion is wrong")
        compared += 1
        sampled += step > 1
    if source:
        raise ExportError(f"{len(source)} weight matrices were not found in the IR, the first is {next(iter(source))}")
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
    sizes = manifest.geometry_of({**config.to_dict(), **shape})
    weights = sum(manifest.parameters(sizes, tied=bool(config.tie_word_embeddings)))
    # Weights are there twice, once in each engine; the engines run one after the other.
    activations = tokens * (2 * sizes["intermediate"] + 8 * sizes["hidden"] + 3 * sizes["vocab"]) + 4 * tokens * tokens
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

    expected = _torch_logits(model, ids)
    found = ir_logits(ir, ids)
    scale = float(np.abs(expected).max())
    difference = float(np.abs(found - expected).max())
    agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
    result = {
        "tokens": len(ids),
        "max_logit_diff": difference,
        "max_logit": scale,
        "top1_agreement": agreement,
        "bound": f"diff <= {LOGIT_BOUND:g} x max(1, max_logit), top-1 >= {TOP1_BOUND:g}",
        "runtime": "f32",
    }
    if not np.isfinite(found).all():
        raise ExportError("the exported model gives logits that are not finite")
    if difference > LOGIT_BOUND * max(1.0, scale) or agreement < TOP1_BOUND:
        raise ExportError(
            f"the exported model is not its source: logits differ by up to {difference:.3g} (largest {scale:.3g}), "
            f"top-1 agrees on {agreement:.1%} of {len(ids)} tokens"
        )
    return result


def _torch_logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    return logits


def ir_logits(ir: Path, ids: Sequence[int], **properties: Any) -> NDArray[np.float32]:
    """Logits (tokens, vocabulary) of a stateful IR on CPU, at f32 unless `properties` say otherwise."""
    import numpy as np
    import openvino

    compiled = openvino.Core().compile_model(ir, "CPU", {**F32, **properties})
    count = len(ids)
    inputs = {
        "input_ids": np.array([ids], dtype=np.int64),
        "attention_mask": np.ones((1, count), dtype=np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
    known = {name for port in compiled.inputs for name in port.get_names()}
    request = compiled.create_infer_request()
    request.infer({name: value for name, value in inputs.items() if name in known})
    logits: NDArray[np.float32] = request.get_tensor("logits").data[0].astype(np.float32)
    return logits


# -- (d): what compression costs


def save_reference(model: Any, ids: Sequence[int], path: Path) -> None:
    """Keep the source's logits on a fixed text, for `compression_cost`."""
    import numpy as np

    np.savez(path, ids=np.array(ids), logits=_torch_logits(model, ids))


def cost_between(source: str, target: str) -> dict[str, Any]:
    """`compression_cost` of one model directory against another that is not compressed."""
    from transformers import AutoTokenizer

    ids = token_ids(AutoTokenizer.from_pretrained(target), TEXT)[:TEXT_TOKENS]
    expected = ir_logits(Path(source) / "openvino_model.xml", ids)
    return _divergence(ids, expected, ir_logits(Path(target) / "openvino_model.xml", ids))


def compression_cost(ir: Path, reference: Path) -> dict[str, Any]:
    """KL divergence and top-1 agreement of a compressed model against its source, at f32.

    Args:
        ir: Path of the compressed `openvino_model.xml`.
        reference: File that `save_reference` wrote.

    Returns:
        tokens, kl_mean, kl_max (nats), top1_agreement, runtime.
    """
    import numpy as np

    with np.load(reference) as saved:
        ids, expected = saved["ids"].tolist(), saved["logits"]
    return _divergence(ids, expected, ir_logits(ir, ids))


def _divergence(ids: list[int], expected: NDArray[np.float32], found: NDArray[np.float32]) -> dict[str, Any]:
    import numpy as np

    divergence, agreement = [], 0
    for p, q in zip(expected, found, strict=True):
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        divergence.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        agreement += int(p.argmax() == q.argmax())
    return {
        "tokens": len(ids),
        "kl_mean": float(np.mean(divergence)),
        "kl_max": float(np.max(divergence)),
        "top1_agreement": agreement / len(ids),
        "runtime": "f32",
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
