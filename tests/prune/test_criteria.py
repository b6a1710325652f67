"""Criteria against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimkit.errors import InputError, PlanError, UnknownNameError
from slimkit.graph.groups import Group, Slot
from slimkit.prune.criteria.scores import (
    CRITERIA,
    FPGM,
    BatchNormScale,
    FixedScores,
    Magnitude,
    Normalised,
    Random,
    channel_rows,
    channel_sums,
    prepared,
    producer_channels,
    scored,
)


def slot(tensor, dim, role, positions):
    return Slot(
        tensor, dim, role, np.asarray(positions, dtype=np.int64).reshape(len(positions), -1)
    )


@pytest.fixture
def group():
    """Two convolutions that are added, their batch norms, and one reader."""
    each = [0, 1, 2]
    slots = (
        slot("a.weight", 0, "producer", each),
        slot("b.weight", 0, "producer", each),
        slot("bn.weight", 0, "vector", each),
        slot("c.weight", 1, "consumer", each),
    )
    return Group("a", 3, slots)


@pytest.fixture
def tensors():
    a = torch.tensor([[3.0, -4.0], [0.0, 1.0], [6.0, 8.0]]).reshape(3, 2, 1, 1)
    b = torch.tensor([[1.0], [-2.0], [0.0]]).reshape(3, 1, 1, 1)
    return {
        "a.weight": a,
        "b.weight": b,
        "bn.weight": torch.tensor([0.5, -2.0, 1.0]),
        "bn.running_mean": torch.zeros(3),
        "c.weight": torch.ones(5, 3, 1, 1),
    }


def test_magnitudes_are_the_mean_of_the_norms_of_the_filters(group, tensors):
    l1, l2 = Magnitude(1)(group, tensors), Magnitude(2)(group, tensors)
    assert l1.tolist() == [(7 + 1) / 2, (1 + 2) / 2, (14 + 0) / 2]
    assert l2.tolist() == [(5 + 1) / 2, (1 + 2) / 2, (10 + 0) / 2]


def test_reductions_other_than_the_mean(group, tensors):
    assert Magnitude(2, reduction="sum")(group, tensors).tolist() == [6, 3, 10]
    assert Magnitude(2, reduction="max")(group, tensors).tolist() == [5, 2, 10]


def test_products_and_the_first_member_as_reductions(group, tensors):
    assert Magnitude(2, reduction="prod")(group, tensors).tolist() == [5, 2, 0]
    assert Magnitude(2, reduction="first")(group, tensors).tolist() == [5, 1, 10]


def test_all_members_leave_out_biases_and_running_statistics(group, tensors):
    each = [0, 1, 2]
    slots = (
        *group.slots,
        slot("a.bias", 0, "vector", each),
        slot("bn.running_mean", 0, "vector", each),
    )
    tensors["a.bias"] = torch.full((3,), 100.0)
    found = CRITERIA.get("group_l2")(Group("a", 3, slots), tensors)
    norms = np.array([[5, 1, 10], [1, 2, 0], [0.5, 2, 1], [5**0.5] * 3])
    assert found.tolist() == pytest.approx(norms.mean(axis=0).tolist())


def test_all_members_include_readers_and_scales(group, tensors):
    found = Magnitude(1, members="all", reduction="sum")(group, tensors)
    assert found.tolist() == [7 + 1 + 0.5 + 5, 1 + 2 + 2 + 5, 14 + 0 + 1 + 5]


def test_fpgm_sums_the_distances_to_the_other_filters(group, tensors):
    a = [(3, -4), (0, 1), (6, 8)]
    b = [(1, 0), (-2, 0), (0, 0)]

    def distances(points):
        return [sum(float(np.hypot(p[0] - q[0], p[1] - q[1])) for q in points) for p in points]

    expected = [(x + y) / 2 for x, y in zip(distances(a), distances(b), strict=True)]
    assert FPGM()(group, tensors).tolist() == pytest.approx(expected)


def test_fpgm_finds_the_replaceable_filter_that_magnitude_would_keep():
    weight = torch.tensor([[10.0, 0.0], [10.0, 0.1], [10.0, -0.1], [0.0, 1.0]])
    only = Group("a", 4, (slot("a.weight", 0, "producer", [0, 1, 2, 3]),))
    assert FPGM()(only, {"a.weight": weight}).argmin() == 0  # in the middle of the others
    assert Magnitude(2)(only, {"a.weight": weight}).argmin() == 3


def test_batch_norm_scale_is_the_absolute_value(group, tensors):
    assert BatchNormScale()(group, tensors).tolist() == [0.5, 2.0, 1.0]


def test_batch_norm_scale_leaves_a_group_without_one_alone(tensors):
    bare = Group("b", 3, (slot("b.weight", 0, "producer", [0, 1, 2]),))
    with pytest.raises(PlanError, match="no batch normalization"):
        BatchNormScale()(bare, tensors)


def test_random_depends_on_seed_and_group_only(group, tensors):
    again = Random(3)(group, tensors)
    assert torch.equal(Random(3)(group, tensors), again)
    assert not torch.equal(Random(4)(group, tensors), again)
    assert not torch.equal(Random(3)(Group("z", 3, group.slots), tensors), again)


def test_rows_gather_all_positions_of_a_channel(tensors):
    """A linear layer behind a flattened map: channel 0 owns columns 0, 1; channel 1 owns 2, 3."""
    tensors["fc.weight"] = torch.arange(8.0).reshape(2, 4)
    rows = channel_rows(slot("fc.weight", 1, "consumer", [[0, 1], [2, 3]]), tensors)
    assert rows.tolist() == [[0, 4, 1, 5], [2, 6, 3, 7]]


def test_only_producers_give_filters(group, tensors):
    assert [tuple(rows.shape) for rows in producer_channels(group, tensors)] == [(3, 2), (3, 1)]


def test_scores_do_not_depend_on_the_device(group, tensors, device):
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name in CRITERIA:
        here, there = (scored(CRITERIA.get(name), group, t) for t in (tensors, moved))
        assert torch.allclose(here, there)


def test_sums_gather_all_positions_of_a_channel():
    weight = torch.arange(8.0).reshape(2, 4)
    found = channel_sums(slot("fc.weight", 1, "consumer", [[0, 3], [1, 2]]), weight)
    assert found.tolist() == [0 + 4 + 3 + 7, 1 + 5 + 2 + 6]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("none", [1, 2, 6]),
        ("mean", [1 / 3, 2 / 3, 2]),
        ("max", [1 / 6, 1 / 3, 1]),
        ("sum", [1 / 9, 2 / 9, 6 / 9]),
        ("std", [1 / 14**0.5 * 3**0.5, 2 / 14**0.5 * 3**0.5, 6 / 14**0.5 * 3**0.5]),
        ("gaussian", [-2 / 14**0.5 * 3**0.5, -1 / 14**0.5 * 3**0.5, 3 / 14**0.5 * 3**0.5]),
    ],
)
def test_scores_are_normalised_within_the_group(group, tensors, by, expected):
    plain = FixedScores({"a": torch.tensor([1.0, 2.0, 6.0])})  # mean 3, variance 14 / 3
    assert Normalised(plain, by)(group, tensors).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("by", ["mean", "max", "sum", "std", "gaussian"])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_equal_scores_stay_finite_and_equal(group, tensors, by, value):
    found = Normalised(FixedScores({"a": torch.full((3,), value)}), by)(group, tensors)
    assert torch.isfinite(found).all()
    assert len(set(found.tolist())) == 1


def test_a_criterion_is_prepared_once_through_its_wrapper(group, tensors):
    class Slow:
        calls = 0

        def prepare(self, model, groups):
            self.calls += 1
            return FixedScores({g.name: torch.arange(float(g.size)) for g in groups})

    slow = Slow()
    ready = prepared(Normalised(slow, "max"), torch.nn.Identity(), [group])
    assert ready(group, tensors).tolist() == ready(group, tensors).tolist() == [0, 0.5, 1]
    assert slow.calls == 1
    assert prepared(Magnitude(), torch.nn.Identity(), [group]) == Magnitude()


def test_fixed_scores_leave_other_groups_alone(group, tensors):
    with pytest.raises(PlanError, match="the loss does not see them"):
        FixedScores({}, {"a": "the loss does not see them"})(group, tensors)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Magnitude(reduction="maen"),
        lambda: FPGM(reduction="maen"),
        lambda: Normalised("l2", "maen"),
    ],
)
def test_an_unknown_choice_names_the_nearest(wrong):
    with pytest.raises(InputError, match="did you mean 'mean'"):
        wrong()


@pytest.mark.parametrize("name", ["taylor", "group_fisher", "obd"])
def test_criteria_that_need_data_say_how_to_get_it(name):
    assert name not in CRITERIA
    with pytest.raises(UnknownNameError, match=r"training batches.*prune\.\w+\(batches, loss\)"):
        CRITERIA.get(name, where="criterion")
    with pytest.raises(UnknownNameError, match=f"did you mean '{name}'"):
        CRITERIA.get(name + "x")


def test_a_ten_line_criterion_is_found_by_name(group, tensors):
    @CRITERIA.register("test_mean_magnitude")
    def mean_magnitude(group, tensors):
        rows = [channels.abs().mean(dim=1) for channels in producer_channels(group, tensors)]
        return torch.stack(rows).mean(dim=0)

    found = scored(CRITERIA.get("test_mean_magnitude"), group, tensors)
    assert found.tolist() == [(3.5 + 1) / 2, (0.5 + 2) / 2, (7 + 0) / 2]


def test_wrong_answers_of_a_criterion_are_named(group, tensors):
    with pytest.raises(InputError, match=r"shape \(3,\) for a"):
        scored(lambda group, tensors: torch.ones(4), group, tensors)
    with pytest.raises(InputError, match="NaN"):
        scored(lambda group, tensors: torch.full((3,), float("nan")), group, tensors)


def test_an_unknown_criterion_names_the_nearest():
    with pytest.raises(UnknownNameError, match="fpgm"):
        CRITERIA.get("fpmg", where="criterion")
