"""What a pruning plan is made of: slices and attributes, as values, and what they must satisfy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from slimkit.errors import PlanError

__all__ = [
    "AttributeEdit",
    "Edit",
    "check_edits",
    "check_sizes",
    "pack_indices",
    "read_attribute",
    "read_edit",
    "read_shapes",
    "read_text",
    "unpack_indices",
]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Edit:
    """What stays of one dimension of one parameter or buffer.

    Attributes:
        tensor: its name in the model.
        dim: the dimension that shrinks.
        keep: positions that stay, ascending.
    """

    tensor: str
    dim: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class AttributeEdit:
    """A plain attribute that follows the new sizes, such as ``out_channels``.

    Attributes:
        module: path of the module.
        attribute: its name.
        before: the value that it must have.
        after: the value that it gets.
    """

    module: str
    attribute: str
    before: Any
    after: Any


def pack_indices(indices: Sequence[int]) -> list[int] | list[list[int]]:
    """Ascending indices as runs ``[first, last + 1]`` where that is shorter."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return runs if 2 * len(runs) < len(indices) else list(indices)


def unpack_indices(
    packed: Iterable[int | Sequence[int]], size: int | None = None
) -> tuple[int, ...]:
    """The inverse of :func:`pack_indices`.

    Args:
        packed: positions, or runs of them.
        size: of the dimension that they lie in.

    Raises:
        TypeError, ValueError: they are no integers, or one lies outside ``size``.
    """
    indices: list[int] = []
    for item in packed:
        first, last = (item, item + 1) if isinstance(item, int) else item
        if not (_whole(first) and _whole(last)):
            raise TypeError(f"{item!r} is no position")
        if first < 0 or (size is not None and last > size):
            raise ValueError(f"{item!r} lies outside a dimension of {size}")
        indices.extend(range(first, last))
    return tuple(indices)


def read_edit(data: Mapping[str, Any], shapes: Shapes) -> Edit:
    """An edit from JSON; ranges are unfolded only where they fit their tensor.

    Raises:
        PlanError: its shape is missing, or it has no such dimension or position.
        KeyError, TypeError: it is something else.
    """
    name, dim = read_text(data["tensor"]), data["dim"]
    _check_dimension(name, dim, shapes)
    try:
        return Edit(name, dim, unpack_indices(data["keep"], shapes[name][dim]))
    except ValueError as error:
        raise PlanError(f"keep of dimension {dim}: {error}", where=name) from error


def read_shapes(data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape from JSON.

    Raises:
        TypeError: a shape is no list of sizes.
    """
    for name, shape in data.items():
        if not isinstance(shape, list) or not all(_whole(size) and size >= 0 for size in shape):
            raise TypeError(f"{shape!r} is no shape of {name!r}")
    return {name: tuple(shape) for name, shape in data.items()}


def read_text(value: object) -> str:
    """``value``, which is a text.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_dimension(name: str, dim: object, shapes: Shapes) -> None:
    if name not in shapes:
        raise PlanError("the plan edits a tensor whose shape it does not have", where=name)
    if not isinstance(dim, int) or not _whole(dim) or not 0 <= dim < len(shapes[name]):
        raise PlanError(f"it has shape {shapes[name]}, so no dimension {dim!r}", where=name)


def check_edits(edits: Sequence[Edit], shapes: Shapes) -> None:
    """Every edit is one of its tensor, and every tensor with a shape has one.

    Raises:
        PlanError: a dimension does not exist or has two edits, ``keep`` is empty, not ascending
            or lies outside; a shape is missing, or there for nothing.
    """
    seen = set()
    for edit in edits:
        _check_dimension(edit.tensor, edit.dim, shapes)
        size = shapes[edit.tensor][edit.dim]
        if (edit.tensor, edit.dim) in seen:
            raise PlanError(f"two edits of dimension {edit.dim}", where=edit.tensor)
        seen.add((edit.tensor, edit.dim))
        if not edit.keep or edit.keep[0] < 0 or edit.keep[-1] >= size:
            raise PlanError(
                f"keep of dimension {edit.dim} is empty or lies outside 0 … {size - 1}",
                where=edit.tensor,
            )
        if any(later <= earlier for earlier, later in pairwise(edit.keep)):
            raise PlanError(
                f"keep of dimension {edit.dim} is not ascending, or has a position twice",
                where=edit.tensor,
            )
    idle = set(shapes) - {tensor for tensor, _ in seen}
    if idle:
        raise PlanError("the plan has its shape and no edit of it", where=min(idle))


def read_attribute(data: Mapping[str, Any]) -> AttributeEdit:
    """An attribute's edit from JSON.

    Raises:
        KeyError, TypeError: it is something else, or the value changes its type.
    """
    before, after = (
        tuple(value) if isinstance(value, list) else value
        for value in (data["before"], data["after"])
    )
    if type(before) is not type(after):
        raise TypeError(f"{data['attribute']} changes from {before!r} to {after!r}")
    return AttributeEdit(read_text(data["module"]), read_text(data["attribute"]), before, after)


def check_sizes(
    model: nn.Module, edits: Iterable[Edit], attributes: Iterable[AttributeEdit]
) -> None:
    """The tensors and attributes of a module that agree before the plan agree after it.

    Args:
        model: has all that is edited, in the sizes that the plan expects.
        edits: what stays of its tensors, also of those that go by several names.
        attributes: what follows.

    Raises:
        PlanError: they do not, as when a single ``keep`` was shortened.
    """
    left: dict[int, dict[int, int]] = {}
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for edit in edits:
        left.setdefault(id(tensors[edit.tensor]), {})[edit.dim] = len(edit.keep)
    changes: dict[str, dict[str, Any]] = {}
    for each in attributes:
        changes.setdefault(each.module, {})[each.attribute] = each.after
    for path, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        held = {name: tensor for name, tensor in own.items() if tensor is not None}
        if path not in changes and not any(id(tensor) in left for tensor in held.values()):
            continue
        before = _shapes_by_attributes(module, {})
        after = _shapes_by_attributes(module, changes.get(path, {}))
        for name, tensor in held.items():
            shape = tuple(tensor.shape)
            kept = left.get(id(tensor), {})
            now = tuple(kept.get(dim, size) for dim, size in enumerate(shape))
            if before.get(name) == shape and after.get(name) != now:
                raise PlanError(
                    f"the plan leaves shape {now}, but its attributes say {after.get(name)}",
                    where=f"{path}.{name}" if path else name,
                )


def _shapes_by_attributes(
    module: nn.Module, changes: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Tensor → the shape that a module's attributes say; empty for modules that are not known.

    Args:
        module: any.
        changes: attribute → value to be put in place of the module's own.
    """

    def size(attribute: str) -> Any:
        return changes.get(attribute, getattr(module, attribute, None))

    try:
        if isinstance(module, _ConvNd):
            outs, ins, groups = size("out_channels"), size("in_channels"), size("groups")
            rows = (ins, outs // groups) if module.transposed else (outs, ins // groups)
            return {"weight": (*rows, *module.weight.shape[2:]), "bias": (outs,)}
        if isinstance(module, nn.Linear):
            outs = size("out_features")
            return {"weight": (outs, size("in_features")), "bias": (outs,)}
        if isinstance(module, nn.Embedding):
            return {"weight": (size("num_embeddings"), size("embedding_dim"))}
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape = tuple(size("normalized_shape"))
            return {"weight": shape, "bias": shape}
        for kind, attribute in _ONE_SIZE.items():
            if isinstance(module, kind):
                return dict.fromkeys(_PER_CHANNEL, (size(attribute),))
    except (TypeError, ZeroDivisionError):  # an attribute that is no size
        return {}
    return {}


_ONE_SIZE = {_NormBase: "num_features", nn.GroupNorm: "num_channels", nn.PReLU: "num_parameters"}
_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
