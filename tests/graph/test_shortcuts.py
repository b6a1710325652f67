"""Captures that do not compute what is costly, until a value decides."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkit.errors import CaptureError
from slimkit.graph import capture
from slimkit.graph.capturing import capture_both_modes
from slimkit.graph.shortcuts import without_values

aten = torch.ops.aten
X = torch.randn(2, 6, 9, 7)


def convolution(x, weight, stride=1, padding=0, dilation=1, transposed=False, beyond=0, groups=1):
    dims = weight.ndim - 2
    lists = [[value] * dims for value in (stride, padding, dilation)]
    return x, weight, None, *lists, transposed, [beyond] * dims, groups


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (aten.convolution.default, convolution(X, torch.randn(4, 6, 3, 3))),
        (aten.convolution.default, convolution(X, torch.randn(4, 6, 3, 2), 2, 1)),
        (aten.convolution.default, convolution(X, torch.randn(6, 1, 3, 3), 1, 2, 2, groups=6)),
        (aten.convolution.default, convolution(X[:, :, 0], torch.randn(4, 3, 3), groups=2)),
        (
            aten.convolution.default,
            convolution(X, torch.randn(6, 4, 3, 3), 2, 1, 2, True, 1, groups=2),
        ),
        (
            aten.convolution.default,
            convolution(X.to(memory_format=torch.channels_last), torch.randn(4, 6, 3, 3)),
        ),
        (aten.mm.default, (torch.randn(3, 4), torch.randn(4, 5))),
        (aten.addmm.default, (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5))),
        (aten.bmm.default, (torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
        (
            aten.baddbmm.default,
            (torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
        ),
    ],
)
def test_zeros_have_the_shape_and_layout_of_the_result(operator, args):
    exact = operator(*args)
    zeros = without_values(operator, args, {})
    assert exact.any()
    assert not zeros.any()
    assert (zeros.shape, zeros.stride()) == (exact.shape, exact.stride())


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Conv2d(3, 4, 3), torch.randn(1, 5, 8, 8)),
        (nn.Conv2d(3, 4, 9), torch.randn(1, 3, 8, 8)),
        (nn.Linear(4, 3), torch.randn(2, 5)),
        (nn.Linear(4, 3), torch.randn(2, 4, dtype=torch.float64)),
    ],
)
def test_what_torch_refuses_is_refused(model, example):
    with pytest.raises(CaptureError, match="the forward failed with RuntimeError"):
        capture(model, example)


class Decides(nn.Module):
    """Runs its second layer only if the first one says so."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.way = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), way
        nn.init.ones_(self.first.weight)

    def forward(self, x):
        y = self.first(x)
        most = y.flatten(1).amax(1)
        return self.second(y) if self.way(most) else y


@pytest.mark.parametrize(
    "way",
    [
        lambda most: most[0] > 0.5,
        lambda most: most.tolist()[0] > 0.5,
        lambda most: most.numpy()[0] > 0.5,
        lambda most: len(most[most > 0.5]),
        lambda most: len(most.nonzero()),
        lambda most: not torch.equal(most, torch.zeros(1)),
    ],
)
def test_values_that_decide_are_computed(way):
    graph = capture(Decides(way), torch.ones(1, 3, 4, 4))
    assert len([op for op in graph.ops if op.name == "aten.convolution.default"]) == 2


def test_a_forward_that_zeros_break_is_repeated():
    class Inverts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            nn.init.eye_(self.layer.weight)

        def forward(self, x):
            return torch.linalg.inv(self.layer(x) - self.layer.bias)

    assert capture(Inverts(), torch.eye(3)).outputs


def test_a_model_that_catches_everything_is_no_obstacle():
    class Careless(Decides):
        def forward(self, x):
            try:
                return super().forward(x)
            except Exception:
                return x

    graph = capture(Careless(lambda most: most[0] > 0.5), torch.ones(1, 3, 4, 4))
    assert len([op for op in graph.ops if op.name == "aten.convolution.default"]) == 2


def test_state_is_as_before_after_both_forwards():
    class Counts(Decides):
        def __init__(self):
            super().__init__(lambda most: most[0] > 0.5)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += 1
            x.mul_(1.0)
            return super().forward(x)

    model, x = Counts(), torch.ones(1, 3, 4, 4)
    capture_both_modes(model, x)
    assert not model.seen
    assert torch.equal(x, torch.ones(1, 3, 4, 4))
    assert F.relu(model(x)).any()
