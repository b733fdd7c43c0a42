"""Proof that an exported model is its source: same tokens, same template bytes, same weights, same logits.

Everything is compared at f32 (`inference.EXACT`). OpenVINO's defaults round activations and the KV cache, and then a
wrong export and a rounded one look alike. What compression costs is measured in the same way and recorded, not judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, GenerationError, last_line
from ..model_dir.geometry import Geometry
from ..model_dir.inference import ir_logits
from ..model_dir.model_directory import read_config
from ..quantization.cost import cost
from ..runtime.chat_template import ChatTemplate
from ..runtime.text_proof import CONVERSATIONS, TEXTS, Conversation, of_template, of_tokenizer
from . import source_tokenizer
from .tensors import row_step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "compression_cost",
    "judge",
    "logits_equal",
    "prebuilt_checks",
    "save_reference",
    "source_logits",
    "tokenizer_equal",
    "weights_equal",
]

# Two f32 programs that sum in different orders differ by about 1e-6 of the largest logit. A hundred times that is far
# below any error of conversion, and above rounding on every CPU.
LOGIT_BOUND = 1e-4
TOP1_BOUND = 0.99
# The token of a byte in SentencePiece vocabularies. OpenVINO's BPE finds pieces that no merge makes in text that spells
# them.
BYTE_TOKEN = "<0x0A>"
# Of a tokenizer's control tokens, so many are tried; some have hundreds that are alike.
CONTROL_TOKENS = 32


def prebuilt_checks(model_dir: Path) -> dict[str, Any]:
    """What can be checked of an OpenVINO model that is taken as it is: its tokenizer and its template."""
    checks = tokenizer_equal(model_dir, model_dir)
    # Nothing has looked at its tokenizer before.
    rows = int(read_config(model_dir)["vocab_size"])
    source_tokenizer.check_rows(source_tokenizer.load(model_dir), rows, model_dir.name)
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

    source = source_tokenizer.load(checkpoint, trust_remote_code=trust_remote_code)
    exported = openvino_genai.Tokenizer(str(model_dir))
    # A model that is taken as it is may have its template in the tokenizer's IR alone.
    declared = ChatTemplate.read(checkpoint, exported if checkpoint == model_dir else None)
    return {
        "chat_template": _check_template(source, declared, model_dir, exported),
        "tokenizer": {**_check_tokens(source, exported), **of_tokenizer(exported).to_dict()},
    }


def _check_template(source: Any, declared: ChatTemplate | None, model_dir: Path, exported: Any) -> dict[str, Any]:
    """Compare what transformers renders with what every program of ours does, and with GenAI's own engine.

    Args:
        source: The source's tokenizer in transformers.
        declared: The template of its files, some of which transformers does not read for a tokenizer.
        model_dir: The model directory.
        exported: GenAI's tokenizer of it.
    """
    template = ChatTemplate.read(model_dir, exported)
    missing = declared is None and not source.chat_template
    if missing and template is None:
        return {"skipped": "the source has no chat template"}
    if missing or template is None:
        which = ("exported model", "source") if missing else ("source", "exported model")
        raise ExportError(
            f"the {which[0]} has a chat template, and the {which[1]} has none", code="chat-template-differs"
        )
    # Where transformers would not know which template to take, or reads none, it is given the one that was chosen.
    ambiguous = not isinstance(source.chat_template, str) and "default" not in (source.chat_template or {})
    chosen = declared if ambiguous else None
    compared = 0
    refusals: list[str] = []
    others: dict[str, str] = {}
    for conversation, open_turn in itertools.product(CONVERSATIONS, (True, False)):
        try:
            expected, rendered = _renderings(source, chosen, template, conversation, open_turn)
        except _Refused as refusal:
            refusals.append(str(refusal))
            continue
        if rendered != expected:
            at = _first_difference(rendered, expected)
            raise ExportError(
                f"the exported chat template differs from the source's at character {at}: "
                f"{rendered[at : at + 30]!r} where the source renders {expected[at : at + 30]!r}",
                code="chat-template-differs",
            )
        compared += 1
        # GenAI gives tools to templates that know none in a form of its own.
        if conversation.tools and not template.knows_tools:
            continue
        if (problem := _genai_problem(exported, conversation, open_turn, expected)) is not None:
            others.setdefault(conversation.name, problem)
    if not compared:
        raise ExportError(
            f"the source's chat template renders no conversation ({refusals[0]}); correct it, or take it out of the "
            "checkpoint's files",
            code="chat-template-unusable",
        )
    check: dict[str, Any] = {"conversations": compared, "refused_by_source": len(refusals), "equal": True}
    if others:
        check["genai_differs"] = others
    return {**check, **of_template(template).to_dict()}


class _Refused(Exception):
    """A template takes some conversation in no program."""


def _renderings(
    source: Any, chosen: ChatTemplate | None, template: ChatTemplate, conversation: Conversation, open_turn: bool
) -> tuple[str, str]:
    """A conversation as transformers renders it, and as we do.

    Raises:
        _Refused: Both refuse it.
        ExportError: We refuse it.
    """
    tools = list(conversation.tools) or None
    text = None if chosen is None else chosen.text_for(tools)
    messages = [dict(message) for message in conversation.messages]
    # A template may write the time, and a minute may begin between the two.
    for attempt in (1, 2, 3):
        try:
            expected = source.apply_chat_template(
                messages, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:  # noqa: BLE001 - whatever the template's author met
            raise _Refused(f"{conversation.name}: {' '.join(str(error).split())[:200]}") from error
        try:
            rendered = template.render(messages, tools=tools, open_turn=open_turn)
        except GenerationError as error:
            raise ExportError(
                f"the exported model refuses {conversation.name}, which the source renders: {error}",
                code="chat-template-differs",
            ) from error
        if rendered == expected or attempt == 3:
            break
    return str(expected), rendered


def _genai_problem(exported: Any, conversation: Conversation, open_turn: bool, expected: str) -> str | None:
    """Why GenAI's own engine does not render a conversation as transformers does; None where it does."""
    messages = [dict(message) for message in conversation.messages]
    try:
        rendered = exported.apply_chat_template(
            messages, add_generation_prompt=open_turn, tools=list(conversation.tools) or None
        )
    except (RuntimeError, TypeError, ValueError) as error:
        return f"it fails: {_reason(error)}"
    if rendered == expected:
        return None
    at = _first_difference(rendered, expected)
    return f"{rendered[at : at + 20]!r} where the source renders {expected[at : at + 20]!r}"


def _reason(error: Exception) -> str:
    """The line of an error of GenAI's template engine that says what it lacks."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if " at row " in line), last_line(error))


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(one, other)) if a != b)


def _check_tokens(source: Any, exported: Any) -> dict[str, Any]:
    count = 0
    for text in (*TEXTS, *_with_control_tokens(source)):
        expected = source(text, add_special_tokens=False)["input_ids"]
        ids = exported.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        if ids != expected:
            at = _first_difference(ids, expected)
            raise ExportError(
                f"the exported tokenizer differs from the source's at token {at} of {text[:24]!r}: "
                f"{ids[at : at + 5]} where the source gives {expected[at : at + 5]}",
                code="tokenizer-differs",
            )
        if text not in TEXTS:
            continue
        count += len(ids)
        # The source itself may not return the text, because some tokenizers normalise it.
        decoded = exported.decode(ids)
        expected_text = source.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if decoded not in (expected_text, text):
            raise ExportError(
                f"the exported detokenizer gives {decoded[:24]!r} where the source gives {expected_text[:24]!r}",
                code="detokenizer-differs",
            )
    check: dict[str, Any] = {"texts": len(TEXTS), "tokens": count, "equal": True}
    spelled = exported.encode(BYTE_TOKEN, add_special_tokens=False).input_ids.data[0].tolist()
    if spelled != source(BYTE_TOKEN, add_special_tokens=False)["input_ids"]:
        check["reads_spelled_bytes"] = True
    return check


def _with_control_tokens(source: Any) -> list[str]:
    """Texts in which control tokens stand between words: what is before and after them differs by tokenizer."""
    tokens = list(dict.fromkeys((*source.all_special_tokens, *source.get_added_vocab())))[:CONTROL_TOKENS]
    return [f"a{token} b{token}{token}\n c" for token in tokens]


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
    return judge(ir_logits(ir, ids), source_logits(model, ids), "the exported model is not its source")


def judge(measured: NDArray[np.float32], expected: NDArray[np.float32], problem: str) -> dict[str, Any]:
    """Compare logits of one prompt, each of shape (tokens, vocabulary).

    Args:
        measured: What is to be proved.
        expected: The reference.
        problem: What a difference means, for the error.

    Returns:
        As `logits_equal`.

    Raises:
        ExportError: A difference is above the bound, or a logit is not finite.
    """
    import numpy as np

    scale = float(np.abs(expected).max())
    difference = float(np.abs(measured - expected).max())
    agreement = float((measured.argmax(-1) == expected.argmax(-1)).mean())
    result = {
        "tokens": len(expected),
        "max_logit_diff": difference,
        "max_logit": scale,
        "top1_agreement": agreement,
        "bound": f"diff <= {LOGIT_BOUND:g} x max(1, max_logit), top-1 >= {TOP1_BOUND:g}",
        "runtime": "f32",
    }
    if not np.isfinite(measured).all():
        raise ExportError("the exported model gives logits that are not finite", code="logits-not-finite")
    # Written so that a difference that is not a number fails too.
    if not (difference <= LOGIT_BOUND * max(1.0, scale) and agreement >= TOP1_BOUND):
        raise ExportError(
            f"{problem}: logits differ by up to {difference:.3g} (largest {scale:.3g}), "
            f"top-1 agrees on {agreement:.1%} of {len(expected)} tokens",
            code="logits-differ",
        )
    return result


def source_logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits of a transformers model, of shape (tokens, vocabulary)."""
    import torch

    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    return logits


# -- What compression costs


def save_reference(model: Any, ids: Sequence[int], path: Path) -> None:
    """Keep the source's logits for some tokens, for `compression_cost`."""
    import numpy as np

    np.savez(path, ids=np.array(ids), logits=source_logits(model, ids))


def compression_cost(ir: Path, reference: Path) -> dict[str, Any]:
    """`cost.cost` of a compressed IR against the logits that `save_reference` wrote, if the source fitted in memory."""
    import numpy as np

    if not reference.exists():
        return {"skipped": "the uncompressed model does not fit in memory"}
    with np.load(reference) as saved:
        return cost(ir, saved["ids"].tolist(), saved["logits"])
