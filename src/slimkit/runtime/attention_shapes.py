"""Attention over any number of leading dimensions, for the ONNX exporter, which takes four."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FourDimensionalAttention"]


class FourDimensionalAttention(TorchFunctionMode):
    """While it is on, ``F.scaled_dot_product_attention`` is called with (N, heads, L, E) only.

    PyTorch takes (…, L, E); leading dimensions are folded into the first, or one is added.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args and args[0].dim() != 4:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Tensor:
    leading = query.shape[:-2]

    def folded(x: Tensor) -> Tensor:
        if len(leading) < 2:
            return x.reshape(*[1] * (2 - len(leading)), *x.shape)
        return x.reshape(-1, *x.shape[-3:])

    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = folded(attn_mask.expand(*leading, *attn_mask.shape[-2:]))
    attended: Tensor = F.scaled_dot_product_attention(
        folded(query), folded(key), folded(value), attn_mask, *rest, **more
    )
    return attended.reshape(*leading, *attended.shape[-2:])
