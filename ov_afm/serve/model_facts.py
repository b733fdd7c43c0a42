"""What is known of a model on offer: from its engine where it is loaded, from its directory before.

Clients look for such things under many names. The answer of `/v1/models` has `max_model_len` as vLLM does, `meta` as
llama.cpp's server, `context_length` and `supported_parameters` as OpenRouter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone

from ..errors import OVAFMError
from ..model_dir.model_directory import ModelDirectory
from ..model_dir.text_encoder import EMBEDDING, RERANKING, TEXT_GENERATION
from ..runtime.chat_template import ChatTemplate
from ..runtime.reasoning import reasoning_tags
from . import protocol
from .registry import Models
from .sequential import one_at_a_time

__all__ = ["Abilities", "ModelFacts"]

# What an ability adds to the parameters that a request may have.
PARAMETERS = {
    "tools": ("tools", "tool_choice"),
    "json_schema": ("response_format", "structured_outputs"),
    "logprobs": ("logprobs",),
    "reasoning": ("include_reasoning",),
}
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "stop", "max_tokens", "max_completion_tokens"),
)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a model can be asked for; the names are those of `/v1/models`."""

    chat: bool = False
    completion: bool = False
    tools: bool = False
    json_schema: bool = False
    logprobs: bool = False
    reasoning: bool = False
    embeddings: bool = False
    rerank: bool = False


@dataclass(slots=True)
class ModelFacts:
    """Describes the models of a server.

    Args:
        models: The models on offer.
    """

    models: Models
    _directories: dict[str, ModelDirectory] = field(default_factory=dict)

    def directory(self, name: str) -> ModelDirectory:
        """The directory of a model."""
        if name not in self._directories:
            folder = self.models.engines[name].spec.model_dir
            self._directories[name] = ModelDirectory.open(folder, packed=False, any_task=True)
        return self._directories[name]

    def template(self, name: str) -> ChatTemplate | None:
        """The chat template of a model's files; None where there is none that can be read."""
        try:
            return ChatTemplate.read(self.directory(name).path)
        except OVAFMError:
            # The engine says what is wrong with it.
            return None

    def context_length(self, name: str) -> int:
        """Tokens that prompt and answer may have together."""
        info = self.models.engines[name].info
        return self.directory(name).context_length if info is None else info.context_length

    def abilities(self, name: str) -> Abilities:
        """What a model can be asked for."""
        task, engine = self.models.task(name), self.models.engines[name]
        if task != TEXT_GENERATION:
            return Abilities(embeddings=task == EMBEDDING, rerank=task == RERANKING)
        template = self.template(name)
        tags = reasoning_tags(template, ()) if engine.info is None else engine.info.reasoning
        return Abilities(
            chat=template is not None,
            completion=True,
            # Tools are described in words where the template cannot.
            tools=template is not None,
            json_schema=True,
            logprobs=not one_at_a_time(engine.spec.device),
            reasoning=bool(tags),
        )

    def describe(self, name: str) -> protocol.Model:
        """A model as `/v1/models` has it."""
        engine, model = self.models.engines[name], self.directory(name)
        abilities, length = self.abilities(name), self.context_length(name)
        asked = [each for ability, names in PARAMETERS.items() if getattr(abilities, ability) for each in names]
        parents = [
            each
            for each, other in self.models.engines.items()
            if engine.spec.adapter and not other.spec.adapter and other.spec.model_dir == engine.spec.model_dir
        ]
        encoder = model.text_encoder
        return protocol.Model(
            id=name,
            display_name=name,
            created=self.models.created,
            created_at=datetime.fromtimestamp(self.models.created, timezone.utc).isoformat().replace("+00:00", "Z"),
            parent=next(iter(parents), None),
            max_model_len=length,
            context_length=length,
            device=engine.info.device if engine.info else engine.spec.device,
            recipe=model.recipe_name,
            task=self.models.task(name),
            status=engine.state,
            capabilities=protocol.Capabilities(
                **{each: getattr(abilities, each) for each in protocol.Capabilities.model_fields}
            ),
            supported_parameters=[*(SAMPLING if abilities.completion else ()), *asked],
            meta=protocol.ModelMeta(
                n_vocab=model.geometry.vocab,
                n_ctx_train=model.context_length,
                n_embd=encoder.dimensions if encoder and encoder.dimensions else model.geometry.hidden,
                n_params=model.parameters,
                size=model.weights_bytes,
            ),
        )
