"""Calls of later forwards are recognised by what they are, or refused."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from random_calls import PERTURBATIONS, outcomes
from torch import Tensor, nn

from slimkit.errors import AddressError
from slimkit.graph import AddressMode, capture
from slimkit.graph.call_table import CallTable


class Watch(AddressMode):
    """Notes the addresses that the table has."""

    def __init__(self, model: nn.Module, table: CallTable) -> None:
        super().__init__(model, table, frozenset(table.calls))
        self.seen: list[str] = []

    def on_call(self, address, func, args, kwargs):
        if not address.endswith("#?"):
            self.seen.append(address)
        return func(*args, **kwargs)


def addresses(model: nn.Module, table: CallTable, *args: Tensor) -> list[str]:
    watch = Watch(model, table)
    with watch:
        model(*args)
    return watch.seen


def test_perturbed_random_programs_are_never_silently_another_network() -> None:
    verdicts = Counter(
        (outcome.perturbation[0], outcome.verdict)
        for seed in range(250)
        for outcome in outcomes(seed)
    )
    assert not any(verdict == "silent" for _, verdict in verdicts)
    # Noise renames nothing; most scalings and side calls do not, either.
    assert verdicts["noise", "right"] == 250
    for kind in PERTURBATIONS[1:3]:
        assert verdicts[kind, "right"] > 200, verdicts
    assert verdicts["skipped step", "right"] > 60


def test_a_table_survives_json_and_is_short_and_readable() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    table = capture(model, torch.randn(1, 3, 4, 4)).table
    data = json.loads(json.dumps(table.to_json()))
    assert data == {
        "calls": {
            "0:conv2d#0": ["0", "in0 .weight .bias", True, 1],
            "1:relu#0": ["1", "in0", True, 3],
        },
        "runs": {"0": ["", "0", "in0", True, 0], "1": ["", "1", "0", True, 2]},
    }
    assert CallTable.from_json(data) == table
    assert copy.deepcopy(table) is table


@pytest.mark.parametrize("data", [[], {"calls": {}}, {"calls": {"a": [1]}, "runs": {}}, 3])
def test_a_damaged_table_is_an_error_of_its_form(data: object) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        CallTable.from_json(data)


class Layers(nn.Module):
    """``way`` runs its layers in another way."""

    def __init__(self, way: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def plain(net: Layers, x: Tensor) -> Tensor:
    y = x + net.a(x).relu()
    return y + net.b(y).relu()


def noisy(net: Layers, x: Tensor) -> Tensor:
    return plain(net, x + 0.1 * torch.randn_like(x))


def skipped_branch(net: Layers, x: Tensor) -> Tensor:
    return x + net.b(x).relu()


def exit_early(net: Layers, x: Tensor) -> Tensor:
    return x + net.a(x).relu()


def auxiliary(net: Layers, x: Tensor) -> Tensor:
    (net.a(x) if x is None else x).sum()
    x.relu().mean()
    return plain(net, x)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (noisy, ["a:conv2d#0", ":relu#0", ":add#0", "b:conv2d#0", ":relu#1", ":add#1"]),
        (auxiliary, ["a:conv2d#0", ":relu#0", ":add#0", "b:conv2d#0", ":relu#1", ":add#1"]),
        (exit_early, ["a:conv2d#0", ":relu#0", ":add#0"]),
        (skipped_branch, ["b:conv2d#0", ":relu#1", ":add#1"]),
    ],
)
def test_known_calls_keep_their_addresses(way, expected: list[str]) -> None:
    net, x = Layers(plain).eval(), torch.randn(2, 4, 3, 3)
    table = capture(net, x).table
    net.way = way
    assert addresses(net, table, x) == expected


def twice(net: Layers, x: Tensor) -> Tensor:
    return plain(net, plain(net, x))


def other_operands(net: Layers, x: Tensor) -> Tensor:
    y = x + net.a(x).relu()
    return net.b(y).relu() + x


@pytest.mark.parametrize(("way", "where"), [(twice, "a:conv2d#0"), (other_operands, ":add#1")])
def test_calls_that_cannot_be_told_are_an_error_that_names_one(way, where: str) -> None:
    net, x = Layers(plain).eval(), torch.randn(2, 4, 3, 3)
    table = capture(net, x).table
    net.way = way
    with pytest.raises(AddressError) as error:
        addresses(net, table, x)
    assert error.value.where == where


def test_floats_that_follow_the_input_do_not_rename_a_call() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * x.shape[-1] ** -0.5).relu()

    table = capture(Scaled(), torch.randn(1, 4)).table
    assert addresses(Scaled(), table, torch.randn(1, 9)) == [":mul#0", ":relu#0"]


def test_a_scripted_layer_is_known_by_its_path() -> None:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return self.last(y) + y

    net, x = Scripted().eval(), torch.randn(1, 4, 3, 3)
    graph = capture(net, x)
    assert "inner" in graph.table.runs
    assert graph.table.calls[":add#0"].operands == ("last", "inner")
    expected = [call.address for call in graph.calls if not call.address.startswith("inner")]
    assert [a for a in addresses(net, graph.table, x) if not a.startswith("inner")] == expected


def test_a_module_that_was_replaced_is_found_again() -> None:
    net, x = Layers(plain).eval(), torch.randn(2, 4, 3, 3)
    table = capture(net, x).table
    before = addresses(net, table, x)
    net.a = nn.Conv2d(4, 4, 1)
    assert addresses(net, table, x) == before


def test_no_hooks_are_left_behind() -> None:
    net, x = Layers(plain).eval(), torch.randn(2, 4, 3, 3)
    table = capture(net, x).table
    addresses(net, table, x)
    net.way = twice
    with pytest.raises(AddressError):
        addresses(net, table, x)
    registered = torch.nn.modules.module
    assert not registered._global_forward_hooks
    assert not registered._global_forward_pre_hooks
