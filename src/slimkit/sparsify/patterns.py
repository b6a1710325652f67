"""Sparsity patterns: which weights become zero together.

By default each weight stands alone (unstructured). :class:`NofM` and :class:`Block` are the two
patterns that hardware and libraries know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkit.doors import door
from slimkit.errors import InputError

__all__ = ["Block", "NofM", "SparsityPattern"]


@door
@dataclass(frozen=True)
class NofM:
    """N:M sparsity: at most ``n`` of ``m`` neighbours along the input channels are not zero.

    2:4 is what NVIDIA's sparse tensor cores compute (Mishra et al. 2021, "Accelerating Sparse
    Deep Neural Networks"). The sparsity follows: ``1 - n / m``.

    Args:
        n: weights that stay, 1 … m - 1.
        m: neighbours, 2 or more.

    Raises:
        InputError: they are out of range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise InputError(
                f"expected 1 ≤ n < m, got {self.n}:{self.m}", where="pattern", hint="NofM(2, 4)"
            )

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.n / self.m

    def unfit(self, weight: Tensor) -> str | None:
        """Why a weight cannot have this pattern, or None."""
        if weight.shape[1] % self.m:
            return f"its {weight.shape[1]} input channels are no multiple of {self.m}"
        return None

    def mask(self, magnitudes: Tensor) -> Tensor:
        """True at the ``n`` largest of every ``m``; of equal ones the first stay."""
        last = magnitudes.movedim(1, -1)
        groups = last.reshape(-1, self.m)
        order = groups.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool)
        mask.scatter_(1, order[:, : self.n], True)
        return mask.reshape(last.shape).movedim(-1, 1)


@door
@dataclass(frozen=True)
class Block:
    """Block sparsity: rectangles of ``rows`` outputs × ``columns`` inputs are zero together.

    The weight is seen as a matrix (outputs, inputs·kernel); a block is scored by the root of the
    mean of its squares. Blocks at the border may be smaller.

    Args:
        rows: output channels of a block, 1 or more.
        columns: inputs of a block, 1 or more.

    Raises:
        InputError: they are out of range.
    """

    rows: int
    columns: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise InputError(
                f"expected at least one row and one column, got {self.rows}×{self.columns}",
                where="pattern",
                hint="Block(2, 1)",
            )

    def unfit(self, weight: Tensor) -> str | None:
        """Why a weight cannot have this pattern, or None."""
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        if self.rows > rows or self.columns > columns:
            return f"a block of {self.rows}×{self.columns} is larger than its {rows}×{columns}"
        return None

    def scores(self, magnitudes: Tensor) -> Tensor:
        """Root mean square of every block, as a matrix."""
        matrix = magnitudes.flatten(1)
        bottom, right = -matrix.shape[0] % self.rows, -matrix.shape[1] % self.columns
        kernel = (self.rows, self.columns)

        def sums(values: Tensor) -> Tensor:
            padded = F.pad(values, (0, right, 0, bottom))[None, None]
            return F.avg_pool2d(padded, kernel)[0, 0]

        return (sums(matrix.square()) / sums(torch.ones_like(matrix))).sqrt()

    def spread(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """A mask of blocks as a mask of weights of ``shape``."""
        whole = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return whole[: shape[0], : shape[1:].numel()].reshape(shape)


SparsityPattern = NofM | Block
