"""Methods that win back what rounding costs, without training: an interface and a registry.

A method is a frozen dataclass, its fields are its settings, and :func:`slimkit.quantize.ptq`
runs those that ``methods=`` lists, in that order, on the copy that it made. Before the ranges
of activations are taken a method may change weights (their product stays the same function);
after that it may choose scales and roundings. Register one by name::

    @METHODS.register("halve")
    @dataclass(frozen=True)
    class Halve:
        when: ClassVar[Literal["before", "after"]] = "before"
        factor: float = 0.5

        def run(self, work):
            with torch.no_grad():
                work.quantized.model.head.weight.mul_(self.factor)

``methods: [halve]`` and ``methods: [{type: halve, factor: 0.25}]`` then work in every recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import nn

from slimkit.errors import InputError
from slimkit.inputs import Inputs
from slimkit.modules import copy_module
from slimkit.progress import LONG, ProgressDisplay
from slimkit.quantize.batches import Batches
from slimkit.registry import Registry

if TYPE_CHECKING:
    from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["METHODS", "Method", "Work", "resolve_methods", "run_methods"]

METHODS: Registry[type[Method]] = Registry("quantization method")
"""Name → class of a method that needs no argument."""


class Method(Protocol):
    """One step beside calibration.

    Attributes:
        when: ``"before"`` the ranges of activations are taken, or ``"after"``.
    """

    @property
    def when(self) -> Literal["before", "after"]:
        """See the class."""

    def run(self, work: Work) -> None:
        """Change ``work.quantized`` in place."""


@dataclass
class Work:
    """What a method works on.

    Attributes:
        quantized: the network with batch norms folded (``quantized.model``) and its quantizers, in
            evaluation mode. Its plan may be replaced (:meth:`QuantizedModel.replace_plan`).
        example: one call.
        batches: calibration data, to be read as often as needed.
        recalibrate: takes the ranges of activations again, as the user asked for them; for a
            method that runs after calibration and changes what flows through the network.
        progress: whether to show on standard error how far it is, where that takes long.
    """

    quantized: QuantizedModel
    example: Inputs
    batches: Batches
    recalibrate: Callable[[], None]
    progress: bool = False

    @cached_property
    def reference(self) -> nn.Module:
        """A frozen copy of the folded float network, as it was when first asked for."""
        return copy_module(self.quantized.model).eval().requires_grad_(False)

    def display(self, total: int, label: str) -> ProgressDisplay:
        """Shows progress on standard error once the steps are likely to take over ten seconds.

        Args:
            total: number of steps.
            label: what goes on.
        """
        return ProgressDisplay(total, 0, label=label, enabled=self.progress, patience=LONG)

    def inputs(self, examples: int | None = None) -> Iterator[Inputs]:
        """The calibration batches on the device of the network.

        Args:
            examples: whole batches until there are so many; all by default.
        """
        parameter = next(self.quantized.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        count = 0
        for batch in self.batches:
            yield batch.to(device)
            count += batch.examples or 1
            if examples is not None and count >= examples:
                return


def resolve_methods(methods: Iterable[str | Method]) -> list[Method]:
    """Instances of all of them, in order.

    Raises:
        UnknownNameError: no method of that name, with the nearest.
        InputError: something that is neither a name nor a method.
    """
    if isinstance(methods, str):
        methods = [methods]
    found: list[Method] = []
    for index, entry in enumerate(methods):
        where = f"methods.{index}"
        method = METHODS.get(entry, where=where)() if isinstance(entry, str) else entry
        if getattr(method, "when", None) not in ("before", "after") or not hasattr(method, "run"):
            raise InputError(f"{entry!r} is not a quantization method", where=where)
        found.append(method)
    return found


def run_methods(methods: Sequence[Method], when: Literal["before", "after"], work: Work) -> None:
    """Run those of ``methods`` that belong there."""
    for method in methods:
        if method.when == when:
            method.run(work)


METHODS.register_lazy("equalize", "slimkit.quantize.methods.equalization:Equalize")
METHODS.register_lazy("smoothquant", "slimkit.quantize.methods.smoothing:SmoothQuant")
METHODS.register_lazy("bias_correction", "slimkit.quantize.methods.bias_correction:BiasCorrection")
METHODS.register_lazy("adaround", "slimkit.quantize.methods.adaround:AdaRound")
METHODS.register_lazy("reconstruct", "slimkit.quantize.methods.reconstruction:Reconstruct")
METHODS.register_lazy("gptq", "slimkit.quantize.methods.gptq:GPTQ")
METHODS.register_lazy("bias_tuning", "slimkit.quantize.methods.bias_tuning:BiasTuning")
