"""The pruning plan: which slices of which tensors stay, and what else changes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.errors import PlanError, nearest
from slimkit.plan import PLAN_KINDS, Plan, applied_plans
from slimkit.prune.costing import Cost
from slimkit.prune.edit_values import (
    AttributeEdit,
    Edit,
    check_edits,
    check_sizes,
    pack_indices,
    read_attribute,
    read_edit,
    read_shapes,
    read_text,
    unpack_indices,
)
from slimkit.prune.explaining import LayerChange, explanation

__all__ = ["AttributeEdit", "Edit", "PrunePlan", "pack_indices", "unpack_indices"]


@PLAN_KINDS.register("prune")
@dataclass(frozen=True)
class PrunePlan(Plan):
    """Structured pruning: channels that leave, with everything that depends on them.

    Attributes:
        model: class name of the network that it was made for.
        shapes: name → shape that each edited tensor has before.
        edits: what stays of them.
        attributes: attributes that follow.
        layers: what happens to each layer and why, for people.
        before, after: costs for the example input.
        settings: how the plan was made (criterion, allocation, target …).
        network: name → shape of all parameters before; ``None`` in a file of an older version:
            then only what is edited is compared.
    """

    kind: ClassVar[str] = "prune"

    model: str
    shapes: Mapping[str, tuple[int, ...]]
    edits: tuple[Edit, ...]
    attributes: tuple[AttributeEdit, ...]
    layers: tuple[LayerChange, ...]
    before: Cost
    after: Cost
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, tuple[int, ...]] | None = None

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """Layer → (output channels kept, output channels before)."""
        return {layer.name: (layer.kept, layer.channels) for layer in self.layers}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know: modules that did not run, a noisy measurement."""
        return tuple(self.settings.get("warnings", ()))

    def explain(self) -> str:
        """A table of all layers that multiply: group, channels before → after, or why not."""
        return explanation(self.model, self.layers, self.before, self.after, self.settings)

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; runs of indices as ``[first, last + 1]``."""
        return {
            "model": self.model,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "edits": [
                {"tensor": e.tensor, "dim": e.dim, "keep": pack_indices(e.keep)} for e in self.edits
            ],
            "attributes": [asdict(edit) for edit in self.attributes],
            "layers": [asdict(layer) for layer in self.layers],
            "before": asdict(self.before),
            "after": asdict(self.after),
            "settings": dict(self.settings),
            "network": None
            if self.network is None
            else {name: list(shape) for name, shape in self.network.items()},
        }

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],  # noqa: ARG003 - a pruning plan has none
    ) -> PrunePlan:
        """The inverse of :meth:`to_json`.

        Raises:
            PlanError: an edit is none of its tensor.
            KeyError, TypeError, ValueError: it is something else.
        """
        shapes, network = read_shapes(data["shapes"]), data.get("network")
        plan = cls(
            model=read_text(data["model"]),
            shapes=shapes,
            edits=tuple(read_edit(e, shapes) for e in data["edits"]),
            attributes=tuple(read_attribute(e) for e in data["attributes"]),
            layers=tuple(
                LayerChange(
                    **{
                        **layer,
                        "groups": tuple(layer["groups"]),
                        "sets": _tupled(layer.get("sets")),
                    }
                )
                for layer in data["layers"]
            ),
            before=Cost(**data["before"]),
            after=Cost(**data["after"]),
            settings=dict(data["settings"]),
            network=None if network is None else read_shapes(network),
        )
        check_edits(plan.edits, plan.shapes)
        return plan

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Slice the tensors of ``model`` in place; see :func:`slimkit.apply`.

        Parameters are replaced by new ones (``requires_grad`` stays, gradients go), tied
        ones together; an optimizer must be made afterwards, or follow (:meth:`follow`).

        Raises:
            PlanError: a tensor or attribute differs from what the plan expects; nothing
                was changed.
        """
        self.check(model)
        holders = _holders(model)
        tensors = {name: _find(model, name) for name in self.shapes}
        sliced = {
            name: _sliced(tensors[name], edits) for name, edits in _by_tensor(self.edits).items()
        }
        for name, new in sliced.items():
            for module, local in holders[id(tensors[name])]:
                _replace(module, local, new)
        for edit in self.attributes:
            _set_attribute(model.get_submodule(edit.module), edit.attribute, edit.after)
        return model

    def follow(
        self, model: nn.Module, companion: Any, *, where: str = "companions"
    ) -> Callable[[nn.Module], None]:
        """See the base class, and :func:`slimkit.prune.companions.following`."""
        from slimkit.prune.companions import following

        return following(self, model, companion, where)

    @property
    def sliced(self) -> Mapping[str, tuple[int, ...]]:
        """See the base class."""
        return self.shapes

    def slice_state(self, name: str, tensor: Tensor) -> Tensor:
        """See the base class. Dimensions of size 1, which broadcast, stay."""
        shape = self.shapes.get(name)
        if shape is None:
            return tensor
        if tensor.dim() != len(shape) or any(
            own not in {1, size} for own, size in zip(tensor.shape, shape, strict=True)
        ):
            raise PlanError(
                f"expected a tensor of shape {tuple(shape)}, got {tuple(tensor.shape)}",
                where=name,
            )
        edits = [e for e in self.edits if e.tensor == name]
        return _sliced(tensor, [e for e in edits if tensor.shape[e.dim] == shape[e.dim]])

    def check(self, model: nn.Module) -> None:
        """Make sure that the plan fits ``model``, as :meth:`apply_to` does first.

        Raises:
            PlanError: a tensor or attribute differs from what the plan expects.
        """
        check_edits(self.edits, self.shapes)
        self._check_tensors(model)
        for edit in self.attributes:
            found = _get_attribute(_module(model, edit.module), edit.attribute)
            if found != edit.before:
                raise PlanError(
                    f"the plan expects {edit.attribute} = {edit.before}, the model has {found}",
                    where=edit.module,
                )
        check_sizes(model, self.edits, self.attributes)

    def _check_tensors(self, model: nn.Module) -> None:
        """The part of :meth:`check` about names and shapes."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        named = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
        for name, shape in {**(self.network or {}), **self.shapes}.items():
            if name not in named:
                raise PlanError(
                    f"the plan was made for {self.model} and "
                    f"{'edits' if name in self.shapes else 'knows'} {name!r}, which this "
                    f"{type(model).__name__} does not have",
                    where=name,
                    hint=nearest(name, named),
                )
            if tuple(named[name].shape) != shape:
                again = any(earlier is self or earlier == self for earlier in applied_plans(model))
                raise PlanError(
                    f"the plan expects shape {shape}, the model has {tuple(named[name].shape)}",
                    where=name,
                    hint="this plan was applied to this model before"
                    if again
                    else f"apply it to the {self.model} that it was made for, before any "
                    "other pruning",
                )
        more = [name for name in parameters if self.network and name not in self.network]
        if more:
            raise PlanError(
                f"the plan was made for a {self.model} without this parameter; this "
                f"{type(model).__name__} has {len(more)} more than that",
                where=more[0],
                hint="apply it to the network that it was made for",
            )


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except (AttributeError, RuntimeError) as error:  # a ScriptModule hands none out
        modules = dict(model.named_modules())
        raise PlanError("no such module", where=path, hint=nearest(path, modules)) from error


def _get_attribute(module: nn.Module, attribute: str) -> Any:
    """An attribute, or an element of one: ``"splits[2]"``."""
    name, bracket, index = attribute.partition("[")
    found = getattr(module, name, None)
    if not bracket:
        return tuple(found) if isinstance(found, list) else found
    digits = index.rstrip("]")
    if not digits.isdecimal():
        return None
    place = int(digits)
    return found[place] if isinstance(found, list | tuple) and place < len(found) else None


def _set_attribute(module: nn.Module, attribute: str, value: Any) -> None:
    name, bracket, index = attribute.partition("[")
    if bracket:
        held = getattr(module, name)
        items = list(held)
        items[int(index.rstrip("]"))] = value
        value = type(held)(items)
    setattr(module, name, value)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _by_tensor(edits: Iterable[Edit]) -> dict[str, list[Edit]]:
    grouped: dict[str, list[Edit]] = {}
    for edit in edits:
        grouped.setdefault(edit.tensor, []).append(edit)
    return grouped


def _find(model: nn.Module, name: str) -> Tensor:
    path, _, local = name.rpartition(".")
    found = getattr(model.get_submodule(path), local)
    assert isinstance(found, Tensor)
    return found


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Tensor identity → every (module, attribute) that holds it: tied weights have several."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((module, local))
    return holders


_CHUNK = 1 << 18
"""Elements (1 MiB of float32) that stay in the second-level cache between two selections."""


def _sliced(old: Tensor, edits: Iterable[Edit]) -> Tensor:
    """A copy of what stays of ``old``, in the same memory format."""
    data = _selected(old.detach(), list(edits))
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        data = data.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(data, requires_grad=old.requires_grad)
    return data


def _selected(data: Tensor, edits: Sequence[Edit]) -> Tensor:
    """What the edits keep; of a large matrix on a CPU some rows at a time.

    Selecting all rows first would write a large copy, for the other edits to read once.
    """
    chosen = [
        (edit.dim, torch.from_numpy(np.asarray(edit.keep, dtype=np.int64)).to(data.device))
        for edit in edits
    ]
    rows = [index for dim, index in chosen if dim == 0]
    others = [(dim, index) for dim, index in chosen if dim != 0]
    if len(rows) != 1 or not others or data.numel() <= _CHUNK or data.device.type != "cpu":
        return _in_turn(data, chosen)
    shape = [len(rows[0]), *data.shape[1:]]
    for dim, index in others:
        shape[dim] = len(index)
    result = data.new_empty(shape)
    at_once = max(1, _CHUNK * len(data) // data.numel())
    for part, kept in zip(torch.split(result, at_once), torch.split(rows[0], at_once), strict=True):
        part.copy_(_in_turn(data, [(0, kept), *others]))
    return result


def _in_turn(data: Tensor, chosen: Iterable[tuple[int, Tensor]]) -> Tensor:
    for dim, index in chosen:
        data = data.index_select(dim, index)
    return data


def _replace(module: nn.Module, local: str, new: Tensor) -> None:
    if isinstance(new, nn.Parameter):
        module._parameters[local] = new
        if isinstance(module, nn.RNNBase):  # keeps its weights in a list, too
            setattr(module, local, new)
    else:
        module._buffers[local] = new
