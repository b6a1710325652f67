"""Batch-norm folding of whole networks, and how their inputs are guessed where none are given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from slimkit.doors import door
from slimkit.errors import CaptureError, InputError
from slimkit.graph.capturing import Graph, capture
from slimkit.graph.folding import FusePlan, batch_norm_pairs
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.modules import copy_module
from slimkit.plan import apply

__all__ = ["fuse"]

_IMAGE_SIZES = (32, 64, 224, 28, 299, 256, 384)
"""Pixels of the images that are tried where no example is given; small ones cost the least."""


@door
def fuse(model: nn.Module, example_inputs: ExampleInputs | None = None) -> nn.Module:
    """A copy of ``model`` for inference with its batch norms folded into convolutions.

    Which batch norm follows which convolution, transposed convolution or linear layer is
    seen by running the model once; a pair is folded when nothing else reads the layer's
    output. With weight w, bias b, statistics μ, σ², scale γ and shift β of the batch norm,

        ``w' = w · γ / √(σ² + ε)``,  ``b' = β + (b − μ) · γ / √(σ² + ε)``.

    Outputs in eval mode are those of ``model`` to float precision. The fold is recorded as a
    plan on the copy, so that :func:`slimkit.save` and :func:`slimkit.load` repeat it.

    Args:
        model: any module, in any mode; not changed.
        example_inputs: what it is called with. None tries one image (or vector) of the
            usual sizes, with as many channels as the first layer takes.

    Returns:
        The folded copy, in eval mode, on the model's device.

    Raises:
        InputError: there are no example inputs and none of the usual ones fit.
        CaptureError: the model fails on the example inputs.
    """
    folded = copy_module(model).eval()
    if example_inputs is None:
        graph = _captured_by_guess(folded)
    else:
        graph = capture(folded, as_inputs(example_inputs))
    pairs = tuple(batch_norm_pairs(folded, graph))
    return apply(folded, FusePlan(pairs)) if pairs else folded


def _captured_by_guess(model: nn.Module) -> Graph:
    tried = []
    for guess in _guesses(model):
        try:
            return capture(model, guess)
        except CaptureError:
            tried.append("×".join(map(str, guess.shape)))
    raise InputError(
        f"{type(model).__name__} runs on none of the inputs that were tried "
        f"({', '.join(tried) or 'it has no convolution or linear layer'})",
        where="example_inputs",
        hint="pass what the model is called with",
    )


def _guesses(model: nn.Module) -> Iterator[torch.Tensor]:
    """Inputs that may fit the layer that is registered first."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            for size in _IMAGE_SIZES:
                yield torch.zeros(1, layer.in_channels, size, size, device=layer.weight.device)
            return
        if isinstance(layer, nn.Conv1d):
            for size in (64, 1024):
                yield torch.zeros(1, layer.in_channels, size, device=layer.weight.device)
            return
        if isinstance(layer, nn.Linear):
            yield torch.zeros(1, layer.in_features, device=layer.weight.device)
            return
