"""Layers that compute their weight at every call, as plain layers with the weight they computed.

Weight standardisation (Qiao et al., 2019, arXiv:1903.10520), the scaled kind of NFNets (Brock et
al., 2021, arXiv:2101.08692), weight and spectral norm: in evaluation mode the weight depends on
parameters alone, so a plain layer with that weight gives the same outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimkit.errors import PlanError, nearest
from slimkit.graph.capturing import Graph

__all__ = ["LAYER_CALLS", "computed_weights", "make_plain"]

LAYER_CALLS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    *("dilation", "groups", "padding_mode"),
)
_SPARE = 3  # pixels that an image is larger than the kernel


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
        if call.function in LAYER_CALLS
        and len(call.inputs) > 1
        and graph.tensors[call.inputs[1]].name is None
    )
    return tuple(path for path in dict.fromkeys(computing) if path and _plain(modules[path]))


def make_plain(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """Replace those layers in place and return ``model``.

    Raises:
        PlanError: a layer is missing, or computes more than a plain one would; nothing was
            changed.
    """
    modules = dict(model.named_modules())
    plain: dict[str, nn.Module] = {}
    for path in paths:
        if path not in modules:
            raise PlanError("no such module", where=path, hint=nearest(path, modules))
        found = _plain(modules[path])
        if found is None:
            kind = type(modules[path]).__name__
            raise PlanError(f"{kind} is no layer with a weight of its own", where=path)
        plain[path] = found
    for path, layer in plain.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model


@torch.no_grad()
def _plain(layer: nn.Module) -> nn.Module | None:
    """A layer of torch's with the same outputs in evaluation mode, if there is one."""
    if layer._forward_hooks:
        return None
    trial = copy.deepcopy(layer).eval()
    try:
        made, x = _unfilled(trial)
        with _Weights() as seen:
            expected = trial(x)
        ((weight, bias),) = seen.found
        made.weight = nn.Parameter(weight.detach().clone())
        made.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        other = 2 * x.flip(0) + 1  # for which a weight that depends on the input is another
        for found, wanted in ((made(x), expected), (made(other), trial(other))):
            if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                return None
    except Exception:  # a module of the user's may raise anything
        return None
    return made.train(layer.training)


def _unfilled(layer: nn.Module) -> tuple[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, Tensor]:
    """Torch's layer with the settings of ``layer``, and an input for both."""
    parameter = next(layer.parameters())
    draw = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        x = torch.randn(2, layer.in_features, generator=draw).to(parameter)
        return nn.Linear(layer.in_features, layer.out_features, device="meta"), x
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, kind):
            reach = zip(layer.kernel_size, layer.dilation, strict=True)
            size = [1 + step * (kernel - 1) + _SPARE for kernel, step in reach]
            x = torch.randn(2, layer.in_channels, *size, generator=draw).to(parameter)
            settings: dict[str, Any] = {name: getattr(layer, name) for name in _SETTINGS}
            return kind(**settings, device="meta"), x
    raise TypeError(type(layer).__name__)


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
        if getattr(func, "__name__", "") in LAYER_CALLS:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
            self.found.append((given["weight"], given.get("bias")))
        return func(*args, **(kwargs or {}))
