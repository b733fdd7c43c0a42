"""LoRA adapters as PEFT writes them, with random weights in everything that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["attached", "logits", "read_model", "write"]

DEFAULTS: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]}


def read_model(checkpoint: Path) -> Any:
    """A checkpoint in transformers, at f32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def write(checkpoint: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    """Train an adapter by random steps and save it.

    Args:
        checkpoint: The base model.
        folder: Where to save it.
        seed: Of the steps.
        changes: Fields of PEFT's `LoraConfig`.
    """
    import peft
    import torch

    torch.manual_seed(seed)
    model = peft.get_peft_model(read_model(checkpoint), peft.LoraConfig(**{**DEFAULTS, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def attached(checkpoint: Path, *folders: Path) -> Any:
    """A checkpoint with adapters that PEFT computes beside it, at f32."""
    import peft

    model = peft.PeftModel.from_pretrained(read_model(checkpoint), folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(index))
    model.base_model.set_adapter([str(index) for index in range(len(folders))])
    return model.eval()


def logits(model: Any, ids: Any) -> Any:
    """Of every position, as a numpy array."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy()
