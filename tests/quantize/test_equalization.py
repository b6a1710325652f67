from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slimkit.errors import InputError
from slimkit.graph.capturing import capture
from slimkit.quantize import METHODS, QuantizedModel, ptq
from slimkit.quantize.methods.equalization import Equalize, links

Images = Callable[..., Tensor]


class Blocks(nn.Module):
    """Chains with ReLU, ReLU6, depthwise, pooling and a flattened end; a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand = nn.Conv2d(16, 32, 1)
        self.relu6 = nn.ReLU6(inplace=True)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.project = nn.Conv2d(32, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.slope = nn.PReLU(16)
        self.last = nn.Conv2d(16, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 16, 12)
        self.fc2 = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.relu6(self.depthwise(self.relu6(self.expand(x))))
        x = x + self.project(y)
        x = nn.functional.max_pool2d(self.slope(self.grouped(x)), 2)
        x = nn.functional.avg_pool2d(nn.functional.leaky_relu(self.last(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def uneven(seed: int, spread: float = 1.5) -> nn.Module:
    """Channels of very different ranges, some beyond the bound of ReLU6."""
    torch.manual_seed(seed)
    model = Blocks().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                factor = (spread * torch.randn(layer.weight.shape[0])).exp()
                layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.dim() - 1)))
                if layer.bias is not None:
                    layer.bias.mul_(factor)
    return model


def float_difference(q: QuantizedModel, model: nn.Module, x: Tensor) -> float:
    """Of the float networks, relative to the largest output."""
    with torch.no_grad():
        ours, theirs = q.model(x), model(x)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_pairs_end_where_a_value_has_two_readers() -> None:
    graph = capture(Blocks().eval(), torch.randn(2, 3, 16, 16))
    assert [str(link) for link in links(graph)] == [
        "expand → depthwise",
        "depthwise → project",
        "grouped → last",
        "last → fc1",
        "fc1 → fc2",
    ]
    clips = [link.bound for link in links(graph) if link.clip is not None]
    assert clips == [6.0, 6.0]
    assert next(link for link in links(graph) if str(link) == "last → fc1").repeats == 16


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    granularity=st.sampled_from(["tensor", "channel"]),
    ranges=st.sampled_from(["weights", "activations"]),
)
def test_the_float_function_on_calibration_data_stays(
    seed: int, granularity: str, ranges: str
) -> None:
    model = uneven(seed)
    x = torch.randn(8, 3, 16, 16)
    before = [p.detach().clone() for p in model.parameters()]
    q = ptq(
        model, x[:1], calibration=[x[:4], x[4:]], granularity=granularity,
        methods=[Equalize(ranges=ranges)],
    )  # fmt: skip
    assert float_difference(q, model, x) < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not torch.equal(q.model.get_parameter("fc1.weight"), model.get_parameter("fc1.weight"))
    assert torch.equal(q.model.get_parameter("stem.weight"), model.get_parameter("stem.weight"))


def test_channels_that_reach_the_bound_of_relu6_keep_their_scale() -> None:
    model = uneven(3, spread=2.0)
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        reached = model.expand(torch.relu(model.stem(x))).amax((0, 2, 3)) >= 6.0
    assert 0 < int(reached.sum()) < 32
    q = ptq(model, x[:1], calibration=[x], methods=["equalize"], granularity="tensor")
    ours, theirs = q.model.get_parameter("expand.weight"), model.get_parameter("expand.weight")
    same = (ours == theirs).flatten(1).all(1)
    assert same[reached].all()
    assert not same[~reached].any()


def test_equation_11_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, 1.0], [0.0, 0.5]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.01]))
        model[2].weight.copy_(torch.tensor([[0.5, 8.0]]))
    x = torch.tensor([[1.0, 1.0]])
    q = ptq(model, x, calibration=[x], methods=["equalize"], granularity="tensor")
    first, second = q.model.get_parameter("0.weight"), q.model.get_parameter("2.weight")
    # s = sqrt(r1 · r2) / r2: 4 and 1/4; all four ranges are 2
    torch.testing.assert_close(first, torch.tensor([[2.0, 0.25], [0.0, 2.0]]))
    torch.testing.assert_close(second, torch.tensor([[2.0, 2.0]]))
    torch.testing.assert_close(q.model.get_parameter("0.bias"), torch.tensor([0.25, 0.04]))


def test_ranges_that_were_spoilt_come_back() -> None:
    """Scaling channels up and down, which float does not see, ruins int8; this repairs it."""
    torch.manual_seed(0)
    even = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3),
    ).eval()  # fmt: skip
    spoilt = copy.deepcopy(even)
    with torch.no_grad():
        for first, second in ((0, 2), (2, 4), (4, 6)):
            s = (2.0 * torch.randn(16)).exp()
            spoilt[first].weight.div_(s.reshape(-1, 1, 1, 1))
            spoilt[first].bias.div_(s)
            spoilt[second].weight.mul_(s.reshape((-1, 1, 1, 1) if second == 2 else (1, -1, 1, 1)))
    x = torch.randn(16, 3, 12, 12)

    def sqnr(model: nn.Module, granularity: str, methods: list[str]) -> float:
        q = ptq(model, x[:1], calibration=[x], granularity=granularity, methods=methods)
        with torch.no_grad():
            error = (q(x) - even(x)).square().sum() / even(x).square().sum()
        return float(-10 * error.log10())

    for granularity in ("tensor", "channel"):
        good, bad = sqnr(even, granularity, []), sqnr(spoilt, granularity, [])
        repaired = sqnr(spoilt, granularity, ["equalize"])
        assert bad < good - 10, granularity
        assert repaired > good - 3, granularity


def test_a_dead_channel_with_a_large_bias_does_not_widen_the_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 1e-6
        model[0].bias[0] = 1.0
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        before = model[:2](x).amax() / model[:2](x)[:, 1:].amax((0, 2, 3)).log().mean().exp()
    q = ptq(model, x, calibration=[x], methods=["equalize"], granularity="tensor")
    with torch.no_grad():
        seen = torch.relu(nn.functional.conv2d(x, *list(q.model.parameters())[:2]))
    after = seen.amax() / seen[:, 1:].amax((0, 2, 3)).log().mean().exp()
    assert after < 1.5 * before


def test_settings_are_checked_and_no_pair_is_a_warning() -> None:
    for wrong in ({"ranges": "bias"}, {"iterations": 0}, {"headroom": 0.5}):
        with pytest.raises(InputError):
            Equalize(**wrong)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 4, 4)
    with pytest.warns(UserWarning, match="no two layers"):
        ptq(nn.Conv2d(3, 3, 1), x, calibration=[x], methods=["equalize"])
    assert {"equalize", "smoothquant"} <= set(METHODS)
