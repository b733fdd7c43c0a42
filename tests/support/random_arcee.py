"""A tiny random Arcee model in torch, and tokens for it: the same each time."""

from __future__ import annotations

from typing import Any

import torch

from . import tiny

__all__ = ["random_ids", "random_model"]


def random_model(**changes: Any) -> Any:
    """An `ArceeForCausalLM` with the configuration of `tiny.ARCEE`, changed."""
    from transformers import ArceeConfig, ArceeForCausalLM

    torch.manual_seed(0)
    return ArceeForCausalLM(ArceeConfig(**{**tiny.ARCEE, **changes})).eval()


def random_ids(count: int, length: int = 64) -> list[list[int]]:
    """Samples of one length."""
    return torch.randint(3, 512, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
