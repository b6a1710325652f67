"""Sensitivity curves: measured point by point, kept in a file, turned into ratios."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimkit as sk
from slimkit.errors import ArtifactError, InputError, PlanError
from slimkit.prune.allocation.curves import SensitivityCurves, UnitCurve, merge_sensitivities
from slimkit.prune.allocation.sensitivity import Sensitivity, measure_sensitivity

IMAGE = torch.zeros(1, 3, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(10, 10, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(10, 20, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(20, 4, 1),
    )


def widths(model):
    return [layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)]


def score(model):
    """Falls by 1 · r for the first layer, by r² for the second, by 0.1 · r for the third."""
    first, second, third, _ = widths(model)
    return 0.9 - (1 - first / 10) - (1 - second / 10) ** 2 - 0.1 * (1 - third / 20)


def space_of(evaluate=score, model=None, **options):
    return sk.prune.space(
        network() if model is None else model, IMAGE, round_to=1, evaluate=evaluate, **options
    )


def measured(space, **options):
    return measure_sensitivity(space, progress=False, **options)


class Counting:
    """``score`` that counts, and fails for chosen widths."""

    def __init__(self, fails_at=None, answer=None):
        self.calls = 0
        self.fails_at, self.answer = fails_at, answer

    def __call__(self, model):
        self.calls += 1
        if widths(model)[:3] == self.fails_at:
            if self.answer is None:
                raise RuntimeError("out of luck")
            return self.answer
        return score(model)


# --- measuring -------------------------------------------------------------------------------


def test_each_unit_is_pruned_alone_at_each_ratio():
    curves = measured(space_of(), ratios=(0.5, 0.2))
    assert curves.base == pytest.approx(0.9)
    assert list(curves.units) == ["0", "2", "4"]
    for name, fall in (("0", lambda r: r), ("2", lambda r: r * r), ("4", lambda r: 0.1 * r)):
        ratios, losses = curves.units[name].losses(curves.base)
        assert ratios.tolist() == pytest.approx([0.0, 0.2, 0.5])
        assert losses.tolist() == pytest.approx([0.0, fall(0.2), fall(0.5)])


def test_ratios_that_round_to_the_same_channels_are_evaluated_once():
    evaluate = Counting()
    space = sk.prune.space(network(), IMAGE, round_to=5, evaluate=evaluate)
    curves = measured(space)
    assert {name: sorted(curve.values) for name, curve in curves.units.items()} == {
        "0": [5],
        "2": [5],
        "4": [5, 10, 15],
    }
    assert evaluate.calls == 1 + 5


def test_the_network_itself_is_not_changed():
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def spoils(candidate):
        with torch.no_grad():
            for weight in candidate.parameters():
                weight.zero_()
        return 0.0

    measured(space_of(spoils, model), ratios=(0.5,))
    assert model.training
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


def test_the_file_grows_point_by_point_and_is_resumed_from(tmp_path):
    file = tmp_path / "curves.json"
    seen = []

    def evaluate(model):
        points = 0
        if file.exists():
            points = sum(
                len(unit["kept"]) for unit in json.loads(file.read_text())["units"].values()
            )
        seen.append(points)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return score(model)

    with pytest.raises(KeyboardInterrupt):
        measured(space_of(evaluate), file=file, ratios=(0.2, 0.5))
    assert seen == [0, 0, 1, 2, 3]  # the first is the unpruned network
    rest = Counting()
    resumed = measured(space_of(rest), file=file, ratios=(0.2, 0.5))
    assert rest.calls == 2 + 3  # two known points show that it is the same evaluation
    assert resumed == measured(space_of(), ratios=(0.2, 0.5))
    finer = Counting()
    measured(space_of(finer), file=file, ratios=(0.2, 0.4))
    assert finer.calls == 2 + 3  # 0.2 is known


def test_a_file_that_another_evaluation_filled_is_refused(tmp_path):
    file = tmp_path / "curves.json"
    whole = measured(space_of(), file=file, ratios=(0.2, 0.5))
    before = file.read_bytes()
    for other, message in (
        (lambda model: 100 * score(model), r"the unpruned network scores 0\.9 there and 90 here"),
        # as good on the whole network, as agreement with it always is
        (lambda model: 0.45 + score(model) / 2, r"0 at ratio 0\.5 .* 0\.4 there and 0\.65 here"),
    ):
        with pytest.raises(PlanError, match=message):
            measured(space_of(other), file=file, ratios=(0.2, 0.4, 0.5))
        with pytest.raises(PlanError, match="another evaluation"):
            measured(space_of(other), file=file, ratios=(0.2, 0.5))  # nothing is missing in it
        assert file.read_bytes() == before
    rounding = Counting()
    again = measured(
        space_of(lambda model: rounding(model) * (1 + 1e-5)), file=file, ratios=(0.2, 0.5)
    )
    assert again == whole
    assert measured(space_of(None), file=file, ratios=(0.2, 0.5)) == whole  # nobody says otherwise


@pytest.mark.parametrize(
    ("answer", "message"),
    [(float("nan"), "gave nan"), (None, "failed with RuntimeError: out of luck")],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_evaluation_names_unit_and_ratio_and_the_file_stays(
    tmp_path, answer, message, workers
):
    file = tmp_path / "curves.json"
    bad = Counting([10, 5, 20], answer)
    with pytest.raises(PlanError, match=rf"2 at ratio 0.5 \(5 of 10 channels\): .*{message}"):
        measured(space_of(bad), file=file, ratios=(0.2, 0.5), workers=workers)
    if workers == 1:
        assert SensitivityCurves.load(file).units["2"].values == {8: pytest.approx(0.86)}
    assert measured(space_of(), file=file, ratios=(0.2, 0.5)) == measured(
        space_of(), ratios=(0.2, 0.5)
    )


def test_processes_measure_the_same():
    assert measured(space_of(), workers=3) == measured(space_of())


def test_a_process_that_dies_is_an_error_that_says_where(tmp_path):
    parent = os.getpid()

    def deadly(model):
        if widths(model)[0] == 5 and os.getpid() != parent:
            os._exit(1)
        return score(model)

    with pytest.raises(PlanError, match=r"0 at ratio 0\.5 .*: the process died"):
        measured(space_of(deadly), workers=2, ratios=(0.2, 0.5))


def test_parts_are_merged_to_the_whole(tmp_path):
    files = [tmp_path / f"{i}.json" for i in (1, 2)]
    calls = []
    for i, file in enumerate(files, 1):
        evaluate = Counting()
        measured(space_of(evaluate), file=file, part=(i, 2), ratios=(0.2, 0.5))
        calls.append(evaluate.calls)
    assert calls == [1 + 4, 1 + 2]
    merged = merge_sensitivities(files)
    assert merged == measured(space_of(), ratios=(0.2, 0.5))
    merged.save(tmp_path / "all.json")
    without = space_of(evaluate=None)  # nothing is left to evaluate
    assert measured(without, file=tmp_path / "all.json", ratios=(0.2, 0.5)) == merged


def test_parts_whose_bases_differ_a_little_are_shifted_and_much_are_refused():
    part = measured(space_of(), part=(1, 2), ratios=(0.5,))
    near = measured(space_of(lambda m: score(m) - 0.001), part=(2, 2), ratios=(0.5,))
    merged = merge_sensitivities([part, near])
    assert merged.units["2"].values[5] == pytest.approx(0.9 - 0.25)
    far = measured(space_of(lambda m: score(m) - 0.1), part=(2, 2), ratios=(0.5,))
    with pytest.raises(PlanError, match=r"parts\[1\]: the unpruned network scores 0.8 there"):
        merge_sensitivities([part, far])
    with pytest.raises(InputError, match="nothing to merge"):
        merge_sensitivities([])


# --- files of something else -----------------------------------------------------------------


def test_the_file_of_another_model_is_refused_with_where_it_differs(tmp_path):
    file = tmp_path / "curves.json"
    measured(space_of(), file=file, ratios=(0.5,))
    before = file.read_bytes()
    other = network()
    with torch.no_grad():
        other[2].bias[0] += 1
    with pytest.raises(PlanError, match=r"curves.json: .*weights.2.bias is"):
        measured(space_of(model=other), file=file)
    with pytest.raises(PlanError, match=r"4.order is"):
        measured(space_of(criterion="random", ignore=["0", "2"]), file=file)
    with pytest.raises(PlanError, match=r"0.groups is"):
        measured(space_of(equal=[["0", "2"]]), file=file)
    assert file.read_bytes() == before


def test_the_curves_of_fewer_units_are_taken_from_a_file_of_more(tmp_path):
    file = tmp_path / "curves.json"
    measured(space_of(), file=file, ratios=(0.5,))
    evaluate = Counting()
    curves = measured(space_of(evaluate, ignore=["0"]), file=file, ratios=(0.5,))
    assert evaluate.calls == 2  # to see that it is the same evaluation
    assert list(curves.proposal(space_of(ignore=["0"]))(0.1)) == ["2", "4"]


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "plan", "version": 1}', '{"kind": 1}'])
def test_a_damaged_file_is_refused(tmp_path, content):
    file = tmp_path / "curves.json"
    file.write_text(content)
    with pytest.raises(ArtifactError, match=r"curves\.json"):
        measured(space_of(), file=file)


def test_wrong_arguments_are_named():
    for options, where in (
        ({"ratios": (0.5, 1.0)}, "ratios"),
        ({"ratios": ()}, "ratios"),
        ({"workers": 0}, "workers"),
        ({"part": (0, 2)}, "part"),
    ):
        with pytest.raises(InputError, match=f"{where}: expected"):
            measured(space_of(), **options)
    with pytest.raises(InputError, match="evaluate: "):
        measured(space_of(evaluate=None))


# --- from curves to ratios -------------------------------------------------------------------


def curves_of(base=1.0, sizes=None, **falls):
    """Curves from lists of falls at ratios 0.1, 0.2 … ."""
    sizes = sizes or {}
    units = {}
    for name, listed in falls.items():
        size = sizes.get(name, 100)
        values = {round(size * (1 - 0.1 * n)): base - fall for n, fall in enumerate(listed, 1)}
        units[name] = UnitCurve(size, (name,), "", values)
    return SensitivityCurves(base, {}, units)


def fake_space(curves):
    groups = [SimpleNamespace(name=name, size=curve.size) for name, curve in curves.units.items()]
    units = [SimpleNamespace(name=group.name, groups=(group.name,)) for group in groups]
    return SimpleNamespace(groups=groups, units=units)


def test_ratios_at_a_loss_are_interpolated_between_points():
    curves = curves_of(a=[0.1, 0.2, 0.4], b=[0.0, 0.0, 0.5], c=[0.3, 0.6, 0.9])
    assert curves.ratios_at(0.3) == pytest.approx({"a": 0.25, "b": 0.26, "c": 0.1})
    assert curves.ratios_at(0.15) == pytest.approx({"a": 0.15, "b": 0.23, "c": 0.05})
    assert curves.ratios_at(0.0) == pytest.approx({"a": 0.0, "b": 0.2, "c": 0.0})
    assert curves.ratios_at(9.0) == pytest.approx({"a": 0.3, "b": 0.3, "c": 0.3})
    assert curves.ratios_at(-1.0) == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})


def test_noise_is_evened_out():
    ratios, losses = curves_of(a=[0.2, 0.1, -0.1, 0.5]).units["a"].losses(1.0)
    assert ratios.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    third = (0.2 + 0.1 - 0.1) / 3
    assert losses.tolist() == pytest.approx([0, third, third, third, 0.5])
    _, better = curves_of(a=[-0.2, -0.1, 0.3]).units["a"].losses(1.0)
    assert better.tolist() == pytest.approx([0, 0, 0, 0.3])  # better than before is no loss


def test_a_fraction_takes_equal_losses_and_so_many_channels_in_all():
    curves = curves_of(a=[0.1, 0.2, 0.3, 0.4], b=[0.025, 0.05, 0.075, 0.1])
    kept = curves.proposal(fake_space(curves))(0.25)
    # Together half of one unit, at equal losses: r_a = t, r_b = 4 t, t = 0.1.
    assert kept == pytest.approx({"a": 90, "b": 60}, abs=0.05)


def test_units_that_do_not_matter_give_in_proportion():
    curves = curves_of(a=[0.0] * 9, b=[0.0] * 9, sizes={"b": 40})
    assert curves.proposal(fake_space(curves))(0.45) == pytest.approx({"a": 55, "b": 22})


@settings(max_examples=60)
@given(
    falls=st.lists(
        st.lists(st.floats(-0.5, 1e3).map(lambda x: round(x, 2)), min_size=9, max_size=9),
        min_size=1,
        max_size=4,
    ),
    scale=st.sampled_from([1e-4, 1.0, 1e6]),
)
def test_the_family_runs_from_nothing_to_everything_without_rising_or_jumping(falls, scale):
    curves = curves_of(
        base=scale, **{f"u{i}": [scale * f for f in listed] for i, listed in enumerate(falls)}
    )
    proposal = curves.proposal(fake_space(curves))
    assert list(proposal(0.0).values()) == pytest.approx([100.0] * len(falls))
    assert list(proposal(0.9).values()) == pytest.approx([10.0] * len(falls))
    assert list(proposal(1.0).values()) == pytest.approx([0.0] * len(falls))
    steps = np.array([list(proposal(f).values()) for f in np.linspace(0, 1, 101)])
    assert (np.diff(steps, axis=0) <= 1e-6).all()
    total = steps.sum(axis=1)
    assert total == pytest.approx(len(falls) * (100 - np.arange(101.0)), abs=1e-6)


def test_layers_that_matter_less_lose_more_and_the_target_is_met(tmp_path):
    model = network()
    plan = sk.prune.plan(
        model,
        IMAGE,
        macs=0.4,
        round_to=1,
        allocation=Sensitivity(file=tmp_path / "curves.json"),
        evaluate=score,
        progress=False,
    )
    before = sk.profile(model, IMAGE).macs
    pruned = sk.apply(model, plan)
    assert sk.profile(pruned, IMAGE).macs <= 0.6 * before
    first, second, third, _ = widths(pruned)
    assert third / 20 < second / 10 < first / 10


def test_curves_explain_themselves():
    text = measured(space_of()).explain()
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:]}
    assert rows["2"] == ["10", "9", "0.09", "0.25", "0.49", "0.81"]
    assert "0.9" in text.splitlines()[0]


def test_curves_survive_a_file(tmp_path):
    curves = measured(space_of(), ratios=(0.3, 0.6))
    curves.save(tmp_path / "curves.json")
    assert SensitivityCurves.load(tmp_path / "curves.json") == curves


def test_a_plan_names_the_method_and_no_file(tmp_path):
    plan = sk.prune.plan(
        network(),
        IMAGE,
        ratio=0.5,
        round_to=1,
        allocation=Sensitivity(file=tmp_path / "curves.json", ratios=(0.5,)),
        evaluate=score,
    )
    assert plan.settings["allocation"] == "Sensitivity(ratios=(0.5,))"
