"""A one-stage detector in the style of YOLOv8: split bottlenecks, a pyramid, a decoded head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.graph.equivalence import check_equivalence


class Conv(nn.Module):
    def __init__(self, inputs, outputs, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return nn.functional.silu(self.bn(self.conv(x)))


class Split(nn.Module):
    """Half of the channels goes on, half also through a bottleneck; all are concatenated."""

    def __init__(self, inputs, outputs):
        super().__init__()
        half = outputs // 2
        self.first, self.last = Conv(inputs, outputs), Conv(3 * half, outputs)
        self.inner = nn.Sequential(Conv(half, half, 3), Conv(half, half, 3))

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.append(parts[-1] + self.inner(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """Pooled several times at one size, as SPPF does."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = Conv(width, width // 2), Conv(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        steps = [self.first(x)]
        for _ in range(3):
            steps.append(self.pool(steps[-1]))
        return self.last(torch.cat(steps, 1))


class Head(nn.Module):
    """Boxes as distributions over 16 bins per side, classes beside them."""

    def __init__(self, widths, classes=3, bins=16):
        super().__init__()
        self.boxes = nn.ModuleList(
            nn.Sequential(Conv(w, 32, 3), nn.Conv2d(32, 4 * bins, 1)) for w in widths
        )
        self.classes = nn.ModuleList(
            nn.Sequential(Conv(w, 48, 3), nn.Conv2d(48, classes, 1)) for w in widths
        )
        self.bins, self.count = bins, classes
        self.places = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.places.weight.data = torch.arange(float(bins)).reshape(1, bins, 1, 1)

    def forward(self, maps):
        outputs = [
            torch.cat((box(x), name(x)), 1).flatten(2)
            for box, name, x in zip(self.boxes, self.classes, maps, strict=True)
        ]
        sides, scores = torch.cat(outputs, 2).split((4 * self.bins, self.count), 1)
        spread = sides.view(len(sides), 4, self.bins, -1).softmax(2)
        near, far = self.expected(spread).chunk(2, 1)
        return torch.cat((far - near, far + near, scores.sigmoid()), 1)

    def expected(self, spread):
        return self.places(spread.transpose(1, 2)).squeeze(1)


class IntegralHead(Head):
    """The same by a matrix product with a buffer, as in Generalized Focal Loss."""

    def __init__(self, widths):
        super().__init__(widths)
        del self.places
        self.register_buffer("places", torch.arange(float(self.bins)))

    def expected(self, spread):
        return torch.einsum("nsbp,b->nsp", spread, self.places)


class Detector(nn.Module):
    def __init__(self, head=Head):
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 16, 3, 2), Conv(16, 32, 3, 2), Split(32, 32))
        self.down = nn.Sequential(Conv(32, 64, 3, 2), Split(64, 64), Pyramid(64))
        self.up, self.neck = nn.Upsample(scale_factor=2), Split(96, 32)
        self.again, self.low = Conv(32, 32, 3, 2), Split(96, 64)
        self.head = head((32, 64))

    def forward(self, x):
        fine = self.stem(x)
        coarse = self.down(fine)
        fine = self.neck(torch.cat([self.up(coarse), fine], 1))
        return self.head([fine, self.low(torch.cat([self.again(fine), coarse], 1))])


@pytest.mark.parametrize("head", [Head, IntegralHead])
def test_half_of_the_channels_leave_the_whole_detector(head):
    torch.manual_seed(0)
    model, x = Detector(head).eval(), torch.rand(1, 3, 64, 64)
    plan = sk.prune.plan(model, x, ratio=0.5)
    proof = check_equivalence(model, plan, x)
    assert proof.equal, str(proof)
    stay = {layer.name: layer.reason for layer in plan.layers if layer.reason}
    assert set(stay) - {"head.places"} == {
        *(f"head.boxes.{scale}.1" for scale in (0, 1)),
        *(f"head.classes.{scale}.1" for scale in (0, 1)),
    }
    assert stay["head.boxes.0.1"] == "they are the bins of a distribution (softmax)"
    assert stay["head.classes.0.1"] == "it is part of the model's output"
    assert plan.after.macs < 0.35 * plan.before.macs


def test_explain_names_no_layer_as_its_own_partner():
    lines = str(sk.prune.plan(Detector().eval(), torch.rand(1, 3, 64, 64), ratio=0.5).explain())
    (line,) = (line for line in lines.splitlines() if line.startswith("neck.first.conv"))
    assert line.endswith("with neck.inner.1.conv; its parts keep the same fraction")
