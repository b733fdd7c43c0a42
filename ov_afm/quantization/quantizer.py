"""NNCF's rounding of weights in torch, and the search for column scales that make it cost least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Quantizer", "search_scales", "usable"]

Array = NDArray[np.float32]
# Exponents tried for activations and for weights, as AWQ's grid (https://arxiv.org/abs/2306.00978), which has no
# second exponent: here rows may be rescaled too, so that the columns' own range is worth equalising.
ACTIVATION_POWERS = tuple(step / 8 for step in range(9))
WEIGHT_POWERS = (0.0, 0.5, 1.0)
# Columns whose activations are smaller than this share of the median count as this share.
FLOOR = 1e-3
# Rows of a matrix on which candidates are compared: enough to tell exponents apart.
SEARCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How weights will be rounded.

    Attributes:
        bits: 4 or 8.
        sym: Symmetric, without a zero point.
        group_size: Weights of a row that share one scale; -1 for the whole row.
    """

    bits: int
    sym: bool
    group_size: int = -1

    def group_of(self, columns: int) -> int:
        """Columns of a group in a matrix of that many; NNCF's `adjust` takes the largest power of two that divides."""
        size = self.group_size
        if size < 0:
            return columns
        while columns % size:
            size //= 2
        return size

    def grids(self, weight: Any, share: float = 1.0) -> list[tuple[Any, Any]]:
        """Scales and zero points (...) for groups (..., size) whose levels reach to a share of their extremes.

        A symmetric group has two: the level that has no opposite may stand at either end; the first is NNCF's choice.
        """
        import torch

        low, high = weight.amin(-1), weight.amax(-1)
        levels = 1 << self.bits
        if self.sym:
            # As NNCF's `calculate_signed_scale`: the value of largest magnitude becomes the extra negative level.
            scale = usable(torch.where(-low >= high, -low, -high) * (share / (levels // 2)))
            return [(scale, torch.zeros_like(scale)), (-scale, torch.zeros_like(scale))]
        low, high = share * low.clamp(max=0), share * high.clamp(min=0)
        scale = usable((high - low) / (levels - 1))
        return [(scale, (-low / scale).round_().clamp_(0, levels - 1))]

    def code(self, weight: Any, scale: Any, zero: Any) -> Any:
        """Whole numbers for weights."""
        levels = 1 << self.bits
        least = -(levels // 2) if self.sym else 0
        return (weight / scale).round_().add_(zero).clamp_(least, least + levels - 1)

    def round_trip(self, weight: Any) -> Any:
        """Weights (..., group), a torch tensor, rounded and back, each group by its own scale, as NNCF does."""
        scale, zero = (each.unsqueeze(-1) for each in self.grids(weight)[0])
        return self.code(weight, scale, zero).sub_(zero).mul_(scale)


def usable(scale: Any) -> Any:
    """Scales to divide by: 1 instead of 0, which a group of zeros has."""
    import torch

    return torch.where(scale == 0, torch.ones_like(scale), scale)


def search_scales(
    weight: Array, activations: Array, quantizer: Quantizer, *, tie: Callable[[Array], Array] | None = None
) -> tuple[Array, float, float]:
    """Scales for the columns of a matrix that make rounding it cost least on its output.

    Each quantization group chooses for itself among t = rms(activations)^a · max|column|^-b.

    Args:
        weight: (outputs, inputs).
        activations: (tokens, inputs).
        quantizer: The rounding.
        tie: Makes scales equal that must be equal (query heads that share a value head); then all groups choose alike.

    Returns:
        Scales (inputs,), each column to be multiplied by its own; output error before and after, in squares.
    """
    columns = weight.shape[1]
    size = quantizer.group_of(columns)
    groups = columns // size
    rms = np.sqrt(np.square(activations).mean(0, dtype=np.float64)).astype(np.float32)
    rms = np.maximum(rms, max(float(np.median(rms)) * FLOOR, 1e-12))
    widest = np.maximum(np.abs(weight).max(0), np.float32(1e-12))
    candidates = [_normalised(rms**a * widest**-b, groups) for b in WEIGHT_POWERS for a in ACTIVATION_POWERS]
    candidates.insert(0, np.ones(columns, dtype=np.float32))
    if tie is not None:
        candidates = [tie(candidate) for candidate in candidates]

    import torch

    rows = torch.from_numpy(np.ascontiguousarray(weight[:: max(1, len(weight) // SEARCH_ROWS)]))
    rows = rows.view(len(rows), groups, size).transpose(0, 1).contiguous()  # (groups, rows, size)
    roots = _roots(activations, groups)
    errors = np.stack([_errors(rows, candidate.reshape(groups, 1, size), roots, quantizer) for candidate in candidates])
    if tie is not None:
        errors = np.broadcast_to(errors.sum(1, keepdims=True) / groups, errors.shape)
    best = errors.argmin(0)
    choices = np.stack(candidates).reshape(len(candidates), groups, size)
    scales = choices[best, np.arange(groups)].reshape(-1)
    return scales, float(errors[0].sum()), float(errors.min(0).sum())


def _normalised(scales: Array, groups: int) -> Array:
    """Scales whose extremes lie evenly around 1 in each group: a common factor changes nothing."""
    parts = scales.reshape(groups, -1)
    middle = np.sqrt(parts.max(1, keepdims=True) * parts.min(1, keepdims=True))
    result: Array = (parts / middle).reshape(-1).astype(np.float32)
    return result


def _roots(activations: Array, groups: int) -> Any:
    """For each group a matrix R (size, rank) with R·Rᵀ = Xᵀ·X, no larger than X: |D·Xᵀ| = |D·R| for any D."""
    import torch

    tokens, columns = activations.shape
    size = columns // groups
    parts = torch.from_numpy(np.ascontiguousarray(activations)).view(tokens, groups, size).transpose(0, 1)
    if tokens > size:
        parts = torch.linalg.qr(parts.contiguous(), mode="r").R
    return parts.transpose(1, 2).contiguous()


def _errors(rows: Any, scales: Array, roots: Any, quantizer: Quantizer) -> NDArray[np.float64]:
    """Squared output error of each group."""
    import torch

    factor = torch.from_numpy(scales)
    difference = quantizer.round_trip(rows * factor).div_(factor).sub_(rows)
    norms: NDArray[np.float64] = torch.linalg.vector_norm(torch.bmm(difference, roots), dim=(1, 2)).double().numpy()
    return np.square(norms)
