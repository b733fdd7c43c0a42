"""LoRA adapters become part of the weights, as PEFT would compute them beside the weights.

`merge` writes the sums into a transformers model, each rounded once. `compare` proves at f32 that the merged model has
the logits of PEFT with the adapters attached, not merged: where embedding and head are one matrix, PEFT's own merge
changes both, though only one is adapted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import SourceError
from ..runtime.lora import CONFIG, PREFIX, WEIGHTS, Adapter, LowRank, check_complete
from ..runtime.peft_config import EMBEDDING, HEAD, Start
from . import verify

__all__ = ["NO_PEFT", "compare", "merge"]

# Tokens of the comparison, rows that the adapters replace not counted.
PROMPT_TOKENS = 64
NO_PEFT = "peft is not installed (pip install 'ov-afm[heal]')"


def merge(model: Any, adapters: Sequence[Adapter]) -> None:
    """Add adapters to the weights of a transformers model, in float32, each result rounded once.

    A model whose embedding is its head gets a head of its own where only one of them changes.

    Raises:
        SourceError: One was made for another model, lacks modules, or two of them exclude each other.
    """
    if not adapters:
        return
    import torch
    from safetensors import safe_open

    modules = dict(model.named_modules(remove_duplicate=False))
    tied = HEAD in modules and modules[HEAD].weight is modules[EMBEDDING].weight
    for adapter in adapters:
        _check_modules(adapter, modules, tied=tied)
    _check_apart(adapters, tied=tied)
    with contextlib.ExitStack() as stack, torch.no_grad():
        parts = [_Part(adapter, stack.enter_context(safe_open(adapter.path, "pt")), tied) for adapter in adapters]
        pair = [f"{EMBEDDING}.weight", f"{HEAD}.weight"]
        changed = list(dict.fromkeys(name for part in parts for name in part.parameters))
        if tied and set(pair) & set(changed):
            _merge_tied(model, parts, pair)
            changed = [name for name in changed if name not in pair]
        for name in changed:
            parameter = _parameter(modules, name, parts)
            value = parameter.float()
            for part in parts:
                value = part.change(name, part.change_base(name, value))
            _write(parameter, name, value, parts)


def _merge_tied(model: Any, parts: Sequence[_Part], pair: Sequence[str]) -> None:
    """Merge into an embedding that is the head too; they stay one matrix if both become the same."""
    import torch

    modules = dict(model.named_modules(remove_duplicate=False))
    shared = modules[EMBEDDING].weight
    base = shared.to(torch.float32, copy=True)
    # What PEFT does to the base model when it loads an adapter, it does to both.
    for part in parts:
        for name in pair:
            base = part.change_base(name, base)
    values = []
    for name in pair:
        value = base
        for part in parts:
            value = part.change(name, value)
        values.append(value.to(shared.dtype))
    if values[0].shape != values[1].shape or not torch.equal(*values):
        modules[HEAD].weight = torch.nn.Parameter(shared.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        _write(modules[HEAD].weight, pair[1], values[1], parts)
    _write(shared, pair[0], values[0], parts)


def _parameter(modules: Mapping[str, Any], name: str, parts: Sequence[_Part]) -> Any:
    module, _, attribute = name.rpartition(".")
    parameter = getattr(modules.get(module), attribute, None)
    if parameter is None:
        raise _other_model(parts, name, f"changes {name}, which this model does not have")
    return parameter


def _write(parameter: Any, name: str, value: Any, parts: Sequence[_Part]) -> None:
    if parameter.shape != value.shape:
        found, expected = list(value.shape), list(parameter.shape)
        if name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") and found[1:] == expected[1:]:
            raise _other_model(
                parts,
                name,
                f"has {found[0]} tokens in {name}, and this model {expected[0]}; export the model that "
                "PEFT merged, with its tokenizer",
            )
        raise _other_model(parts, name, f"has {name} of shape {found}, and this model {expected}")
    parameter.copy_(value)


def _other_model(parts: Sequence[_Part], name: str, what: str) -> SourceError:
    path = next((part.adapter.path for part in parts if name in part.parameters), parts[0].adapter.path)
    return SourceError(f"{path} {what}; the adapter was made for another model", code="adapter-of-another-model")


class _Part:
    """What one adapter does to parameters. Its tensors are read when they are needed."""

    def __init__(self, adapter: Adapter, file: Any, tied: bool) -> None:
        self.adapter, self.file = adapter, file
        self.rows = {module: (module, tokens) for module, tokens in adapter.rows.items()}
        if tied and EMBEDDING in self.rows and HEAD not in self.rows:
            # PEFT trains the rows of both as one.
            self.rows[HEAD] = self.rows[EMBEDDING]
        low_rank = [f"{module}.weight" for module in adapter.low_rank]
        biases = [f"{module}.bias" for module, each in adapter.low_rank.items() if each.bias]
        rows = [f"{module}.weight" for module in self.rows]
        self.parameters = dict.fromkeys([*adapter.base, *adapter.saved, *rows, *low_rank, *biases])

    def _tensor(self, name: str) -> Any:
        return self.file.get_tensor(name).float()

    def change_base(self, name: str, value: Any) -> Any:
        """The parameter of the base model as PEFT leaves it when it has loaded the adapter."""
        if name in self.adapter.base:
            return self._tensor(self.adapter.base[name])
        module, _, attribute = name.rpartition(".")
        each = self.adapter.low_rank.get(module)
        if each is None or each.embedding or attribute != "weight":
            return value
        return _residual(value, self.adapter.config.start, each)

    def change(self, name: str, value: Any) -> Any:
        """The parameter with the adapter."""
        import torch

        if name in self.adapter.saved:
            value = self._tensor(self.adapter.saved[name])
        module, _, attribute = name.rpartition(".")
        if attribute == "weight" and module in self.rows:
            source, tokens = self.rows[module]
            last = max(tokens, default=0)
            if last >= len(value):
                raise _other_model([self], name, f"has a row for token {last}, and this model {len(value)} tokens")
            new = self._tensor(f"{PREFIX}{source}.token_adapter.trainable_tokens_delta")
            value = value.clone()
            value[torch.tensor(tokens, dtype=torch.long)] = new
        each = self.adapter.low_rank.get(module)
        if each is None:
            return value
        scale = each.scale * self.adapter.weight
        if attribute == "bias":
            return value + scale * self._tensor(f"{PREFIX}{module}.lora_B.bias") if each.bias else value
        return self._add_low_rank(module, each, scale, value)

    def _add_low_rank(self, module: str, each: LowRank, scale: float, value: Any) -> Any:
        import torch

        names = ("lora_embedding_A", "lora_embedding_B") if each.embedding else ("lora_A.weight", "lora_B.weight")
        down, up = (self._tensor(f"{PREFIX}{module}.{name}") for name in names)
        delta = scale * (up @ down)
        delta = delta.T if each.embedding else delta
        if delta.shape != value.shape:
            shapes = f"of shape {list(delta.shape)}, and this model {list(value.shape)}"
            raise _other_model([self], module, f"has {module} {shapes}")
        value = value + delta
        if each.dora:
            magnitude = self._tensor(f"{PREFIX}{module}.lora_magnitude_vector")
            axis = 0 if each.embedding else 1
            value = value * (magnitude / torch.linalg.norm(value, dim=axis)).unsqueeze(axis)
        return value


def _residual(weight: Any, start: Start, each: LowRank) -> Any:
    """A weight without what B·A started with, which PEFT takes out of the base model whenever it loads the adapter.

    PiSSA starts with the part of the weight in its largest singular directions (https://arxiv.org/abs/2404.02948,
    equations 2 to 4), OLoRA with the first columns of Q and rows of R (https://arxiv.org/abs/2406.01775, algorithm 1).
    Both are projections of the weight, which need no whole decomposition.
    """
    import torch

    if start == "plain":
        return weight
    if start == "olora":
        columns = torch.linalg.qr(weight[:, : each.rank].double())[0]
        return weight - each.scale * (columns @ (columns.T @ weight.double())).float()
    exact = weight.double()
    tall = exact.shape[0] > exact.shape[1]
    # Squares of the singular values, in ascending order; in double, because squaring halves the digits.
    _, vectors = torch.linalg.eigh(exact.T @ exact if tall else exact @ exact.T)
    largest = vectors[:, -each.rank :]
    part = (exact @ largest) @ largest.T if tall else largest @ (largest.T @ exact)
    return (exact - part).float()


# -- What cannot be merged


def _check_modules(adapter: Adapter, modules: Mapping[str, Any], *, tied: bool) -> None:
    """Make sure that an adapter's modules are the model's."""
    import torch

    for module in (*adapter.low_rank, *adapter.rows):
        if not isinstance(modules.get(module), torch.nn.Linear | torch.nn.Embedding):
            raise SourceError(
                f"{adapter.path} changes {module}, which this model does not have; it was made for another model",
                code="adapter-of-another-model",
            )
    for module, each in adapter.low_rank.items():
        if each.bias and modules[module].bias is None:
            raise SourceError(
                f"{adapter.path} adds a bias to {module}, which has none in this model, so that it cannot be merged; "
                "run it with PEFT",
                code="adapter-unsupported",
            )
        if each.embedding != isinstance(modules[module], torch.nn.Embedding):
            raise SourceError(
                f"{adapter.path} has {module} as {'an embedding' if each.embedding else 'a linear layer'}, which it is "
                "not in this model; it was made for another model",
                code="adapter-of-another-model",
            )
    layers = [name for name, each in modules.items() if isinstance(each, torch.nn.Linear | torch.nn.Embedding)]
    check_complete(adapter, layers, tied=tied)
    trained = [name for name, each in modules.items() if any(True for _ in each.parameters(recurse=False))]
    for module in trained:
        lacking = [f"{module}.{name}" for name, _ in modules[module].named_parameters(recurse=False)]
        if adapter.config.saves(module, tied=tied) and not adapter.saved.keys() >= set(lacking):
            raise SourceError(
                f"{adapter.path} lacks {lacking[0]}, which {CONFIG} says was trained whole (modules_to_save); fetch it "
                "again",
                code="adapter-incomplete",
            )


def _check_apart(adapters: Sequence[Adapter], *, tied: bool) -> None:
    """Refuse two adapters that change the same module, unless both only add to it."""
    seen: dict[str, tuple[Adapter, bool]] = {}
    for adapter in adapters:
        sums = adapter.config.start == "plain" and not adapter.config.dora
        replaced = {name.rpartition(".")[0] for name in (*adapter.base, *adapter.saved)} | adapter.rows.keys()
        for module in {*adapter.low_rank, *replaced}:
            key = EMBEDDING if tied and module == HEAD else module
            adds = sums and module not in replaced
            other, adds_too = seen.get(key, (adapter, True))
            if other is not adapter and not (adds and adds_too):
                raise SourceError(
                    f"{adapter.path.parent.name} and {other.path.parent.name} both change {module}, and one of them is "
                    "no plain sum; merge them one after the other with PEFT, or leave one out",
                    code="adapters-conflict",
                )
            seen[key] = (adapter, adds and adds_too)


# -- Proof


def compare(load: Callable[[], Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Logits of the merged model against PEFT's, both at f32.

    Args:
        load: Gives the base model at f32; called twice, one model lives at a time.
        adapters: What is merged.

    Returns:
        As `verify.judge`, with the version of `peft`; `skipped` where there is none, or it cannot read an adapter.

    Raises:
        ExportError: The logits differ.
    """
    if importlib.util.find_spec("peft") is None:
        return {"skipped": NO_PEFT}
    model = load()
    trained = list(dict.fromkeys(token for adapter in adapters for rows in adapter.rows.values() for token in rows))
    ids = [*verify.prompt(model.config, PROMPT_TOKENS), *trained[:PROMPT_TOKENS]]
    merge(model, adapters)
    merged = verify.source_logits(model, ids)
    del model
    version = importlib.metadata.version("peft")
    with TemporaryDirectory(prefix="ov_afm-") as folder:
        try:
            attached = _attach(load(), adapters, Path(folder))
        except Exception as error:  # PEFT's own, of any kind: then there is nothing to compare with
            reason = str(error).strip().partition("\n")[0]
            return {"skipped": f"peft {version} cannot load it ({type(error).__name__}: {reason})"}
    expected = verify.source_logits(attached, ids)
    return {**verify.judge(merged, expected, "the merged model is not what PEFT computes"), "peft": version}


def _attach(model: Any, adapters: Sequence[Adapter], folder: Path) -> Any:
    """A model with adapters computed beside it by PEFT, which reads folders."""
    import peft

    names = [f"adapter_{index}" for index, _ in enumerate(adapters)]
    for adapter, name in zip(adapters, names, strict=True):
        (folder / name).mkdir()
        shutil.copyfile(adapter.path.parent / CONFIG, folder / name / CONFIG)
        try:
            (folder / name / WEIGHTS).symlink_to(adapter.path.absolute())
        except OSError:  # Windows, without the right to
            shutil.copyfile(adapter.path, folder / name / WEIGHTS)
    attached = peft.PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0], torch_device="cpu")
    for name in names[1:]:
        attached.load_adapter(folder / name, adapter_name=name, torch_device="cpu")
    attached.base_model.set_adapter(names)
    for layer in attached.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for adapter, name in zip(adapters, names, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= adapter.weight
    return attached.eval()
