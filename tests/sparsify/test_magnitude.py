"""Masks by magnitude: exact counts, equal answers, rows that stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimkit as sk
from slimkit.errors import InputError, PatternError, PlanError
from slimkit.sparsify.magnitude import magnitude_masks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Flatten(),
        nn.Linear(32 * 36, 10),
    )


@given(st.integers(2, 40), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_exactly_the_asked_share_of_a_layer_is_zero_also_among_equal_weights(
    rows: int, columns: int, sparsity: float, levels: int
) -> None:
    weight = torch.randint(1, levels + 1, (rows, columns)).float()
    mask = magnitude_masks({"w": weight}, sparsity)["w"]
    asked = round(sparsity * weight.numel())
    saved = int((mask.sum(dim=1) == 1).sum())
    zeros = int((~mask).sum())
    assert asked - saved <= zeros <= asked
    assert mask.any(dim=1).all()
    flat = magnitude_masks({"w": weight.clone()}, sparsity)["w"]
    assert torch.equal(mask, flat)


def test_the_largest_weights_stay() -> None:
    weight = torch.tensor([[0.1, -5.0, 0.2, 3.0], [-0.3, 1.0, 0.05, -2.0]])
    mask = magnitude_masks({"w": weight}, 0.5)["w"]
    assert mask.tolist() == [[False, True, False, True], [False, True, False, True]]


def test_a_row_of_small_weights_keeps_its_largest_and_the_plan_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[2] *= 1e-6
    plan = sk.sparsify.plan(model, sparsity=0.5)
    row = plan.masks["0.weight"][2]
    assert int(row.sum()) == 1
    assert row[model[0].weight[2].abs().argmax()]
    assert any("0.weight: 1 of 4 outputs keep one weight" in note for note in plan.notes)


def test_global_sparsity_takes_more_from_layers_of_small_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(0.2)
    plan = sk.sparsify.plan(model, sparsity=0.6, scope="global")
    shares = {name: 1 - mask.float().mean().item() for name, mask in plan.masks.items()}
    assert shares["0.weight"] > 0.9
    assert shares["1.weight"] < 0.3
    assert plan.sparsity == pytest.approx(0.6, abs=0.02)


def test_a_threshold_sets_what_is_smaller_to_zero() -> None:
    model = network()
    plan = sk.sparsify.plan(model, threshold=0.1)
    sk.apply(model, plan)
    weight = model[3].weight
    rest = weight[weight != 0].abs()
    assert rest.min() >= 0.1 or int((plan.masks["3.weight"].flatten(1).sum(1) == 1).sum())
    assert (weight == 0).any()


def test_norms_biases_and_frozen_weights_stay_and_only_takes_1x1_convolutions() -> None:
    model = network()
    model[6].weight.requires_grad_(False)
    plan = sk.sparsify.plan(model, sparsity=0.5)
    assert set(plan.masks) == {"0.weight", "3.weight", "4.weight"}
    assert plan.skipped["6.weight"] == "frozen"
    small = sk.sparsify.plan(model, sparsity=0.5, only="conv1x1")
    assert set(small.masks) == {"3.weight"}
    assert small.skipped["0.weight"] == "no 1×1 convolution"


def test_layers_are_skipped_by_pattern_type_and_function_and_have_shares_of_their_own() -> None:
    model = network()
    skipped = sk.sparsify.plan(
        model, sparsity=0.5, skip=["0", nn.Linear, lambda name, module, weight: name == "4.weight"]
    )
    assert set(skipped.masks) == {"3.weight"}
    own = sk.sparsify.plan(model, sparsity={"3": 0.75, "6": 0.5})
    assert 1 - own.masks["3.weight"].float().mean() == pytest.approx(0.75, abs=0.01)
    assert 1 - own.masks["6.weight"].float().mean() == pytest.approx(0.5, abs=0.01)
    assert own.skipped["0.weight"] == "named by no pattern"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, InputError),
        ({"sparsity": 0}, InputError),
        ({"sparsity": 1.0}, InputError),
        ({"sparsity": float("nan")}, InputError),
        ({"sparsity": 0.5, "threshold": 0.1}, InputError),
        ({"threshold": -1.0}, InputError),
        ({"sparsity": 0.5, "scope": "row"}, InputError),
        ({"sparsity": 0.5, "only": "layer9"}, PatternError),
        ({"sparsity": 0.5, "skip": [3]}, InputError),
        ({"sparsity": 0.5, "only": nn.BatchNorm2d}, PlanError),
    ],
)
def test_bad_choices_are_typed(options: dict[str, object], error: type[Exception]) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error):
        sk.sparsify.plan(model, **options)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_named() -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match=r"3\.weight"):
        sk.sparsify.plan(model, sparsity=0.5)


def test_masks_of_torch_prune_are_refused_by_name() -> None:
    from torch.nn.utils import prune

    model = network()
    prune.l1_unstructured(model[3], "weight", 0.5)
    with pytest.raises(PlanError, match=r"3\.weight_mask.*prune\.remove"):
        sk.sparsify.plan(model, sparsity=0.5)


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 1, 1), (4, 8, 3, 3)])
def test_two_of_four_along_the_input_channels(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    mask = magnitude_masks({"w": weight}, 0.5, pattern=sk.sparsify.NofM(2, 4))["w"]
    groups = mask.movedim(1, -1).reshape(-1, 4)
    assert (groups.sum(dim=1) == 2).all()
    values = weight.abs().movedim(1, -1).reshape(-1, 4)
    assert (
        values.where(groups, torch.inf).amin(1) >= values.where(~groups, -torch.inf).amax(1)
    ).all()


def test_what_no_pattern_fits_stays_dense_with_its_reason() -> None:
    plan = sk.sparsify.plan(network(), pattern=sk.sparsify.NofM(2, 4))
    assert set(plan.masks) == {"3.weight", "6.weight"}
    assert plan.skipped["0.weight"] == "its 3 input channels are no multiple of 4"
    with pytest.raises(InputError):
        sk.sparsify.NofM(4, 4)


def test_blocks_fall_as_a_whole() -> None:
    model = nn.Sequential(nn.Conv2d(9, 16, 1))
    plan = sk.sparsify.plan(model, sparsity=0.75, pattern=sk.sparsify.Block(2, 1))
    mask = plan.masks["0.weight"].flatten(1)
    pairs = mask.view(8, 2, 9)
    lonely = (pairs[:, 0] ^ pairs[:, 1]).sum()
    assert lonely <= len(plan.notes) * 16  # a row that would be lost keeps one weight
    assert 1 - mask.float().mean() == pytest.approx(0.75, abs=0.03)
