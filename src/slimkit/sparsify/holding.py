"""Zeros that stay: masks multiplied into the weights after every optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import PlanError
from slimkit.train.callbacks import Callback

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["HoldZeros", "Multiplier"]


class Multiplier:
    """Masks as factors of the weights of a model, all multiplied in one call.

    Args:
        model: whose parameters they are.
        masks: name of a parameter → boolean tensor of its shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._model = model
        self._weights: list[Tensor] = [model.get_parameter(name) for name in masks]
        self._factors: list[Tensor] = []
        self.masks = dict(masks)

    @torch.no_grad()
    def apply(self) -> None:
        """Set to zero what the masks say; follows weights to another device or type.

        Raises:
            PlanError: the model has other parameters than when this was made.
        """
        self._check_same()
        current = len(self._factors) == len(self._weights) and all(
            factor.device == weight.device and factor.dtype == weight.dtype
            for factor, weight in zip(self._factors, self._weights, strict=True)
        )
        if not current:
            self._factors = [
                mask.to(weight.device, weight.dtype, copy=True)
                for mask, weight in zip(self.masks.values(), self._weights, strict=True)
            ]
        torch._foreach_mul_(self._weights, self._factors)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Take other masks of the same names and shapes."""
        self.masks = {name: masks[name] for name in self.masks}
        self._factors = []

    def _check_same(self) -> None:
        """The first and the last parameter are those of the model: it was not rebuilt meanwhile."""
        names = list(self.masks)
        for place in (0, -1):
            try:
                same = self._model.get_parameter(names[place]) is self._weights[place]
            except AttributeError:
                same = False
            if not same:
                raise PlanError(
                    "the model has another parameter here than when its masks were made",
                    where=names[place],
                    hint="make a new GradualPruner or HoldZeros after changing or sharding it",
                )


@door
class HoldZeros(Callback):
    """Keeps the zeros of a sparse network while it is trained on: fine-tuning, QAT, distillation.

    What is exactly zero in a weight of two or more dimensions when this is made stays zero: call
    :meth:`step` after ``optimizer.step()``, or give it to :func:`slimkit.train.fit` as a callback.

    Args:
        model: trained on; also what :func:`slimkit.quantize.qat` returned for a sparse network.

    Raises:
        PlanError: no weight of the model has a zero.
    """

    def __init__(self, model: nn.Module) -> None:
        masks = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or not parameter.requires_grad:
                continue
            mask = parameter.detach() != 0
            if not bool(mask.all()):
                masks[name] = mask
        if not masks:
            raise PlanError(
                f"no weight of {type(model).__name__} is zero",
                where="model",
                hint="apply a mask plan first: sk.sparsify.plan",
            )
        self._multiplier = Multiplier(model, masks)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """True where a weight stays, by the name of the parameter."""
        return dict(self._multiplier.masks)

    def step(self) -> None:
        """Set the weights to zero again; call it after ``optimizer.step()``."""
        self._multiplier.apply()

    def on_update(self, context: StepContext) -> None:
        """See the base class."""
        self.step()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights hold the zeros."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`state_dict`."""
