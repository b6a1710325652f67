"""Latency targets: the search on made-up clocks, one real clock, and what cannot be measured."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimkit as sk
from slimkit.errors import ExportError, InputError, PlanError, UnknownNameError
from slimkit.inputs import as_inputs
from slimkit.prune.latency_target import Bench

X = torch.zeros(1, 3, 8, 8)


def chain(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


@pytest.fixture
def model():
    return chain(64, 96, 128, 64).eval()


class Clock:
    """Stands for the bench: milliseconds as a function of the counts."""

    def __init__(self, monkeypatch, milliseconds, *, flattering=1.0, noise=0.0):
        self.measured: list[tuple[dict[str, int], int]] = []
        draw = random.Random(0)

        def call(bench, kept, repeats, seconds):
            macs = bench.space.cost(kept).macs / bench.space.cost().macs
            self.measured.append((dict(kept), repeats))
            share = milliseconds(kept, macs) * (flattering if repeats < 5 else 1.0)
            return [(10.0, 10.0 * share * (1 + draw.gauss(0, noise))) for _ in range(repeats)]

        monkeypatch.setattr(Bench, "__call__", call)

    @property
    def networks(self):
        return len({tuple(kept.values()) for kept, _ in self.measured})

    @property
    def sure(self):
        return [kept for kept, repeats in self.measured if repeats == 5]


def ratio_of(plan):
    before, after = plan.settings["measured_ms"]
    return after / before


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.6])
@pytest.mark.parametrize("fixed", [0.0, 0.25])
def test_the_result_is_at_most_five_percent_beyond_the_request(model, monkeypatch, fraction, fixed):
    clock = Clock(monkeypatch, lambda kept, macs: fixed + (1 - fixed) * macs)
    plan = sk.prune.plan(model, X, latency=fraction, round_to=4, progress=False)
    assert 0.95 * (1 - fraction) <= ratio_of(plan) <= 1 - fraction
    assert clock.networks <= 5
    # What the plan says was measured five times, and the plan is that network's.
    macs = plan.after.macs / plan.before.macs
    assert ratio_of(plan) == pytest.approx(fixed + (1 - fixed) * macs, abs=1e-4)
    assert len(clock.sure) == 1


def test_steps_of_the_kernels_are_not_taken_for_progress(model, monkeypatch):
    """Channels padded to 32: half of the counts are no faster than their neighbour."""

    def padded(kept, macs):
        wide = {name: -(-count // 32) * 32 for name, count in kept.items()}
        return sum(wide.values()) / 352

    clock = Clock(monkeypatch, padded)
    plan = sk.prune.plan(model, X, latency=0.3, round_to=8, progress=False)
    assert ratio_of(plan) <= 0.7
    assert clock.networks <= 10
    met = [padded(kept, 0) for kept, _ in clock.measured if padded(kept, 0) <= 0.7]
    assert ratio_of(plan) == pytest.approx(max(met), abs=1e-4)


def test_a_first_look_that_flatters_does_not_count(model, monkeypatch):
    clock = Clock(monkeypatch, lambda kept, macs: macs, flattering=0.96)
    plan = sk.prune.plan(model, X, latency=0.4, round_to=2, progress=False)
    assert len(clock.sure) > 1
    assert 0.57 <= ratio_of(plan) <= 0.6
    assert plan.after.macs <= 0.6 * plan.before.macs


def test_noise_is_measured_away(model, monkeypatch):
    clock = Clock(monkeypatch, lambda kept, macs: 0.1 + 0.9 * macs, noise=0.02)
    plan = sk.prune.plan(model, X, latency=0.4, round_to=2, progress=False)
    assert 0.57 <= ratio_of(plan) <= 0.6
    assert 0.1 + 0.9 * plan.after.macs / plan.before.macs <= 0.6 * 1.02
    assert clock.networks <= 10


def test_out_of_reach_says_how_far_one_can_go(model, monkeypatch):
    clock = Clock(monkeypatch, lambda kept, macs: 0.7 + 0.3 * macs)
    with pytest.raises(PlanError, match=r"at most 0\.\d+ can go .*in onnxruntime") as caught:
        sk.prune.plan(model, X, latency=0.5, progress=False)
    assert caught.value.where == "latency"
    assert 0.28 < float(str(caught.value).split("at most ")[1].split(" ")[0]) < 0.3
    assert clock.networks <= 5


def test_the_plan_says_what_was_measured(model, monkeypatch, tmp_path):
    Clock(monkeypatch, lambda kept, macs: macs)
    plan = sk.prune.plan(model, X, latency=0.4, round_to=4, threads=2, progress=False)
    assert plan.settings["latency"] == 0.4
    assert (plan.settings["backend"], plan.settings["threads"]) == ("onnxruntime", 2)
    after = plan.settings["measured_ms"][1]
    line = f"latency 10 → {after:.3g} ms (−{100 - 10 * after:.0f} %), measured in onnxruntime, "
    assert line + "2 threads" in plan.explain().splitlines()
    assert "measured_ms" not in plan.explain()
    assert sk.Plan.load(plan.save(tmp_path / "plan.json")) == plan


def test_macs_that_bring_no_milliseconds_are_a_warning(model, monkeypatch):
    Clock(monkeypatch, lambda kept, macs: 0.85 + 0.15 * macs)
    plan = sk.prune.plan(model, X, latency=0.1, round_to=4, progress=False)
    (warning,) = plan.settings["warnings"]
    assert "milliseconds fell by 1" in warning
    assert f"warning: {warning}" in plan.explain()


def test_progress_goes_to_standard_error(model, monkeypatch, capsys):
    Clock(monkeypatch, lambda kept, macs: macs)
    sk.prune.plan(model, X, latency=0.3, round_to=4)
    told = capsys.readouterr()
    assert "% MACs" in told.err
    assert not told.out


def test_a_real_clock_is_read(model, tmp_path):
    space = replace(sk.prune.space(model, X), measuring={"backend": "torch", "threads": 1})
    bench = Bench(space, tmp_path, lambda line: None)
    times = bench(space.fewest(), 2, 0.02)
    assert len(times) == 2
    assert all(before > 0 and after > 0 for before, after in times)
    assert not list(tmp_path.iterdir())  # nothing to export


def test_copies_are_exported_and_timed_in_the_runtime(model, tmp_path):
    space = sk.prune.space(model, X, round_to=32)
    lines: list[str] = []
    bench = Bench(space, tmp_path, lines.append)
    ((before, after),) = bench(space.fewest(), 1, 0.05)
    assert after > 0
    assert before > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.onnx", "1.onnx"]
    limits = bench._slowest(space.fewest())
    assert "Conv 3×3, 3→32" in limits or "Conv 3×3, 32→32" in limits
    bench(space.fewest(), 1, 0.01)
    assert len(list(tmp_path.iterdir())) == 2  # exported once


class Deciding(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else F.relu(x)


def test_a_network_that_cannot_be_exported_names_the_layer():
    layers = nn.Conv2d(3, 16, 3), Deciding(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3)
    model = nn.Sequential(*layers).eval()
    with pytest.raises(ExportError, match=r"cannot be exported: in 1, its forward") as caught:
        sk.prune.plan(model, X, latency=0.3, progress=False)
    assert caught.value.where == "latency"


def test_wrong_settings_of_the_clock_are_refused(model):
    with pytest.raises(UnknownNameError, match="'onnxruntime'"):
        sk.prune.plan(model, X, latency=0.3, backend="onxruntime")
    with pytest.raises(InputError, match="threads"):
        sk.prune.plan(model, X, latency=0.3, threads=0, backend="torch")
    with pytest.raises(InputError, match="latency"):
        sk.prune.plan(model, X, latency=1.5)


def test_the_inputs_of_a_detector_are_taken_as_they_are(tmp_path):
    class ListOfImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(16, 16)

        def forward(self, images):
            return [self.body(image[None]) for image in images]

    images = as_inputs(([torch.rand(3, 8, 8), torch.rand(3, 8, 8)],))
    space = sk.prune.space(ListOfImages().eval(), images)
    bench = Bench(space, tmp_path, lambda line: None)
    ((before, after),) = bench(space.fewest(), 1, 0.01)
    assert before > 0
    assert after > 0
