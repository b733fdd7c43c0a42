"""Grammars that an answer must follow, each checked before the engine sees it.

GenAI compiles a grammar within the step that runs all requests, and an error there leaves the
scheduler in a state that it never recovers from (2026.4). So every grammar is first compiled for a
model that has the real tokenizer and no weights, where an error does no harm. The compiled
grammar stays in the tokenizer's cache, so the engine need not compile it again.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .messages import JSONSchema, OutputFormat

__all__ = ["GrammarCheck", "structured_output"]

CALL_END = "}\n</tool_call>"
MESSAGE_LENGTH = 200


def call_begin(name: str) -> str:
    """What a call of a function begins with, up to its arguments."""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '


def structured_output(output_format: OutputFormat) -> Any:
    """GenAI's configuration for what an answer must look like."""
    import openvino_genai

    kind = openvino_genai.StructuredOutputConfig
    if isinstance(output_format, JSONSchema):
        return kind(json_schema=output_format.schema)
    tags = [
        kind.Tag(call_begin(function.name), kind.JSONSchema(json.dumps(function.parameters)), CALL_END)
        for function in output_format.functions
    ]
    if output_format.required:
        return kind(structural_tags_config=tags[0] if len(tags) == 1 else kind.Union(tags))
    if output_format.answer is not None:
        return kind(structural_tags_config=kind.Union([*tags, kind.JSONSchema(output_format.answer.schema)]))
    return kind(structural_tags_config=kind.TriggeredTags(["<tool_call>"], tags, False, output_format.once))


class GrammarCheck:
    """Compiles grammars where a failure does no harm.

    Args:
        tokenizer: The engine's tokenizer.
        vocab: Logits that the engine's model gives for a token.
    """

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def check(self, config: Any) -> None:
        """Compile the grammar of a generation configuration.

        Raises:
            ConfigError: The schema cannot be turned into a grammar.
        """
        import openvino_genai

        with self._lock:
            if self._pipeline is None:
                self._pipeline = _weightless(self._tokenizer, self._vocab)
            trial = openvino_genai.GenerationConfig()
            trial.max_new_tokens = 1
            trial.structured_output_config = config
            inputs = self._tokenizer.encode("a", add_special_tokens=False)
            try:
                self._pipeline.generate(inputs, trial)
            except RuntimeError as error:
                raise ConfigError(f"the schema cannot be enforced: {_reason(error)}", code="schema-unusable") from error


def _reason(error: RuntimeError) -> str:
    """The reason that the grammar compiler gives, without the place in its source."""
    text = " ".join(str(error).split())
    return text.rpartition(".cc:")[2].partition(": ")[2][:MESSAGE_LENGTH] or "it is not a JSON schema"


def _weightless(tokenizer: Any, vocab: int) -> Any:
    """A pipeline whose model gives every token the same logit."""
    import numpy as np
    import openvino
    import openvino_genai
    from openvino import opset13 as ops

    def parameter(shape: Sequence[int], kind: type, name: str) -> Any:
        node = ops.parameter(shape, kind, name=name)
        node.output(0).set_names({name})
        return node

    ids = parameter([-1, -1], np.int64, "input_ids")
    mask = parameter([-1, -1], np.int64, "attention_mask")
    beam = parameter([-1], np.int32, "beam_idx")
    # Every input must be used, or the model would lose it.
    used = ops.add(ids, ops.reduce_sum(ops.convert(beam, "i64"), ops.constant([0]), False))
    zero = ops.unsqueeze(ops.multiply(ops.convert(used, "f32"), ops.constant(np.float32(0))), ops.constant([2]))
    logits = ops.add(zero, ops.constant(np.zeros((1, 1, vocab), np.float32)))
    logits.output(0).set_names({"logits"})
    model = openvino.Model([logits], [ids, mask, beam], "weightless")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weightless.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        xml, weights = path.read_text(encoding="utf-8"), np.fromfile(path.with_suffix(".bin"), np.uint8)
    return openvino_genai.LLMPipeline(xml, openvino.Tensor(weights), tokenizer, "CPU", ATTENTION_BACKEND="SDPA")
