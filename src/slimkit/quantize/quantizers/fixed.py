"""Quantizers: the modules that hold scales and round one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimkit.quantize.observers.ranges import MOMENTUM, Observer, new_observer, towards
from slimkit.quantize.quantizers.host_values import HostValue
from slimkit.quantize.scales import affine_parameters, weight_grid
from slimkit.quantize.specs import QuantizerSpec
from slimkit.quantize.targets import NumberFormat
from slimkit.runtime.export_state import is_exporting
from slimkit.runtime.fake_quantize import fake_quantize

__all__ = ["ActivationQuantizer", "WeightQuantizer"]


class ActivationQuantizer(nn.Module):
    """Rounds one activation, with one scale for the whole tensor.

    All its state is in buffers: ``scale`` and ``zero_point``; the range ``low`` … ``high`` they
    were made from, which is the moving average itself while training observes; ``observed``, the
    number of batches seen. Until one was seen, values pass unchanged. ``observing`` and
    ``rounding`` are modes, like ``training``.

    Args:
        form: number format.
        bounds: the range when it is known: then nothing is observed.

    Attributes:
        observing: update the range from the values that pass.
        rounding: round the values that pass; off while ranges are collected after training.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor
    observed: Tensor

    def __init__(self, form: NumberFormat, bounds: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.form = form
        self.bounds = bounds
        self.observing = False
        self.rounding = True
        self._observer: Observer | None = None
        self._ready = HostValue(_positive, value=False)
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self.register_buffer("observed", torch.tensor(0, dtype=torch.int64))
        if bounds is not None:
            self._set_range(*(torch.tensor(bound) for bound in bounds))
            self.observed.fill_(1)

    @property
    def ready(self) -> bool:
        """Whether there is a scale to round with."""
        return self._ready.of(self.observed)

    def observe_with(self, observer: str | Observer | None) -> None:
        """Start observing with a new observer like that one, or stop with ``None``."""
        self._observer = None if observer is None else new_observer(observer)
        self.observing = observer is not None

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, any shape."""
        if is_exporting():
            return self._rounded(x) if self.ready else x
        if self.observing and self.bounds is None and x.numel():
            self._observe(x.detach())
        return self._rounded(x) if self.rounding and self.ready else x

    def refresh(self) -> None:
        """Bring scale and zero point up to date with trained parameters, where there are any."""

    def adopt_range(self) -> None:
        """Take scale and zero point from what the observer has seen so far."""
        if self._observer is not None and self.bounds is None and self.ready:
            self._set_range(*self._observer.range(self.form))

    def _rounded(self, x: Tensor) -> Tensor:
        return fake_quantize(
            x, self.scale, self.zero_point, qmin=self.form.qmin, qmax=self.form.qmax
        )

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        x = x if x.dtype == torch.float32 else x.float()
        if self._observer is not None:
            self._observer.update(x)
            found = self._observer.range(self.form) if self.rounding else None
        else:  # in training: a moving average (Jacob et al., 2018, section 3.1)
            found = torch.aminmax(x)
            if self.ready:
                found = towards((self.low, self.high), found, MOMENTUM)
        self.observed.add_(1)
        self._ready.know(self.observed, value=True)
        if found is not None:
            self._set_range(*found)

    @torch.no_grad()
    def _set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = affine_parameters(low, high, self.form)
        self.low.copy_(low)
        self.high.copy_(high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._observer = None
        _ = self.ready  # an export may follow at once, and cannot read it

    def extra_repr(self) -> str:
        """Format and range."""
        return f"{self.form.qmin}…{self.form.qmax}, {self.low.item():.4g}…{self.high.item():.4g}"


class WeightQuantizer(nn.Module):
    """Rounds one weight; zeros stay exactly zero.

    By default the scale follows the weight at every call: there is no state that could lag
    behind an optimizer step, a pruning step or an averaged copy. The buffers ``scale`` and
    ``zero_point`` are those of the last call, for the export. A method that chooses scale and
    rounding together fixes them, and leaves a weight whose nearest levels are the chosen ones.

    Args:
        spec: of a weight.

    Attributes:
        form: number format; symmetric ones have no zero point other than 0.
        axis: dimension of the weight that holds output channels; ``None`` for one scale in all.
        blocks: number of scales per output channel, ``None`` for one.
        compact: scales are powers of 2^(1/16).
        fixed: whether ``scale`` stays as it is.
        may_clip: whether weights can lie outside of what ``scale`` covers.
        rounding: round; else the weight passes unchanged.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__()
        self.form: NumberFormat = spec.form
        self.axis = None if spec.channels is None else spec.axis
        self.fixed = spec.scale == "fixed"
        self.may_clip = spec.scale != "follows"
        self.blocks = spec.blocks
        shape: tuple[int, ...] = () if spec.channels is None else (spec.channels,)
        if spec.blocks is not None:
            shape = (*shape, spec.blocks)
        self.rounding = True
        self.compact = spec.compact
        self._pairs = spec.pairs
        self.register_buffer("scale", torch.ones(shape))
        zeros = torch.zeros(shape, dtype=torch.int32)
        self.register_buffer("zero_point", zeros, persistent=not self.form.symmetric)

    def forward(self, weight: Tensor) -> Tensor:
        """Round ``weight``."""
        if is_exporting():
            return self._rounded(weight, self.scale)
        return self._rounded(weight, self.refresh(weight)) if self.rounding else weight

    def _rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(
            weight,
            scale,
            self.zero_point,
            qmin=self.form.qmin,
            qmax=self.form.qmax,
            axis=self.axis,
            clips=self.may_clip,
        )

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> Tensor:
        """Bring scale and zero point up to date, unless they are fixed; returns the scale."""
        if self.fixed:
            return self.scale
        scale, zero_point = weight_grid(
            weight,
            self.form,
            self.axis,
            pairs=self._pairs,
            blocks=self.blocks,
            compact=self.compact,
        )
        self.scale.copy_(scale)
        if not self.form.symmetric:
            self.zero_point.copy_(zero_point)
        return scale

    def extra_repr(self) -> str:
        """Format and granularity."""
        per = "tensor" if self.axis is None else f"{self.scale.numel()} channels"
        return f"{self.form.qmin}…{self.form.qmax} per {per}"


def _positive(number: Tensor) -> bool:
    return number.item() > 0
