"""A model with another forward: how a task exports what a file can hold of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["Part"]


class Part(nn.Module):
    """``model`` called through ``function`` in place of its forward; weights are shared.

    Quantizers, masks and whatever else hangs on a call of the model stay in force, because the
    model itself is called: only its forward is another one meanwhile.

    Args:
        model: float or quantized.
        function: ``function(network, *args, **kwargs)`` → outputs, where ``network`` is the
            model without its quantizers, as it was built; for example
            ``lambda net, images: net.head(net.backbone(images))``.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``function`` returns."""
        quantized = self.model if isinstance(self.model, QuantizedModel) else None
        network: Any = self.model if quantized is None else quantized.model
        own = vars(network).get("forward")
        network.forward = functools.partial(self.function, network)
        if quantized is not None:
            quantized.partial = True
        try:
            return self.model(*args, **kwargs)
        finally:
            if quantized is not None:
                quantized.partial = False
            if own is None:
                del network.forward
            else:
                network.forward = own

    def export_hints(self) -> dict[str, str]:
        """Those of the model, for the passes of the exporter."""
        hints = getattr(self.model, "export_hints", None)
        return {} if hints is None else dict(hints())
