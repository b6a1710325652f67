"""Which weights of a network may become zero, and why the others may not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slimkit.errors import InputError, PlanError
from slimkit.graph.patterns import Pattern, match_modules

__all__ = ["CONV1X1", "Eligible", "Skip", "eligible_weights"]

CONV1X1 = "conv1x1"
"""In place of patterns: convolutions whose kernel has one element, which sparse runtimes favour."""

Skip = Pattern | Callable[[str, nn.Module, Tensor], bool]
"""What keeps its weights: a pattern of modules, or ``f(name, module, weight) -> bool``."""

_NORMS = (
    nn.modules.batchnorm._NormBase,
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
)


@dataclass(frozen=True)
class Eligible:
    """The weights that may become zero.

    Attributes:
        weights: name of the parameter → parameter, in the order of the network.
        skipped: name of each other parameter of two or more dimensions → why it stays dense.
    """

    weights: dict[str, nn.Parameter]
    skipped: dict[str, str]


def eligible_weights(
    model: nn.Module,
    *,
    only: str | Pattern | Iterable[Pattern] | None = None,
    skip: Skip | Iterable[Skip] = (),
) -> Eligible:
    """The weights of ``model`` that may become zero.

    Parameters of one dimension (biases, scales), those of normalisations, embeddings and frozen
    ones are never among them.

    Args:
        model: whose parameters are looked at; a parameter that several modules share counts once.
        only: ``"conv1x1"`` for 1×1 convolutions alone, or patterns of modules whose weights
            alone may become zero; None for all.
        skip: patterns of modules whose weights stay, or functions ``f(name, module, weight)``
            that say of one weight whether it stays.

    Raises:
        PatternError: a pattern matches nothing.
        InputError: a skip rule is neither a pattern nor a function.
        PlanError: no weight is left; or ``torch.nn.utils.prune`` still holds masks of its own.
    """
    _refuse_other_masks(model)
    rules = [skip] if isinstance(skip, str | type) or callable(skip) else list(skip)
    patterns = [rule for rule in rules if isinstance(rule, str | type)]
    functions = [rule for rule in rules if not isinstance(rule, str | type)]
    for rule in functions:
        if not callable(rule):
            raise InputError(
                f"expected a pattern or a function of (name, module, weight), got {rule!r}",
                where="skip",
            )
    skipped_modules = match_modules(model, patterns, where="skip") if patterns else set()
    chosen = None if only is None or only == CONV1X1 else match_modules(model, only, where="only")
    found = Eligible({}, {})
    seen: set[int] = set()
    for path, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if weight.dim() < 2 or id(weight) in seen:
                continue
            seen.add(id(weight))
            reason = _unfit(module, weight)
            if reason is None and only == CONV1X1 and not _is_conv1x1(module, weight):
                reason = "no 1×1 convolution"
            if reason is None and chosen is not None and path not in chosen:
                reason = "not among only"
            if reason is None and path in skipped_modules:
                reason = "skipped by a pattern"
            if reason is None and any(rule(name, module, weight) for rule in functions):
                reason = "skipped by a function"
            if reason is None:
                found.weights[name] = weight
            else:
                found.skipped[name] = reason
    if not found.weights:
        reasons = sorted(set(found.skipped.values())) or ["it has no weights of two dimensions"]
        raise PlanError(
            f"no weight of {type(model).__name__} may become zero: {', '.join(reasons)}",
            where="model",
            hint="look at only and skip",
        )
    return found


def _unfit(module: nn.Module, weight: Tensor) -> str | None:
    if isinstance(module, _NORMS):
        return "of a normalisation"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a table that is looked up, not multiplied"
    if not weight.is_floating_point():
        return f"its type is {str(weight.dtype).removeprefix('torch.')}"
    if parametrize.is_parametrized(module):
        return "computed from other parameters (torch.nn.utils.parametrize)"
    if not weight.requires_grad:
        return "frozen"
    return None


def _is_conv1x1(module: nn.Module, weight: Tensor) -> bool:
    """A convolution over single positions; a depthwise one mixes no channels and is none."""
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and weight.shape[2:].numel() == 1
        and weight.shape[1] > 1
    )


def _refuse_other_masks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        held = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("_mask")]
        for name in held:
            original = f"{name.removesuffix('_mask')}_orig"
            if original in module._parameters:
                raise PlanError(
                    "torch.nn.utils.prune holds a mask of its own here",
                    where=f"{path}.{name}" if path else name,
                    hint=f"torch.nn.utils.prune.remove(module, {name.removesuffix('_mask')!r})",
                )


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight whose magnitudes cannot be compared.

    Raises:
        PlanError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise PlanError("it holds values that are not finite", where=name)
