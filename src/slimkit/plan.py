"""Plans: small values that say exactly what a method changes, and the one entry that applies them.

Pruning, masking, quantizing, fusing and choosing a sub-network each end in a :class:`Plan`.
It can be printed, explained, saved as JSON (with a safetensors sidecar for masks and
scales) and replayed on a fresh model without capturing it again. A compressed model is
therefore always *weights + plans*: :func:`save` writes both, :func:`load` replays them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast

from slimkit.artifact import (
    PathLike,
    atomic_directory,
    content_hash,
    file_hash,
    read_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from slimkit.doors import door, structure_door
from slimkit.errors import (
    ArtifactError,
    CheckpointError,
    InputError,
    ModelError,
    PlanError,
    nearest,
)
from slimkit.outside import called
from slimkit.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "PLAN_KINDS",
    "Companion",
    "Plan",
    "applied_plans",
    "apply",
    "load",
    "load_weights",
    "save",
]

FORMAT_VERSION = 1
"""Of the envelope around every plan's JSON; a file of another version is refused."""
_ATTRIBUTE = "slimkit_plans"
"""The attribute of a model that lists the plans that were applied to it."""
_INDEX, _WEIGHTS = "plans.json", "weights.safetensors"
"""The two files that every saved folder has."""
Module = TypeVar("Module", bound="nn.Module")

PLAN_KINDS: Registry[type[Plan]] = Registry("plan kind")
"""Kind → plan class. Methods add theirs by name only, so that reading a plan imports one method."""


class Companion(Protocol):
    """What is made for a model and has to change with it, given to :func:`apply`.

    Optimizers, masks (a dictionary of tensors by name) and networks of the same structure need
    none of this.
    """

    def follow(self, plan: Plan) -> Callable[[nn.Module], None]:
        """Check that it can go on after ``plan``, and change nothing yet.

        Returns:
            What makes it so; is called with the changed model when all of it has changed.

        Raises:
            PlanError: it cannot; the model then stays as it is, too.
        """


class Plan(ABC):
    """What one method changes in one model. Subclasses are frozen dataclasses.

    A subclass sets :attr:`kind` (its name in :data:`PLAN_KINDS`) and :attr:`version`, and
    says how it is written, explained and applied.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All of the plan but its tensors, as JSON-able values."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
        """The inverse of :meth:`to_json` and :meth:`tensors`."""

    def tensors(self) -> dict[str, Tensor]:
        """Masks, scales and the like, by name; empty unless a method needs it."""
        return {}

    @abstractmethod
    def explain(self) -> str:
        """A text for people: every layer, what happens to it, or why nothing does."""

    @abstractmethod
    def apply_to(self, model: nn.Module) -> nn.Module:
        """Change ``model`` in place and return the model to use from now on.

        Call :func:`apply` instead: it also records the plan on the model.

        Raises:
            PlanError: the plan was made for another model; says where they differ.
        """

    def follow(
        self, model: nn.Module, companion: Any, *, where: str = "companions"
    ) -> Callable[[nn.Module], None]:
        """Check that ``companion`` can go on after this plan; return what makes it so.

        For companions that do not know it themselves, as a :class:`Companion` does.

        Args:
            model: not changed yet.
            companion: an optimizer that trains it, tensors by name, a second network.
            where: what an error names.

        Returns:
            To be called with the changed model.

        Raises:
            PlanError: plans of this kind do not know how, or it does not fit.
        """
        raise PlanError(
            f"{type(companion).__name__} cannot follow a {self.kind} plan",
            where=where,
            hint="apply the plan without it, and make a new one",
        )

    @property
    def sliced(self) -> Mapping[str, tuple[int, ...]]:
        """Parameters and buffers that the plan makes smaller → their shapes before."""
        return {}

    def slice_state(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor that is as large as the parameter or buffer ``name``.

        For companions that hold such tensors: a momentum, an average, a mask.

        Raises:
            PlanError: it is not as large, or plans of this kind slice nothing.
        """
        raise PlanError(f"a {self.kind} plan slices no tensors", where=name)

    @door
    def save(self, path: PathLike) -> Path:
        """Write ``path`` (JSON) and, if the plan has tensors, ``path`` with ``.safetensors``."""
        target = Path(path)
        tensors = self.tensors()
        if tensors:
            write_tensors(target.with_suffix(".safetensors"), tensors)
        write_json(target, _packed(self))
        return target

    @staticmethod
    @door
    def load(path: PathLike) -> Plan:
        """Read a plan of any kind.

        Raises:
            ArtifactError: the file is missing or damaged.
            PlanError: the kind is unknown or the version is newer than this library.
        """
        source = Path(path)
        data = read_json(source)
        sidecar = source.with_suffix(".safetensors")
        needs = isinstance(data, dict) and data.get("has_tensors")
        return _unpacked(data, read_tensors(sidecar) if needs else {}, where=str(source))


def _packed(plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "kind": plan.kind,
        "version": plan.version,
        "has_tensors": bool(plan.tensors()),
        "sha256": _checksum(plan.to_json()),
        "plan": plan.to_json(),
    }


def _unpacked(data: Any, tensors: Mapping[str, Tensor], *, where: str) -> Plan:
    if not isinstance(data, dict) or not {"format", "kind", "version", "plan"} <= data.keys():
        raise ArtifactError("this is not a plan: kind, version and plan are missing", where=where)
    kind = data["kind"]
    if not isinstance(kind, str) or not (_counts(data["format"]) and _counts(data["version"])):
        raise ArtifactError(
            "this is not a plan: kind is no text, or format and version are no numbers",
            where=where,
        )
    if kind not in PLAN_KINDS:
        raise PlanError(
            f"unknown kind of plan {kind!r}", where=where, hint=nearest(kind, PLAN_KINDS)
        )
    plan_type = PLAN_KINDS.get(kind)
    if data["format"] > FORMAT_VERSION or data["version"] > plan_type.version:
        raise PlanError(
            f"the {kind} plan has version {data['version']} (format {data['format']}), this "
            f"library reads up to {plan_type.version} (format {FORMAT_VERSION})",
            where=where,
            hint="update slimkit",
        )
    _check_intact(data["plan"], data.get("sha256"), f"the {kind} plan", where)
    try:
        return plan_type.from_json(data["plan"], tensors)
    except PlanError as error:
        raise PlanError(error.message, where=error.where or where, hint=error.hint) from error
    except _WRONG_SHAPE as error:
        raise ArtifactError(f"the {kind} plan is damaged: {error!r}", where=where) from error


_WRONG_SHAPE = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError),
    RecursionError,
)
"""What reading raises of JSON that has another shape than what was written."""


def _checksum(value: object) -> str | None:
    """SHA-256 of ``value`` as it comes back from a file: keys are text, tuples are lists."""
    try:
        return content_hash(json.loads(json.dumps(value, allow_nan=False)))
    except (TypeError, ValueError):  # writing it says why
        return None


def _check_intact(content: object, expected: object, what: str, where: str) -> None:
    """Compare with the checksum beside it; files of older versions have none.

    Raises:
        ArtifactError: it is another one.
    """
    try:
        intact = expected is None or content_hash(content) == expected
    except RecursionError as error:
        raise ArtifactError(f"{what} is nested too deeply", where=where) from error
    if not intact:
        raise ArtifactError(
            f"{what} is damaged: it is not what was saved",
            where=where,
            hint="whoever changes it by hand removes its sha256",
        )


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@structure_door
def apply(
    model: nn.Module, plan: Plan, *, optimizer: Any = None, companions: Any = ()
) -> nn.Module:
    """Apply ``plan`` to ``model`` in place and return the model.

    The plan is remembered on the model, so that :func:`save` can write it. A quantization
    plan returns a wrapper around the (changed) model; use what is returned.

    Args:
        model: any module.
        plan: made for such a model.
        optimizer: in the middle of training, the optimizer of ``model``: what it remembers
            of each weight (momentum, second moments) is sliced along with the weight, so
            that training goes on as if the rest had never been there. For pruning plans.
        companions: whatever else was made for this model and has to go on with it, one after
            the other: masks (a dictionary: name of a parameter → tensor of its shape, or of one
            that broadcasts against it; its entries are replaced), weight averages
            (:class:`slimkit.train.WeightAverage`, ``torch.optim.swa_utils.AveragedModel``),
            networks of the same structure such as a teacher that learns too (the plan is applied
            to them), further optimizers, and objects of your own (:class:`Companion`).

    Raises:
        PlanError: the plan does not fit this model, or the optimizer or a companion cannot
            follow it; nothing was changed, neither here nor there.
        InputError: the optimizer is not one of this model, or a companion is nothing that could
            follow.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"expected a slimkit.Plan, got {type(plan).__name__}", where="plan")
    earlier = applied_plans(model)
    followers = [] if optimizer is None else [_follower(plan, model, optimizer, "optimizer")]
    if isinstance(companions, Mapping) or not isinstance(companions, Iterable):
        companions = (companions,)  # one alone
    distinct = {id(each): each for each in companions if each is not optimizer}
    for number, companion in enumerate(distinct.values()):
        followers.append(_follower(plan, model, companion, f"companions.{number}"))
    changed = plan.apply_to(model)
    for follow in followers:
        follow(changed)
    setattr(changed, _ATTRIBUTE, [*earlier, plan])
    return changed


def _follower(
    plan: Plan, model: nn.Module, companion: Any, where: str
) -> Callable[[nn.Module], None]:
    """What makes a companion follow a plan, now that it is certain that it can."""
    own = called(getattr, InputError, where, companion, "follow", None)
    if not callable(own):
        return plan.follow(model, companion, where=where)
    step = called(own, PlanError, where, plan)
    if not callable(step):
        raise InputError(
            f"{type(companion).__name__}.follow(plan) returned {type(step).__name__}",
            where=where,
            hint="it has to return a function that is called with the changed model",
        )
    return cast("Callable[[nn.Module], None]", step)


def applied_plans(model: nn.Module) -> list[Plan]:
    """The plans that were applied to ``model``, oldest first."""
    return list(getattr(model, _ATTRIBUTE, ()))


def load_weights(model: nn.Module, state: Mapping[str, Any], *, where: str | None = None) -> None:
    """Load ``state`` strictly, with an error that says what does not fit.

    Args:
        model: changed in place.
        state: tensors by name, as from ``state_dict()``. Its ``_metadata`` tells modules in which
            version they were saved; without it they are taken to be of today's.
        where: what an error names.

    Raises:
        CheckpointError: missing or unexpected keys, or other shapes, and nothing was loaded; or
            a module refuses what it gets.
    """
    own = called(model.state_dict, ModelError, where or "model")
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and _shape(own[key]) != _shape(state[key])]
    if missing or extra or wrong:
        parts = []
        if missing:
            hint = f" ({nearest(missing[0], extra)})" if extra else ""
            parts.append(f"{len(missing)} missing, first {missing[0]!r}{hint}")
        if extra:
            parts.append(f"{len(extra)} unexpected, first {extra[0]!r}")
        if wrong:
            key = wrong[0]
            parts.append(
                f"{len(wrong)} of another shape, first {key!r}: the model has "
                f"{_shape(own[key])}, the file {_shape(state[key])}"
            )
        raise CheckpointError(
            f"the weights do not fit {type(model).__name__}: " + "; ".join(parts), where=where
        )
    try:
        versions = getattr(state, "_metadata", getattr(own, "_metadata", None))
        model.load_state_dict(_with_metadata(state, versions))
    except Exception as error:  # a user's own _load_from_state_dict may raise anything
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{type(model).__name__} refuses the weights: {reason}", where=where
        ) from error


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a tensor; None of what else a module keeps as its extra state."""
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _with_metadata(
    state: Mapping[str, Any], metadata: Mapping[str, Any] | None
) -> OrderedDict[str, Any]:
    """A state dict as torch makes them: the versions of modules are an attribute of it."""
    found = OrderedDict(state)
    if metadata is not None:
        found._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return found


def _split_state(
    state: Mapping[str, Any], where: PathLike
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, extra states that are no tensors, and the metadata as far as it is JSON.

    Raises:
        ArtifactError: an extra state is neither a tensor nor JSON.
    """
    import torch

    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    extra = {key: value for key, value in state.items() if key not in tensors}
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized:
            raise ArtifactError(
                f"safetensors cannot hold {key!r}, a {value.layout} tensor of {value.dtype}",
                where=str(where),
                hint="make it dense: tensor.to_dense() or tensor.dequantize()",
            )
    for key, value in extra.items():
        if not _is_json(value):
            raise ArtifactError(
                f"the extra state {key!r} is a {type(value).__name__}, neither a tensor nor JSON",
                where=str(where),
                hint="get_extra_state() may return tensors, numbers, text, lists and dictionaries",
            )
    metadata = getattr(state, "_metadata", {})
    return tensors, extra, {key: value for key, value in metadata.items() if _is_json(value)}


def _is_json(value: object) -> bool:
    """Whether ``value`` is the same after it was written as JSON and read."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


@door
def save(model: nn.Module, directory: PathLike) -> Path:
    """Write weights and plans of ``model`` into ``directory`` (replaced as a whole).

    Args:
        model: any module; the plans applied to it by :func:`apply` are written too.
        directory: gets ``weights.safetensors`` and ``plans.json`` (and sidecars).

    Raises:
        ArtifactError: not writable, or a module's extra state is neither a tensor nor JSON; what
            was there before stays.
    """
    tensors, extra, metadata = _split_state(
        called(model.state_dict, ModelError, "model"), directory
    )
    with atomic_directory(directory) as folder:
        write_tensors(folder / _WEIGHTS, tensors)
        names = []
        for number, plan in enumerate(applied_plans(model)):
            names.append(f"plan{number}_{plan.kind}.json")
            plan.save(folder / names[-1])
        index = {
            "format": FORMAT_VERSION,
            "model": type(model).__name__,
            "plans": names,
            "metadata": metadata,
            "extra_state": extra,
            "files": {each.name: file_hash(each) for each in sorted(folder.iterdir())},
        }
        write_json(folder / _INDEX, {**index, "sha256": _checksum(index)})
    return Path(directory)


@door
def load(directory: PathLike, model: nn.Module) -> nn.Module:
    """Replay the plans in ``directory`` on a fresh ``model`` and load the weights.

    Args:
        directory: what :func:`save` wrote.
        model: a new, uncompressed instance of the same network; changed in place.

    Returns:
        The compressed model (a wrapper around ``model`` if it is quantized).

    Raises:
        ArtifactError: files are missing or damaged.
        PlanError, CheckpointError: the files belong to another network.
    """
    plans, state = read_directory(directory, _read)
    for plan in plans:
        model = apply(model, plan)
    load_weights(model, state, where=str(Path(directory) / _WEIGHTS))
    return model


def _read(folder: Path) -> tuple[list[Plan], OrderedDict[str, Any]]:
    """All plans and the state dict in a folder that :func:`save` wrote.

    Raises:
        ArtifactError, PlanError: one of the files is missing or damaged.
    """
    index = _read_index(folder / _INDEX)
    for name, expected in index.get("files", {}).items():
        if file_hash(folder / name) != expected:
            raise ArtifactError(
                "it is not what was saved: damaged, or changed since",
                where=str(folder / name),
                hint="save the model again",
            )
    plans = [Plan.load(folder / name) for name in index["plans"]]
    weights = read_tensors(folder / _WEIGHTS)
    extra, metadata = index.get("extra_state", {}), index.get("metadata")
    return plans, _with_metadata({**weights, **extra}, metadata)


def _read_index(path: Path) -> dict[str, Any]:
    """``plans.json``, checked: names that stay inside its folder, and mappings where they belong.

    Raises:
        ArtifactError: it is damaged, or of a newer version.
    """
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("plans"), list):
        raise ArtifactError("this is no index of plans: its list is missing", where=str(path))
    if not _counts(index.get("format", 1)) or index.get("format", 1) > FORMAT_VERSION:
        raise ArtifactError(
            f"it has format {index['format']!r}, this library reads up to {FORMAT_VERSION}",
            where=str(path),
            hint="update slimkit",
        )
    content = {key: value for key, value in index.items() if key != "sha256"}
    _check_intact(content, index.get("sha256"), "the index of plans", str(path))
    parts = {key: index.get(key, {}) for key in ("files", "extra_state", "metadata")}
    for key, part in parts.items():
        held = part.values() if isinstance(part, dict) and key == "metadata" else ()
        if not isinstance(part, dict) or not all(isinstance(each, dict) for each in held):
            raise ArtifactError(f"its {key} is no mapping", where=str(path))
    for name in (*index["plans"], *parts["files"]):
        if not isinstance(name, str) or not _stays_inside(name):
            raise ArtifactError(
                f"{name!r} is not the name of a file in this folder", where=str(path)
            )
    return index


def _stays_inside(name: str) -> bool:
    return name not in {"", ".", ".."} and not set(name) & set("/\\:\0")


PLAN_KINDS.register_lazy("prune", "slimkit.prune.edits:PrunePlan")
PLAN_KINDS.register_lazy("quantize", "slimkit.quantize.scheme:QuantPlan")
PLAN_KINDS.register_lazy("fuse", "slimkit.graph.folding:FusePlan")
PLAN_KINDS.register_lazy("mask", "slimkit.sparsify.masks:MaskPlan")
