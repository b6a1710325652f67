"""Half of the MACs out of well-known networks, proved by equivalence and by replay."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import slimkit as sk
from slimkit.graph.equivalence import check_equivalence

X = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)

NETWORKS = [
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v2",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x1_0",
    "vgg16_bn",
]


def build(name):
    """The network with weights that let signals through, so that a fault shows in the output."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    if name == "vgg16_bn":  # 120 M parameters of its head would only cost time
        head = model.classifier
        head[0], head[3], head[6] = nn.Linear(25088, 64), nn.Linear(64, 64), nn.Linear(64, 10)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name_, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name_.endswith(("running_var", "layer_scale")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() > 1:
                fan_in = tensor[0].numel()
                tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_macs_leave_and_the_rest_computes_the_same(name):
    model = build(name)
    plan = sk.prune.plan(model, X, macs=0.5)
    proof = check_equivalence(model, plan, X)
    assert proof.max_abs_output > 1e-3
    assert proof.max_abs_diff <= 1e-9 * proof.max_abs_output

    first, second = copy.deepcopy(model), copy.deepcopy(model)
    output = sk.apply(first, plan)(X)
    found = sk.profile(first, X)
    assert 0.47 < found.macs / plan.before.macs <= 0.5
    assert (found.macs, found.params) == (plan.after.macs, plan.after.params)

    replayed = type(plan).from_json(plan.to_json(), {})
    assert torch.equal(sk.apply(second, replayed)(X), output)
