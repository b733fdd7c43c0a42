"""Models as Ollama describes them: what is on offer, what is loaded, and what each of them can do.

Clients read abilities and context length here: VS Code, Home Assistant and Open WebUI ask `/api/show` for them.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel

from ...errors import OVAFMError
from ...model_dir.model_directory import ModelDirectory
from ...runtime import generation_config
from ..service import Service

__all__ = ["Catalogue", "ModelTable", "ShowAnswer"]

# A loaded model stays until `serve --idle-unload` takes it; clients want a time.
FOREVER = "9999-12-31T23:59:59Z"


class Details(BaseModel):
    """What kind of model it is."""

    parent_model: str = ""
    format: str = "openvino"
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(BaseModel):
    """A model on offer; the fields of a loaded one are absent from others."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: list[str]
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class ModelTable(BaseModel):
    """Answer of `GET /api/tags` and `GET /api/ps`."""

    models: list[ModelEntry]


class ShowAnswer(BaseModel):
    """Answer of `POST /api/show`."""

    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]


class Catalogue:
    """Describes the models of a server.

    Args:
        service: What knows them.
    """

    def __init__(self, service: Service) -> None:
        self._models, self._facts = service.models, service.facts

    def tags(self) -> ModelTable:
        """The models on offer."""
        return ModelTable(models=[self._entry(name) for name in self._models.engines])

    def loaded(self) -> ModelTable:
        """The models that are loaded."""
        ready = [name for name, engine in self._models.engines.items() if engine.is_ready]
        return ModelTable(models=[self._loaded(name) for name in ready])

    def show(self, name: str | None) -> ShowAnswer:
        """All that is known of a model.

        Raises:
            APIError: There is no such model.
        """
        name = self._models.resolve(name, None)
        model, template = self._facts.directory(name), self._facts.template(name)
        licenses = sorted(model.path.glob("LICENSE*"))
        return ShowAnswer(
            modelfile=f"# Served by ov-afm.\nFROM {tagged(name)}\n",
            parameters=_parameters(model),
            template="" if template is None else template.text,
            license=licenses[0].read_text(encoding="utf-8", errors="replace") if licenses else "",
            modified_at=_modified(model),
            details=_details(model),
            model_info=self._info(name),
            capabilities=self._capabilities(name),
        )

    def _capabilities(self, name: str) -> list[str]:
        abilities = self._facts.abilities(name)
        words = {
            "completion": abilities.completion,
            "tools": abilities.tools,
            "thinking": abilities.reasoning,
            "embedding": abilities.embeddings,
        }
        return [word for word, can in words.items() if can]

    def _entry(self, name: str) -> ModelEntry:
        model = self._facts.directory(name)
        return ModelEntry(
            name=tagged(name),
            model=tagged(name),
            modified_at=_modified(model),
            size=model.weights_bytes,
            digest=hashlib.sha256(model.key.encode()).hexdigest(),
            details=_details(model),
            capabilities=self._capabilities(name),
        )

    def _loaded(self, name: str) -> ModelEntry:
        length = self._facts.context_length(name)
        return self._entry(name).model_copy(update={"expires_at": FOREVER, "size_vram": 0, "context_length": length})

    def _info(self, name: str) -> dict[str, Any]:
        model = self._facts.directory(name)
        family, geometry = _family(model), model.geometry
        return {
            "general.architecture": family,
            "general.basename": name,
            "general.parameter_count": model.parameters,
            f"{family}.context_length": self._facts.context_length(name),
            f"{family}.embedding_length": geometry.hidden,
            f"{family}.feed_forward_length": geometry.intermediate,
            f"{family}.block_count": geometry.layers,
            f"{family}.attention.head_count": geometry.heads,
            f"{family}.attention.head_count_kv": geometry.kv_heads,
            f"{family}.vocab_size": geometry.vocab,
        }


def tagged(name: str) -> str:
    """A name as Ollama has it, with a tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _family(model: ModelDirectory) -> str:
    return str(model.config.get("model_type") or "unknown")


def _details(model: ModelDirectory) -> Details:
    billions = model.parameters / 1e9
    size = f"{billions:.1f}B" if billions >= 1 else f"{model.parameters / 1e6:.1f}M"
    family = _family(model)
    return Details(family=family, families=[family], parameter_size=size, quantization_level=model.recipe_name.upper())


def _modified(model: ModelDirectory) -> str:
    return datetime.fromtimestamp(model.xml.stat().st_mtime, timezone.utc).isoformat().replace("+00:00", "Z")


def _parameters(model: ModelDirectory) -> str:
    """How the model is sampled where a request says nothing, a name and a value a line."""
    try:
        fields = generation_config.read(model.path)
    except OVAFMError:
        return ""
    names = {"repetition_penalty": "repeat_penalty", "max_new_tokens": "num_predict"}
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    return "\n".join(f"{names.get(name, name)} {fields[name]}" for name in known if name in fields)
