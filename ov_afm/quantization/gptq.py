"""Rounding a matrix column by column, each error carried over to the columns that are not rounded yet.

GPTQ (https://arxiv.org/abs/2210.17323): with H = XᵀX of the matrix's inputs and H⁻¹ = UᵀU, U upper triangular, rounding
column j by an error e costs least if the columns k after it are moved by -e·U_jk/U_jj. The scale of a group is chosen
when its first column is reached, so that it fits the weights as they have been moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .quantizer import Quantizer, usable

__all__ = ["Rounded", "inverse_root", "round_with_feedback"]

# Added to the diagonal of H, relative to its mean: directions that calibration text hardly shows stay as they are.
DAMPING = 0.01
# Scales tried for a group, as shares of the one that reaches its largest weight.
SHARES = tuple(1 - step / 25 for step in range(11))
# Columns of a matrix with one scale a row that are rounded before the rest is moved.
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix as it will be stored; `weight` is (codes - zero) · scale.

    Attributes:
        codes: (rows, columns), whole numbers: signed if symmetric.
        scale: (rows, groups), exact in fp16.
        zero: (rows, groups), whole numbers; zeros if symmetric.
    """

    codes: Any
    scale: Any
    zero: Any

    @property
    def weight(self) -> Any:
        """The values that the codes stand for (rows, columns)."""
        rows, groups = self.scale.shape
        parts = self.codes.view(rows, groups, -1)
        return ((parts - self.zero[:, :, None]) * self.scale[:, :, None]).view(rows, -1)


def inverse_root(gram: Any) -> Any:
    """Upper triangular U with UᵀU = (H + λI)⁻¹, from H (columns, columns), which is overwritten."""
    import torch

    gram.diagonal().add_(DAMPING * gram.diagonal().mean().clamp(min=1e-12))
    # H = R·Rᵀ with R upper triangular is the Cholesky factor of H turned by 180°; then U = R⁻¹.
    root = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(root), dtype=root.dtype)
    return torch.linalg.solve_triangular(root, identity, upper=True)


def round_with_feedback(weight: Any, root: Any, quantizer: Quantizer) -> Rounded:
    """Round a matrix so that its outputs change least.

    Args:
        weight: (rows, columns), a torch tensor.
        root: `inverse_root` of its inputs' gram matrix.
        quantizer: The format.
    """
    import torch

    rows, columns = weight.shape
    size = quantizer.group_of(columns)
    block = min(size, BLOCK)
    remaining = weight.clone()
    codes = torch.empty_like(weight)
    importance = root.diagonal().square().reciprocal()
    scales, zeros = [], []
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if start % size == 0:
            scale, zero = fit_grid(remaining[:, start : start + size], importance[start : start + size], quantizer)
            scales.append(scale)
            zeros.append(zero)
        # Column by column: rows of the transposed block lie together in memory.
        part = remaining[:, start:end].T.contiguous()
        errors = torch.empty_like(part)
        inner = root[start:end, start:end]
        for at in range(end - start):
            code = quantizer.code(part[at], scales[-1], zeros[-1])
            codes[:, start + at] = code
            errors[at] = (part[at] - (code - zeros[-1]) * scales[-1]) / inner[at, at]
            part[at + 1 :].addr_(inner[at, at + 1 :], errors[at], alpha=-1)
        remaining[:, end:].addmm_(errors.T, root[start:end, end:], alpha=-1)
    return Rounded(codes, torch.stack(scales, 1), torch.stack(zeros, 1))


def fit_grid(weight: Any, importance: Any, quantizer: Quantizer) -> tuple[Any, Any]:
    """Scale and zero point (rows,) of one group (rows, size) that cost least, errors weighted by column."""
    import torch

    best = scale = zero = None
    for share in SHARES:
        for wide, offset in quantizer.grids(weight, share):
            # As it will be stored.
            candidate = usable(wide.half().float())
            code = quantizer.code(weight, candidate[:, None], offset[:, None])
            error = ((code - offset[:, None]) * candidate[:, None] - weight).square() @ importance
            if best is None:
                best, scale, zero = error, candidate, offset
                continue
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, candidate, scale), torch.where(better, offset, zero)
    return scale, zero
