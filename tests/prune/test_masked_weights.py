"""Weights behind a mask: cut by channels, scored and counted as the network sees them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as masks

import slimkit as sk
from slimkit.graph.equivalence import check_equivalence

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class MaskedConv2d(nn.Conv2d):
    """Multiplies its weight by a mask of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())

    def forward(self, x):
        return F.conv2d(x, self.mask * self.weight, self.bias)


class SelectedConv2d(nn.Conv2d):
    """Takes zero where its mask says so."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.rand_like(self.weight) > 0.5)

    def forward(self, x):
        weight = torch.where(self.mask, self.weight, torch.zeros_like(self.weight))
        return F.conv2d(x, weight, self.bias)


def unstructured(*args):
    return masks.l1_unstructured(nn.Conv2d(*args), "weight", 0.5)


def structured(*args):
    return masks.ln_structured(nn.Conv2d(*args), "weight", 0.5, n=2, dim=0)


@pytest.mark.parametrize("layer", [unstructured, structured, MaskedConv2d, SelectedConv2d])
def test_masked_layers_lose_channels_and_the_plan_counts_what_profile_counts(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(3, 8, 3), nn.ReLU(), layer(8, 16, 3), nn.ReLU(), layer(16, 4, 3))
    model.eval()
    plan = sk.prune.plan(model, X, macs=0.5, round_to=1)
    assert check_equivalence(model, plan, X).equal
    assert plan.before.macs == sk.profile(model, X).macs
    assert list(plan.kept) == ["0", "2", "4"]
    sk.apply(model, plan)
    assert plan.after.macs == sk.profile(model, X).macs <= plan.before.macs / 2
    assert plan.after.params == sum(p.numel() for p in model.parameters())
    assert model(X).shape == (2, 4, 6, 6)
    assert model[0].out_channels == model[2].in_channels == plan.kept["0"][0] < 8
    assert model[2].weight.shape[-2:] == (3, 3)


def test_channels_that_a_mask_hides_go_first():
    model = nn.Sequential(structured(3, 16, 3), nn.Conv2d(16, 4, 3)).eval()
    hidden = model[0].weight_mask.flatten(1).sum(1) == 0
    with torch.no_grad():
        model[0].weight_orig[hidden] *= 100  # what is hidden does not count
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    (keep,) = (e.keep for e in plan.edits if (e.tensor, e.dim) == ("0.weight_orig", 0))
    assert list(keep) == torch.nonzero(~hidden).flatten().tolist()
