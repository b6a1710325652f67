"""A quantizer whose scale comes from the tensor at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkit.quantize.scales import affine_parameters
from slimkit.quantize.targets import NumberFormat
from slimkit.runtime.export_state import is_exporting
from slimkit.runtime.fake_quantize import dynamic_fake_quantize, fake_quantize

__all__ = ["DynamicQuantizer"]


class DynamicQuantizer(nn.Module):
    """Rounds one activation on the grid of its own smallest and largest value.

    It computes what the ONNX operator DynamicQuantizeLinear does: one scale for the whole tensor,
    batch included, so that a sample's result depends a little on what else is in its batch.

    Args:
        form: number format, asymmetric.

    Attributes:
        scale: of the last tensor.
        zero_point: of the last tensor.
        rounding: round the values that pass.
        ready: always.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, form: NumberFormat) -> None:
        super().__init__()
        self.form = form
        self.rounding = True
        self.ready = True
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)
        zero = torch.tensor(0, dtype=torch.int32)
        self.register_buffer("zero_point", zero, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, any shape."""
        if is_exporting():
            return dynamic_fake_quantize(x, qmin=self.form.qmin, qmax=self.form.qmax)
        if not self.rounding or not x.numel():
            return x
        low, high = torch.aminmax(x.detach())
        self.scale, self.zero_point = affine_parameters(low, high, self.form)
        return fake_quantize(
            x, self.scale, self.zero_point, qmin=self.form.qmin, qmax=self.form.qmax
        )

    def extra_repr(self) -> str:
        """Format."""
        return f"{self.form.qmin}…{self.form.qmax}, range of each tensor"
