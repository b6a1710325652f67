from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.quantize.methods.layer_calls import LayerCall, grouped

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 8, 9)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 6, 6)),
    (nn.Conv2d(6, 4, 3, groups=2, bias=False), (1, 6, 6, 6)),
    (nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 5, 7)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 7)),
    (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 5)),
    (nn.Conv2d(4, 6, 3), (4, 5, 7)),
    (nn.Linear(5, 3), (7, 5)),
    (nn.Linear(5, 3, bias=False), (2, 7, 5)),
]


def call_of(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> LayerCall:
    """What the module passes to its torch function."""
    seen: list[LayerCall] = []
    for name in ("conv1d", "conv2d", "conv3d", "linear"):
        real = getattr(F, name)

        def spy(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.append(LayerCall.read(args, kwargs))
            return real(*args, **kwargs)

        monkeypatch.setattr(F, name, spy)
    module(x)
    return seen[0]


@pytest.mark.parametrize(("module", "shape"), CASES, ids=lambda value: str(value)[:40])
def test_patches_times_weight_is_what_the_layer_computes(
    module: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape)
    expected = module(x)
    call = call_of(module, x, monkeypatch)
    monkeypatch.undo()
    output = call.output(call.x, call.weight)
    torch.testing.assert_close(output.reshape(expected.shape), expected)
    assert call.positions() == expected.numel() // call.weight.shape[0]
    picks = torch.randperm(call.positions())[:11]
    patches = call.patches(call.x, picks)
    product = patches @ grouped(call.weight, call.groups).transpose(1, 2)
    found = product.transpose(0, 1).flatten(1)
    found = found if call.bias is None else found + call.bias
    torch.testing.assert_close(found, call.picked(output, picks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("module", "shape"), CASES, ids=lambda value: str(value)[:40])
def test_positions_know_their_example(
    module: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape)
    call = call_of(module, x, monkeypatch)
    monkeypatch.undo()
    output = call.output(call.x, call.weight)
    everywhere = torch.arange(call.positions())
    examples = call.examples(everywhere)
    means = call.by_example(output)
    assert examples.unique().tolist() == list(range(len(call.x))) == list(range(len(means)))
    for number, mean in enumerate(means):
        there = call.picked(output, everywhere[examples == number])
        torch.testing.assert_close(mean, there.mean(0))


def test_a_vector_is_one_example() -> None:
    call = LayerCall(torch.randn(5), torch.randn(3, 5), None)
    assert call.examples(torch.tensor([0])).tolist() == [0]
    assert call.by_example(call.output(call.x, call.weight)).shape == (1, 3)
