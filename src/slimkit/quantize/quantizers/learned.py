"""Quantizers whose scale is trained with the weights, and the choice between them.

Their parameters are what an optimizer moves: ``step_size`` and ``offset`` (LSQ, LSQ+) or ``clip``
(PACT). The buffers ``scale`` and ``zero_point`` are what follows from these at every call, a
positive scale and a whole number; the integer evaluation and the export read only them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.errors import UnknownNameError, nearest
from slimkit.graph.functions import function_of
from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.quantizers.fixed import ActivationQuantizer, WeightQuantizer
from slimkit.quantize.quantizers.host_values import HostValue
from slimkit.quantize.quantizers.learned_scales import (
    gradient_scale,
    round_channels,
    round_clipped,
    round_tensor,
)
from slimkit.quantize.scales import TINY, mse_weight_grid, pair_scale, pairs_can_overflow
from slimkit.quantize.specs import QuantizerSpec
from slimkit.quantize.targets import NumberFormat
from slimkit.runtime.export_state import is_exporting

if TYPE_CHECKING:
    from slimkit.quantize.scheme import QuantPlan

__all__ = [
    "SCALES",
    "LsqActivation",
    "LsqWeight",
    "PactActivation",
    "build_quantizer",
    "with_scales",
]

SCALES = ("observed", "lsq", "pact")
"""What ``scales=`` accepts; see :func:`slimkit.quantize.qat`."""

_RELUS = ("relu", "relu6", "hardtanh")  # nn.ReLU6 is a hardtanh from 0 to 6
_SHRINK = 1024.0
"""Factor by which a step size may shrink from its start: a bad update cannot make it zero or
negative, from where no gradient leads back."""


def with_scales(plan: QuantPlan, scales: str) -> QuantPlan:
    """``plan`` with quantizers that train their scales.

    Args:
        plan: of observed activations and weights whose scales follow them.
        scales: ``"observed"`` leaves it as it is; ``"lsq"`` is for all quantizers, ``"pact"`` for
            the activations behind a ReLU or ReLU6. Scales of groups, of known ranges and of each
            batch are never trained.

    Raises:
        UnknownNameError: with the nearest name.
    """
    if scales not in SCALES:
        raise UnknownNameError(
            f"unknown way to find scales {scales!r}",
            where="scales",
            hint=nearest(str(scales), SCALES),
        )
    if scales == "observed":
        return plan
    behind_relu = {
        name
        for address, rule in plan.calls.items()
        for name in rule.outputs.values()
        if function_of(address) in _RELUS
    }

    def chosen(spec: QuantizerSpec) -> QuantizerSpec:
        if spec.blocks is not None or not (spec.parameter or spec.calibrated):
            return spec  # groups follow their weights; known ranges and those of a batch stay
        if scales == "lsq":
            return replace(spec, scale="learned")
        return replace(spec, scale="clip") if spec.name in behind_relu else spec

    return replace(plan, quantizers=tuple(chosen(spec) for spec in plan.quantizers))


def build_quantizer(
    spec: QuantizerSpec,
) -> ActivationQuantizer | DynamicQuantizer | WeightQuantizer:
    """The quantizer that a plan describes."""
    if spec.parameter is not None:
        return LsqWeight(spec) if spec.scale == "learned" else WeightQuantizer(spec)
    if spec.dynamic:
        return DynamicQuantizer(spec.form)
    if spec.scale == "learned":
        return LsqActivation(spec.form)
    if spec.scale == "clip":
        return PactActivation(spec.form)
    return ActivationQuantizer(spec.form, spec.bounds)


class LsqActivation(ActivationQuantizer):
    """Rounds one activation with a trained step size and, where it is needed, offset.

    LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153) and LSQ+ (Bhalgat et al., 2020,
    https://arxiv.org/abs/2004.09576). Both start from the observed range. The offset is trained
    when negative values were observed; else the zero point stays 0.

    Attributes:
        step_size: parameter; ``scale`` is this, kept positive.
        offset: parameter β of an asymmetric format; the zero point is ``round(−β / scale)``.
    """

    offset: nn.Parameter | None

    def __init__(self, form: NumberFormat) -> None:
        super().__init__(form)
        self.step_size = nn.Parameter(torch.tensor(1.0))
        offset = None if form.symmetric else nn.Parameter(torch.tensor(0.0))
        self.register_parameter("offset", offset)
        self._signed = HostValue(_negative, value=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """See the base class."""
        if self.observing or not self.ready:
            return
        least = (self.high - self.low) / ((self.form.qmax - self.form.qmin) * _SHRINK)
        scale = torch.maximum(self.step_size, least.clamp_(min=TINY))
        self.scale.copy_(scale)
        if self.training:
            self.step_size.copy_(scale)
        if self.offset is not None:
            point = (-self.offset / scale).round_().clamp_(self.form.qmin, self.form.qmax)
            self.zero_point.copy_(point)

    def _rounded(self, x: Tensor) -> Tensor:
        if is_exporting() or self.observing:
            return super()._rounded(x)
        self.refresh()
        if not torch.is_grad_enabled():
            return super()._rounded(x)
        features = x.numel() // max(1, x.shape[0]) if x.dim() else 1
        return round_tensor(
            x,
            self.step_size,
            self.offset if self._learns_offset() else None,
            scale=self.scale,
            zero_point=self.zero_point,
            qmin=self.form.qmin,
            qmax=self.form.qmax,
            factor=gradient_scale(features, self.form.qmax),
        )

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        super()._set_range(low, high)
        self.step_size.copy_(self.scale)
        if self.offset is not None:
            self.offset.copy_(-self.zero_point * self.scale)
            self.offset.requires_grad_(self._signed.of(self.low))

    def _learns_offset(self) -> bool:
        """Where negative values were observed, unless the user holds it fixed."""
        if self.offset is None or not self._signed.of(self.low):
            return False
        return self.offset.requires_grad

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.offset is not None and self.ready:
            self.offset.requires_grad_(self._signed.of(self.low))


class PactActivation(ActivationQuantizer):
    """Rounds one activation behind a ReLU, up to a trained clip.

    PACT (Choi et al., 2018, https://arxiv.org/abs/1805.06085). The clip starts at the largest
    observed value; weight decay pulls it down, the loss up. Where negative values were observed
    it is not trained.

    Attributes:
        clip: parameter α; ``scale`` is α / qmax.
    """

    def __init__(self, form: NumberFormat) -> None:
        super().__init__(form)
        self.clip = nn.Parameter(torch.tensor(1.0))
        self._signed = HostValue(_negative, value=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """See the base class."""
        if self.observing or not self.ready or self._signed.of(self.low):
            return
        clip = torch.maximum(self.clip, (self.high / _SHRINK).clamp_(min=TINY * self.form.qmax))
        self.scale.copy_(clip / self.form.qmax)
        if self.training:
            self.clip.copy_(clip)

    def _rounded(self, x: Tensor) -> Tensor:
        if is_exporting() or self.observing or self._signed.of(self.low):
            return super()._rounded(x)
        self.refresh()
        if not torch.is_grad_enabled():
            return super()._rounded(x)
        return round_clipped(x, self.clip, scale=self.scale, qmax=self.form.qmax)

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        super()._set_range(low, high)
        self.clip.copy_(self.scale * self.form.qmax)
        self.clip.requires_grad_(not self._signed.of(self.low))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.ready:
            self.clip.requires_grad_(not self._signed.of(self.low))


class LsqWeight(WeightQuantizer):
    """Rounds one weight with trained step sizes: zeros stay exactly zero.

    LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153). At the first call the step sizes
    are those of the least squared error, which also suits 8 bits, unlike the paper's
    ``2 · mean|w| / sqrt(Qp)``. Zero points stay what they were then.

    Attributes:
        step_size: parameter; ``scale`` is this where it is large enough: positive, no channel's
            more than 2^20 times below the largest (the bias must fit into 32 bits), and for
            processors without VNNI such that no pair of products exceeds 16 bits
            (:func:`~slimkit.quantize.scales.pair_scale`).
        start: buffer, the step sizes at the first call; 0 before.
    """

    start: Tensor

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.step_size = nn.Parameter(torch.ones_like(self.scale))
        self.register_buffer("start", torch.zeros_like(self.scale))
        self._started = HostValue(_any, value=False)
        self._pairs = self._pairs and pairs_can_overflow(self.form)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> Tensor:
        """Bring the scale up to date with the step sizes; returns it."""
        if not self._started.of(self.start):
            first, zero_point = mse_weight_grid(weight, self.form, self.axis, pairs=self._pairs)
            self.zero_point.copy_(zero_point)
            self.start.copy_(first)
            self.step_size.copy_(first)
            self._started.know(self.start, value=True)
        scale = torch.maximum(self.step_size, self.start / _SHRINK)
        if self._pairs:
            scale = torch.maximum(scale, pair_scale(weight, self.axis))
        scale = torch.maximum(scale, (scale.amax() * 2.0**-20).clamp_(min=TINY))
        self.scale.copy_(scale)
        if self.training:
            self.step_size.copy_(scale)
        return scale

    def _rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        if is_exporting() or not torch.is_grad_enabled():
            return super()._rounded(weight, scale)
        qmin, qmax = self.form.qmin, self.form.qmax
        factor = gradient_scale(weight.numel() // self.step_size.numel(), qmax)
        if self.axis is not None:
            zero = 0 if self.form.symmetric else self.zero_point
            return round_channels(
                weight,
                self.step_size,
                scale=scale,
                axis=self.axis,
                low=qmin - zero,
                high=qmax - zero,
                factor=factor,
            )
        return round_tensor(
            weight,
            self.step_size,
            None,
            scale=scale,
            zero_point=self.zero_point,
            qmin=qmin,
            qmax=qmax,
            factor=factor,
        )


def _negative(number: Tensor) -> bool:
    return number.item() < 0


def _any(numbers: Tensor) -> bool:
    return bool(numbers.any().item())
