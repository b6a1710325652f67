"""The quantized model: a network, its quantizers, and a forward that joins them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.graph.addressing import AddressMode
from slimkit.plan import applied_plans
from slimkit.quantize.attachment import Attachment, Recomputation, Rounding
from slimkit.quantize.integer.calls import IntegerCall, integer_call
from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.quantizers.fixed import ActivationQuantizer, WeightQuantizer
from slimkit.quantize.quantizers.host_values import HostValue
from slimkit.quantize.quantizers.learned import build_quantizer
from slimkit.quantize.specs import named_weights
from slimkit.runtime.export_hooks import BIASES_HINT, OPSET_HINT, SCALES_HINT
from slimkit.runtime.export_state import is_exporting

if TYPE_CHECKING:
    from slimkit.quantize.scheme import QuantPlan

__all__ = ["QuantizedModel", "Rounding"]


class QuantizedModel(nn.Module):
    """``model`` with tensors rounded as ``plan`` says; call it as you call ``model``.

    It trains in any loop: parameters are those of the network, gradients pass the rounding
    straight through. ``state_dict`` holds weights and scales. A network that changes a tensor in
    place must go on with what the function returned (``x = relu_(x)``): that is what is rounded.

    Args:
        model: the network with batch norms folded; not copied.
        plan: made for it.

    Attributes:
        model: the network.
        quantizers: name → quantizer.
        plan: the plan.
    """

    observer_steps_left: Tensor

    def __init__(self, model: nn.Module, plan: QuantPlan) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.quantizers = nn.ModuleDict()
        for spec in plan.quantizers:
            self.quantizers[spec.name] = build_quantizer(spec)
        self.register_buffer("observer_steps_left", torch.tensor(0, dtype=torch.int64))
        self._steps_left = HostValue(_whole, value=0)
        self._called: set[str] | None = None
        parameter = next(model.parameters(), None)
        if parameter is not None:
            self.quantizers.to(parameter.device)
            self.observer_steps_left = self.observer_steps_left.to(parameter.device)
        self.train(model.training)

    partial = False
    """Whether a part of the network is exported (:class:`slimkit.tasks.deployment.Part`), in which
    what is planned need not all run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's result on rounded weights and activations.

        In evaluation mode and without gradients it is computed with the arithmetic of integer
        kernels (:mod:`slimkit.quantize.integer.arithmetic`). Several threads may call it at once.

        Raises:
            AddressError: it makes other calls than at capture, and a planned one cannot be told;
                or, while it is exported, a planned one does not run.
        """
        if self.training and not is_exporting():
            self._count_step()
        exact = not (self.training or torch.is_grad_enabled() or is_exporting())
        if exact:  # a kernel needs the scale of its output before that is rounded
            for quantizer in self.activation_quantizers().values():
                quantizer.refresh()
        mode = self._attached(exact=exact)
        with mode:
            result = self.model(*args, **kwargs)
        if is_exporting() and not self.partial:  # a file needs all of them
            mode.check_complete()
        return result

    def attachment(self, replaced: Mapping[str, Rounding] | None = None) -> AddressMode:
        """A mode in which :attr:`model`, or one module of it alone, computes as in :meth:`forward`.

        Args:
            replaced: name of a quantizer → what to use in its place.
        """
        exact = not (replaced or self.training or torch.is_grad_enabled())
        return self._attached(exact=exact, replaced=replaced)

    def recomputation(self) -> AddressMode:
        """The mode for what backward computes again, because its activations were not kept."""
        return Recomputation(self.model, self.plan, dict(self.quantizers.items()))

    def _attached(
        self, *, exact: bool, replaced: Mapping[str, Rounding] | None = None
    ) -> Attachment:
        noting = self.training and torch.is_grad_enabled() and not is_exporting()
        return Attachment(
            self.model,
            self.plan,
            {**self.quantizers, **(replaced or {})},
            integer=self.integer_calls() if exact else {},
            called=self._called,
            owner=self if noting else None,
        )

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """Name → quantizer of an activation whose scale is stored."""
        quantizers = self.quantizers.items()
        return {name: q for name, q in quantizers if isinstance(q, ActivationQuantizer)}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: LSQ's step sizes and offsets."""
        names = (name for name, _ in self.quantizers.named_parameters())
        return {f"quantizers.{n}" for n in names if n.endswith((".step_size", ".offset"))}

    def bit_widths(self) -> Mapping[str, tuple[int, int]]:
        """Module path in this wrapper → (weight bits, activation bits) of integer layers."""
        return {f"model.{path}": bits for path, bits in self.plan.bit_widths().items()}

    def export_hints(self) -> dict[str, str]:
        """What the export has to know of the target (:mod:`slimkit.runtime.qdq`)."""
        compact = any(spec.compact for spec in self.plan.quantizers)
        scales = {SCALES_HINT: "bytes"} if compact else {}
        return {BIASES_HINT: self.plan.biases, OPSET_HINT: str(self.plan.opset), **scales}

    def observe_for(self, steps: int) -> None:
        """Let activation ranges follow the next ``steps`` training forwards, then freeze."""
        self.observer_steps_left.fill_(steps)

    def freeze_observers(self) -> None:
        """Keep the activation ranges as they are from now on."""
        self.observe_for(0)

    def set_rounding(self, enabled: bool) -> None:
        """Turn all rounding on, or off for the plain float network."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer, ActivationQuantizer | DynamicQuantizer | WeightQuantizer):
                quantizer.rounding = enabled

    def refresh_weights(self) -> None:
        """Bring the scales of all weights up to date, as a forward does."""
        weights = named_weights(self.model)
        for spec in self.plan.quantizers:
            quantizer = self.quantizers[spec.name]
            if spec.parameter is not None and isinstance(quantizer, WeightQuantizer):
                quantizer.refresh(weights[spec.parameter])

    @contextmanager
    def recording_calls(self, called: set[str]) -> Iterator[None]:
        """Inside, the addresses of the calls that run are added to ``called``."""
        self._called = called
        try:
            yield
        finally:
            self._called = None

    @contextmanager
    def using(self, plan: QuantPlan) -> Iterator[None]:
        """Inside, it computes as ``plan`` says, which uses a part of the quantizers."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def replace_plan(self, plan: QuantPlan) -> None:
        """Go on with ``plan``, which uses a part of the quantizers; the others are removed."""
        self.slimkit_plans = [plan if p is self.plan else p for p in applied_plans(self)]
        self.plan = plan
        for name in set(self.quantizers) - {spec.name for spec in plan.quantizers}:
            del self.quantizers[name]

    def integer_calls(self) -> dict[str, IntegerCall]:
        """Call address → the integer kernel's arithmetic, for the calls that have one."""
        found: dict[str, IntegerCall] = {}
        for decision in self.plan.decisions:
            if not decision.integer:
                continue
            rule = self.plan.calls.get(decision.address)
            kernel = integer_call(decision, self.quantizers, None if rule is None else rule.gate)
            if kernel is not None:
                found[decision.address] = kernel
        return found

    def _count_step(self) -> None:
        left = self._steps_left.of(self.observer_steps_left)
        observing = left > 0
        for quantizer in self.activation_quantizers().values():
            quantizer.observing = observing
        if observing:
            self.observer_steps_left.sub_(1)
            self._steps_left.know(self.observer_steps_left, left - 1)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Training mode; ranges are not observed in evaluation mode."""
        super().train(mode)
        if not mode:
            for quantizer in self.activation_quantizers().values():
                quantizer.observing = False
        return self


def _whole(number: Tensor) -> int:
    return int(number.item())
