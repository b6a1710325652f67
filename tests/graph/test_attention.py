"""Heads, widths and the attributes that count them."""

from __future__ import annotations

import copy

import pytest
import torch
from attention_layers import STYLES, Attention
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import InputError
from slimkit.graph import Group, capture, check_equivalence, dependency_groups
from slimkit.graph.groups import AttentionPart

X = torch.randn(2, 5, 24)


class Block(nn.Module):
    """Tokens through an embedding, an attention layer in a residual branch, and a head."""

    def __init__(self, attention: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(24, width)
        self.norm = nn.LayerNorm(width)
        self.attn = attention
        self.head = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attn(self.norm(x))).mean(1))


def groups_of(model: nn.Module) -> dict[str, Group]:
    return {group.name: group for group in dependency_groups(capture(model, X), model)}


@pytest.mark.parametrize("style", STYLES)
def test_attention_is_pruned_however_it_writes_its_sizes(style: str) -> None:
    torch.manual_seed(0)
    model = Block(Attention(32, 4, style)).eval()
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    assert plan.kept["attn.qkv"][0] < plan.kept["attn.qkv"][1]
    assert plan.kept["embed"] == (16, 32)
    proof = check_equivalence(model, plan, X)
    assert proof.equal, str(proof)
    pruned = sk.apply(copy.deepcopy(model), plan)
    assert pruned(X).shape == (2, 3)


@pytest.mark.parametrize(
    ("style", "attention", "heads", "channels"),
    [
        ("attributes", "heads", 2, 8),
        ("attributes", "channels", 4, 4),
        ("parts", "channels", 4, 4),
        ("input", "heads", 2, 8),
        ("scaled", "channels", 2, 8),  # its scale fixes the channels: heads leave all the same
    ],
)
def test_whether_heads_or_their_channels_leave_can_be_said(
    style: str, attention: AttentionPart, heads: int, channels: int
) -> None:
    torch.manual_seed(0)
    model = Block(Attention(32, 4, style)).eval()
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1, attention=attention)
    proof = check_equivalence(model, plan, X)
    assert proof.equal, str(proof)
    sk.apply(model, plan)
    assert (model.attn.num_heads, model.attn.head_dim) == (heads, channels)
    assert f"attention={attention}" in plan.explain()


def test_a_wrong_part_of_attention_names_the_choices() -> None:
    with pytest.raises(
        InputError, match=r"attention: expected heads or channels, got 'head'.*heads"
    ):
        sk.prune.plan(Block(Attention(32, 4, "parts")), X, ratio=0.5, attention="head")  # type: ignore[arg-type]


def test_the_number_of_heads_follows_where_heads_leave() -> None:
    model = Block(Attention(32, 4, "attributes")).eval()
    group = groups_of(model)["attn.qkv"]
    assert (group.size, group.width) == (4, 24)  # a head: 8 channels of each of three
    assert [slot.tensor for slot in group.sizes] == ["attn:num_heads", "attn:inner"]
    assert group.link is None  # the width of the network is free
    plan = sk.prune.plan(model, X, ratio=0.25, only=["attn.qkv"], round_to=1)
    pruned = sk.apply(copy.deepcopy(model), plan)
    assert (pruned.attn.num_heads, pruned.attn.inner, pruned.attn.head_dim) == (3, 24, 8)
    assert model.attn.num_heads == 4


def test_a_width_taken_from_the_input_is_linked_to_it() -> None:
    model = Block(Attention(32, 4, "input")).eval()
    groups = groups_of(model)
    attention, width = groups["attn.qkv"], groups["embed"]
    assert attention.link == width.link is not None
    plan = sk.prune.plan(model, X, ratio=0.3, round_to=1)
    kept, whole = plan.kept["embed"]
    inner, three = plan.kept["attn.qkv"]
    assert kept / whole == inner / three < 1
    space = sk.prune.space(model, X, ignore=["embed"])
    assert [group.name for group in space.groups] == ["head.0"]
    assert "its size follows that of embed, which stays" in space.reasons["attn.qkv"]


def test_a_size_in_arithmetic_keeps_its_channels() -> None:
    class Odd(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.num_heads + 1)

    model = Block(Odd(32, 4, "attributes")).eval()
    group = groups_of(model)["attn.qkv"]
    # The heads are counted on, so the channels of each head leave instead.
    assert group.size == 8
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    assert check_equivalence(model, plan, X).equal


def test_a_cache_filled_by_the_capture_is_forgotten() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 4))
            self.kept: dict[str, Tensor] = {}
            self.layer = nn.Linear(24, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.kept:
                self.kept["bias"] = self.table.sum(1)
                self.last = self.kept["bias"]
            return self.head(self.layer(x) + self.kept["bias"])

    model = Cached().eval()
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    assert model.kept == {}
    assert not hasattr(model, "last")
    assert check_equivalence(model, plan, X).equal


def test_decisions_are_compared_and_taken_over() -> None:
    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 16)
            self.score = nn.Linear(16, 1)
            self.out = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            best = self.score(y).squeeze(-1).topk(2, dim=1).indices
            return self.out(y.gather(1, best.unsqueeze(-1).expand(-1, -1, y.shape[-1])))

    model = Chooser().eval()
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    proof = check_equivalence(model, plan, X)
    assert proof.equal
    assert proof.decisions == 1
    assert proof.max_decision_diff < 1e-12
