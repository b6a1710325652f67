from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model

from slimkit.graph import Group, capture, dependency_groups, rule
from slimkit.graph.channels import RULES


def groups_of(model: nn.Module, *shape: int) -> dict[str, Group]:
    x = torch.randn(*(shape or (2, 3, 8, 8)))
    return {group.name: group for group in dependency_groups(capture(model, x), model)}


def places(group: Group) -> dict[str, tuple[int, int]]:
    """Tensor and dimension → (channels, positions per channel)."""
    return {f"{s.tensor}:{s.dim}": s.positions.shape for s in group.slots}


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (layers, x)."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def test_a_chain_has_one_group_per_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    groups = groups_of(model)
    assert list(groups) == ["0", "0 input", "3"]
    group = groups["0"]
    assert (group.size, group.width, group.frozen_reason) == (8, 1, None)
    assert (group.producers, group.consumers) == (("0",), ("3",))
    assert places(group) == {
        "0.weight:0": (8, 1),
        "0.bias:0": (8, 1),
        "1.weight:0": (8, 1),
        "1.bias:0": (8, 1),
        "1.running_mean:0": (8, 1),
        "1.running_var:0": (8, 1),
        "3.weight:1": (8, 1),
    }
    assert all(np.array_equal(slot.positions[:, 0], range(8)) for slot in group.slots)
    assert groups["0 input"].frozen_reason == "it is part of the model's input"
    assert groups["3"].frozen_reason == "it is part of the model's output"
    assert "0: 8 channels" in str(group)
    assert "kept because it is part of the model's output" in str(groups["3"])


def test_residual_branches_leave_together() -> None:
    groups = groups_of(get_model("resnet18", num_classes=2), 1, 3, 32, 32)
    assert groups["conv1"].producers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert "layer2.0.downsample.0" in groups["conv1"].consumers
    free = [group for group in groups.values() if group.frozen_reason is None]
    assert sum(group.size for group in free) == 4 * (64 + 128 + 256 + 512) - 64 - 128 - 256 - 512


def test_flattened_maps_give_a_channel_many_positions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    slot = groups_of(model)["0"].slots[-1]
    assert (slot.tensor, slot.dim, slot.width) == ("2.weight", 1, 36)
    assert np.array_equal(slot.positions[2], range(72, 108))


def test_concatenated_channels_keep_their_places() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.last(torch.cat([net.first(x), net.second(x)], dim=1))

    model = Net(
        forward, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 6, 1), last=nn.Conv2d(10, 2, 1)
    )
    groups = groups_of(model)
    assert groups["first"].slots[-1].positions[:, 0].tolist() == [0, 1, 2, 3]
    assert groups["second"].slots[-1].positions[:, 0].tolist() == [4, 5, 6, 7, 8, 9]


def test_depthwise_convolutions_pass_channels_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1))
    group = groups_of(model)["0"]
    assert places(group)["0.weight:0"] == (8, 1)
    assert places(group)["1.weight:0"] == (8, 2)  # two outputs per input
    assert places(group)["2.weight:1"] == (8, 2)


@pytest.mark.parametrize(
    ("groups", "inner", "size", "width"),
    [(2, 8, 4, 2), (4, 8, 4, 2)],  # few wide groups: same place of each; many small: whole groups
)
def test_grouped_convolutions_keep_equal_groups(
    groups: int, inner: int, size: int, width: int
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, inner, 1), nn.Conv2d(inner, inner, 3, groups=groups), nn.Conv2d(inner, 2, 1)
    )
    group = groups_of(model)["0"]
    assert (group.size, group.width, group.frozen_reason) == (size, width, None)


def test_a_chunk_ties_its_parts() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        value, gate = net.both(x).chunk(2, dim=1)
        return net.last(value * gate.sigmoid())

    model = Net(forward, both=nn.Conv2d(3, 8, 1), last=nn.Conv2d(4, 2, 1))
    slot = groups_of(model)["both"].slots[0]
    assert slot.positions.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def shuffled(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    b, c, h, w = x.shape
    return net.last(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


def shuffled_by_numbers(net: Net, x: Tensor) -> Tensor:
    x = net.first(x).view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
    return net.last(x)


def test_a_shuffle_permutes_and_sizes_must_follow() -> None:
    layers = {"first": nn.Conv2d(3, 8, 1), "last": nn.Conv2d(8, 2, 1)}
    group = groups_of(Net(shuffled, **layers))["first"]
    assert group.frozen_reason is None
    assert group.slots[0].positions.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert group.slots[-1].positions.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    reason = groups_of(Net(shuffled_by_numbers, **layers))["first"].frozen_reason
    assert reason == "they are split into 2 × 4, which does not follow, in view of the model itself"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.scale)


def test_parameters_outside_of_layers_take_part() -> None:
    group = groups_of(Scaled(), 2, 3)["first"]
    assert [(s.tensor, s.role) for s in group.slots] == [
        ("first.weight", "producer"),
        ("first.bias", "vector"),
        ("scale", "vector"),
        ("last.weight", "consumer"),
    ]


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda y: y.argmax(1), "all of them enter aten.argmax"),
        (lambda y: y.cumsum(1), "all of them enter aten.cumsum"),
        (lambda y: y[:, :4], "a fixed range is cut out in getitem"),
        (lambda y: y.split([2, 6], 1)[1], "the sizes of the parts are fixed in split"),
        (lambda y: y.view(2, 8 * 64), "its size 512 is written as a number in view"),
        (lambda y: y * y.shape[1] ** -0.5, "its size enters a computation in Python"),
        (lambda y: torch.arange(y.shape[1]) + y.mean((2, 3)), "it comes out of aten.arange"),
        (lambda y: torch.fft.fft(y, dim=1).real, "nothing is known about the operator aten._fft"),
        (lambda y: y[:, [1, 0, 2]], "they are picked by index in aten.index"),
        (lambda y: y + torch.ones(8, 1, 1), "it meets a tensor made with a fixed size"),
    ],
)
def test_what_cannot_be_followed_freezes_with_its_reason(use, reason: str) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        seen = use(net.before(net.first(x)))
        return F.relu(net.other(x)).sum() + seen.sum()

    layers = {"first": nn.Conv2d(3, 6, 1), "before": nn.Conv2d(6, 8, 1)}
    groups = groups_of(Net(forward, **layers, other=nn.Conv2d(3, 5, 1)))
    assert groups["before"].frozen_reason is not None
    assert reason in groups["before"].frozen_reason
    assert groups["first"].frozen_reason is None  # the rest stays free
    assert groups["other"].frozen_reason is None  # a sum can lose zeros


def test_single_channels_are_not_offered() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1))
    assert groups_of(model)["0"].frozen_reason == "there is only one"


def test_transposed_and_pixel_shuffled_maps_are_followed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ConvTranspose2d(6, 16, 2, stride=2),
        nn.PixelShuffle(2),
        nn.PReLU(4),
        nn.Conv2d(4, 2, 1),
    )
    groups = groups_of(model)
    assert places(groups["0"]) == {"0.weight:0": (6, 1), "0.bias:0": (6, 1), "1.weight:0": (6, 1)}
    assert places(groups["1"]) == {
        "1.weight:1": (4, 4),
        "1.bias:0": (4, 4),
        "3.weight:0": (4, 1),
        "4.weight:1": (4, 1),
    }


@torch.library.custom_op("slimkit_tests::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    return x / 2


def test_a_rule_for_a_custom_operator_is_a_few_lines() -> None:
    layers = {"first": nn.Conv2d(3, 8, 1), "last": nn.Conv2d(8, 2, 1)}
    model = Net(lambda net, x: net.last(halve(net.first(x))), **layers)
    assert "slimkit_tests.halve" in str(groups_of(model)["first"].frozen_reason)

    @rule("slimkit_tests.halve")
    def follow(tracker, op) -> None:
        tracker.set_dims(op.outputs[0], tracker.dims(op.inputs[0]))

    try:
        assert groups_of(model)["first"].frozen_reason is None
    finally:
        del RULES["slimkit_tests.halve"]
