"""Constant folding of computed weights: a layer that computes its weight becomes a plain layer.

Weight standardisation (Qiao et al., 2019, arXiv:1903.10520), the scaled kind of NFNets (Brock et
al., 2021, arXiv:2101.08692), weight and spectral norm: in evaluation mode the weight depends on
parameters alone, so a plain layer with that weight gives the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from slimkit.errors import PlanError, nearest
from slimkit.graph.capturing import Graph
from slimkit.modules import copy_module

__all__ = [
    "SamePadConv2d",
    "computed_weights",
    "make_plain",
    "masked_weights",
    "plain_layers",
    "replace_layers",
]

_LAYER_CALLS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    *("dilation", "groups", "padding_mode"),
)


def computed_weights(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """Paths of the layers that :func:`make_plain` can replace, in order of execution.

    Args:
        model: the captured model.
        graph: what :func:`~slimkit.graph.capturing.capture` returned for it.
    """
    modules = dict(model.named_modules())
    computing = (
        call.module
        for call in graph.calls
        if call.function in _LAYER_CALLS
        and len(call.inputs) > 1
        and graph.tensors[call.inputs[1]].name is None
    )
    return tuple(path for path in dict.fromkeys(computing) if path and _plain(modules[path]))


def masked_weights(graph: Graph) -> dict[str, str]:
    """Parameter → the buffer of zeros and ones that its layer multiplies it by.

    As ``torch.nn.utils.prune`` does (``weight_orig``, ``weight_mask``), and layers that keep a
    mask of their own.
    """
    found = {}
    for op in graph.ops:
        if op.name.startswith("aten.mul.") and len(op.inputs) == 2:
            infos = [graph.tensors[value] for value in op.inputs]
            names = [info.name for info in infos if info.name is not None]
            masks = [name for name in names if name in graph.buffers]
            if len(names) == 2 and len(masks) == 1 and infos[0].shape == infos[1].shape:
                found[next(name for name in names if name not in masks)] = masks[0]
    return found


def plain_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Path → the layer that would replace it; ``model`` stays as it is.

    Raises:
        PlanError: a layer is missing, or computes more than a plain one would.
    """
    modules = dict(model.named_modules())
    plain: dict[str, nn.Module] = {}
    for path in paths:
        if path not in modules or not path:
            raise PlanError("no such module", where=path, hint=nearest(path, modules))
        found = _plain(modules[path])
        if found is None:
            kind = type(modules[path]).__name__
            raise PlanError(f"{kind} is no layer with a weight of its own", where=path)
        plain[path] = found
    return plain


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put each layer at its path, in place, and return ``model``."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model


def make_plain(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Replace those layers in place and return ``model``; see :func:`plain_layers`.

    Raises:
        PlanError: a layer is missing, or computes more than a plain one would; nothing was
            changed.
    """
    return replace_layers(model, plain_layers(model, paths))


@torch.no_grad()
def _plain(layer: nn.Module) -> nn.Module | None:
    """A layer with the same outputs in evaluation mode and a weight of its own, if there is one."""
    if layer._forward_hooks:
        return None
    trial = copy_module(layer).eval()
    try:
        inputs = _inputs(trial)
        with _Weights() as seen:
            outputs = [trial(x) for x in inputs]
        weight, bias = seen.found[0]
        for made in _candidates(trial):
            made.weight = nn.Parameter(weight.detach().clone())
            made.bias = None if bias is None else nn.Parameter(bias.detach().clone())
            if all(_close(made(x), output) for x, output in zip(inputs, outputs, strict=True)):
                return made.train(layer.training)
    except Exception:  # a module of the user's may raise anything
        return None
    return None


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def _inputs(layer: nn.Module) -> list[Tensor]:
    """Inputs of several sizes and sums: neither weight nor padding may depend on them."""
    parameter = next(layer.parameters())
    draw = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shapes: list[tuple[int, ...]] = [(2, layer.in_features)] * 2
    else:
        conv = cast("nn.Conv2d", layer)
        reach = [
            step * (kernel - 1)
            for kernel, step in zip(conv.kernel_size, conv.dilation, strict=True)
        ]
        shapes = [(2, conv.in_channels, *(n + more for n in reach)) for more in (4, 7)]
    return [
        torch.randn(shape, generator=draw).add(shift).to(parameter)
        for shift, shape in enumerate(shapes)
    ]


def _candidates(layer: nn.Module) -> Iterator[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Layers with the settings of ``layer``, still without weights."""
    if isinstance(layer, nn.Linear):
        yield nn.Linear(layer.in_features, layer.out_features, device="meta")
    settings: dict[str, Any] = {name: getattr(layer, name, None) for name in _SETTINGS}
    if isinstance(layer, nn.Conv1d):
        yield nn.Conv1d(**settings, device="meta")
    if isinstance(layer, nn.Conv2d):
        yield nn.Conv2d(**settings, device="meta")
        yield SamePadConv2d(**settings, device="meta")
    if isinstance(layer, nn.Conv3d):
        yield nn.Conv3d(**settings, device="meta")


class SamePadConv2d(nn.Conv2d):
    """Pads as TensorFlow's "SAME" does: ⌈size / stride⌉ outputs, the odd pixel at the far side."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', ⌈H / stride⌉, ⌈W / stride⌉)."""
        pads: list[int] = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            pads += [total // 2, total - total // 2]
        return F.conv2d(
            F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class _Weights(TorchFunctionMode):
    """Notes weight and bias of every layer call inside.

    Attributes:
        found: in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in _LAYER_CALLS:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
            self.found.append((given["weight"], given.get("bias")))
        return func(*args, **(kwargs or {}))
