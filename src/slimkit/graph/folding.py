"""Batch-norm folding: a batch norm right behind a convolution is part of that convolution.

In evaluation mode ``BN(W x + b) = (γ/σ) W x + (γ/σ)(b − μ) + β`` with
``σ = sqrt(running_var + eps)``, so scaled weights and one bias give the same outputs.

Some libraries derive modules from batch norm that do more: timm's ``BatchNormAct2d`` has dropout
and an activation function as children. What is left of such a module are its children, in order.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from slimkit.doors import door, structure_door
from slimkit.errors import InputError, PlanError, nearest
from slimkit.graph.capturing import Call, Graph
from slimkit.modules import copy_module
from slimkit.plan import Plan

__all__ = ["FusePlan", "batch_norm_pairs"]

_LAYER_CALLS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"linear"}
)


@structure_door
def batch_norm_pairs(model: nn.Module, graph: Graph) -> list[tuple[str, str]]:
    """The (layer, batch norm) module paths that can be folded, in order of execution.

    The layer is a convolution, transposed convolution or linear layer; its output goes
    into the batch norm and nowhere else; both run once per forward, own their parameters
    alone, and the batch norm has running statistics and computes nothing else by itself (its
    children may, such as the activation function in timm's ``BatchNormAct2d``).

    Args:
        model: the captured model.
        graph: what :func:`~slimkit.graph.capturing.capture` returned for it.

    Raises:
        InputError: the graph is of another model.
    """
    modules = dict(model.named_modules())
    for call in graph.calls:
        if call.module not in modules:
            raise InputError(
                f"it is of another model: {type(model).__name__} has no module {call.module!r}",
                where="graph",
            )
    runs = Counter(c.module for c in graph.calls if c.function in {*_LAYER_CALLS, "batch_norm"})
    pairs = []
    for call in graph.calls:
        if call.function != "batch_norm" or not call.inputs:
            continue
        producer = graph.call_producer(call.inputs[0])
        if producer is None or producer.function not in _LAYER_CALLS:
            continue
        layer, norm = modules[producer.module], modules[call.module]
        once = runs[producer.module] == 1 and runs[call.module] == 1
        shape = graph.tensors[call.inputs[0]].shape
        if (
            once
            and graph.tensors[producer.inputs[1]].name is not None  # else a scale in it is lost
            and _foldable(layer, norm)
            and _alone(graph, producer, call)
            and _is_norm_then_children(norm, shape)
        ):
            pairs.append((producer.module, call.module))
    return pairs


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    if not isinstance(layer, _ConvNd | nn.Linear) or not isinstance(norm, _BatchNorm):
        return False
    if norm.running_mean is None or norm.running_var is None:
        return False
    return not (parametrize.is_parametrized(layer) or layer._parameters.get("weight") is None)


@torch.no_grad()
def _is_norm_then_children(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether it computes a batch norm and then its children in the order they are listed."""
    norm = cast("_BatchNorm", norm)
    if type(norm).forward is _BatchNorm.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape[1:], generator=generator).to(cast("Tensor", norm.running_mean))
    trial = copy_module(norm).eval()
    plain = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    try:
        return torch.allclose(trial(x), _without_norm(trial)(plain), rtol=1e-4, atol=1e-5)
    except Exception:  # a module of the user's may raise anything
        return False


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a batch norm that was folded: nothing, or its children."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children).train(norm.training) if children else nn.Identity()


def _alone(graph: Graph, layer: Call, norm: Call) -> bool:
    """Nothing else reads the layer's output, nor uses the weights of the two."""
    value = norm.inputs[0]
    if graph.call_consumers(value) != [norm] or value in graph.outputs:
        return False
    if layer.function == "linear" and len(graph.tensors[value].shape) != 2:
        return False  # behind (N, L, C) a batch norm normalises L
    owned = [*layer.inputs[1:], *norm.inputs[1:]]
    return all(len(graph.call_consumers(parameter)) == 1 for parameter in owned)


@door
@dataclass(frozen=True)
class FusePlan(Plan):
    """Folds batch norms into the layers in front of them.

    Attributes:
        pairs: (layer path, batch norm path). The layer gets a bias if it has none; the
            batch norm becomes ``nn.Identity``, or a sequence of its children if it has some.
            Outputs in evaluation mode stay the same.
    """

    kind: ClassVar[str] = "fuse"
    pairs: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """The pairs as lists."""
        return {"pairs": [list(pair) for pair in self.pairs]}

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],  # noqa: ARG003 - the interface passes them
    ) -> FusePlan:
        """Read what :meth:`to_json` wrote."""
        return cls(tuple((str(layer), str(norm)) for layer, norm in data["pairs"]))

    def explain(self) -> str:
        """One line per pair."""
        if not self.pairs:
            return "no batch norm can be folded"
        return "\n".join(f"{norm} folds into {layer}" for layer, norm in self.pairs)

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Fold in place and return ``model``.

        Raises:
            PlanError: a module is missing, of another type or of another size; nothing
                was changed.
        """
        self.check(model)
        modules = dict(model.named_modules())
        for layer_path, norm_path in self.pairs:
            _fold(modules[layer_path], modules[norm_path])
            parent, _, name = norm_path.rpartition(".")
            setattr(model.get_submodule(parent), name, _without_norm(modules[norm_path]))
        return model

    def check(self, model: nn.Module, replaced: Mapping[str, nn.Module] | None = None) -> None:
        """Make sure that the plan fits ``model``, as :meth:`apply_to` does first.

        Args:
            model: not changed.
            replaced: path → module that will be there by then.

        Raises:
            PlanError: a module is missing, is there twice, of another type or of another size.
        """
        modules = {**dict(model.named_modules()), **(replaced or {})}
        seen: set[str] = set()
        for layer_path, norm_path in self.pairs:
            for path in (layer_path, norm_path):
                if path not in modules:
                    raise PlanError("no such module", where=path, hint=nearest(path, modules))
                if path in seen:
                    raise PlanError("it is in two pairs", where=path)
                seen.add(path)
            layer, norm = modules[layer_path], modules[norm_path]
            if not _foldable(layer, norm):
                raise PlanError(
                    f"cannot fold {type(norm).__name__} into {type(layer).__name__}",
                    where=norm_path,
                )
            if _out_channels(layer) != norm.num_features:
                raise PlanError(
                    f"{norm.num_features} channels, but {layer_path} makes {_out_channels(layer)}",
                    where=norm_path,
                )


def _out_channels(layer: nn.Module) -> Any:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Fold in double precision, so that only the final rounding differs."""
    norm = cast("_BatchNorm", norm)
    weight, bias = cast("nn.Parameter", layer.weight), cast("nn.Parameter | None", layer.bias)
    scale = torch.rsqrt(_double(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * _double(norm.weight)
    shift = -_double(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + _double(norm.bias)
    if bias is not None:
        shift = shift + _double(bias) * scale
    values = _double(weight)
    if isinstance(layer, _ConvTransposeNd):  # (C_in, C_out / groups, …), group by group
        grouped = values.reshape(layer.groups, -1, *values.shape[1:])
        per_group = scale.reshape(layer.groups, 1, -1, *[1] * (values.ndim - 2))
        scaled = (grouped * per_group).flatten(0, 1)
    else:
        scaled = values * scale.reshape(-1, *[1] * (values.ndim - 1))
    weight.copy_(scaled)
    if bias is not None:
        bias.copy_(shift)
    else:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _double(tensor: Tensor | None) -> Tensor:
    return cast("Tensor", tensor).detach().to(torch.float64)
