"""A search over settings of post-training quantization, judged without labels or by a metric."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slimkit as sk
from slimkit.errors import DataError, InputError
from slimkit.quantize import METHODS, OBSERVERS, Limit, ptq, search_settings
from slimkit.quantize.outputs.distance import OutputDistance, decibels
from slimkit.quantize.settings_search import arguments_of, settings_space
from slimkit.search import Choice, SearchError

Images = Callable[..., Tensor]


@pytest.fixture
def batches(images: Images) -> list[Tensor]:
    return [images(8, seed) for seed in range(4)]


@dataclass(frozen=True)
class Spoil:
    """Makes the first class more likely."""

    when: ClassVar[Literal["before", "after"]] = "after"
    amount: float = 1.0

    def run(self, work: Any) -> None:
        with torch.no_grad():
            work.quantized.model.fc.bias[0] += self.amount


def test_distances_by_hand(small: nn.Module, images: Images) -> None:
    x = images(6)
    q = ptq(small, x, calibration=x)
    distance = OutputDistance(small, [sk.Inputs((x[:4],)), sk.Inputs((x[4:],))])
    with torch.no_grad():
        before, after = small(x).double(), q(x).double()
    noise = float((after - before).square().sum() / before.square().sum())
    assert distance.noise(q) == pytest.approx(noise, rel=1e-4)
    assert distance.noise(small) == pytest.approx(0.0, abs=1e-10)
    assert decibels(0.01) == pytest.approx(20.0)
    p, logs = before.softmax(1), before.log_softmax(1) - F.log_softmax(after, 1)
    assert distance.divergence(q) == pytest.approx(float((p * logs).sum(1).mean()), rel=1e-3)


def test_the_best_trial_quantizes_best(
    poisoned: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    unrepaired = {"methods.bias_correction": Choice(False)}  # or the repair decides which is best
    space = {
        "granularity": Choice("tensor", "channel"),
        "observer": Choice("minmax", "percentile"),
        **unrepaired,
    }
    found = search_settings(
        poisoned, images(1), calibration=batches, space=space, trials=4, sampler="random"
    )
    assert found.objective == "sqnr"
    first = {"granularity": "channel", "observer": "minmax", "methods.bias_correction": False}
    assert found.result.trials[0].parameters == first
    assert found.settings["granularity"] == "channel"
    q = ptq(poisoned, images(1), calibration=batches[:3], **found.settings)
    distance = OutputDistance(poisoned, [sk.Inputs((batches[3],))])
    assert found.value == pytest.approx(decibels(distance.noise(q)), abs=1e-3)
    assert str(found).splitlines()[1].split()[0] == str(found.result.best.number)
    json.dumps(found.to_json())


@pytest.mark.parametrize("sampler", ["tpe", "genetic"])
def test_the_same_seed_gives_the_same_trials_after_a_kill_too(
    small: nn.Module, images: Images, batches: list[Tensor], tmp_path: Path, sampler: str
) -> None:
    def run(trials: int, seed: int = 0, storage: str | None = None) -> list[Any]:
        found = search_settings(
            small, images(1), calibration=batches, trials=trials, seed=seed, sampler=sampler,
            storage=None if storage is None else tmp_path / storage,
        )  # fmt: skip
        return [(trial.parameters, trial.value) for trial in found.result.trials]

    whole = run(5)
    assert run(3, storage="search.log") == whole[:3]
    assert run(5, storage="search.log") == whole
    assert run(5, seed=1) != whole
    with pytest.raises(InputError, match="calibration"):
        search_settings(
            small, images(1), calibration=batches[:3], space=settings_space(3), trials=5,
            sampler=sampler, storage=tmp_path / "search.log",
        )  # fmt: skip


def test_the_default_space_holds_what_is_registered(small: nn.Module) -> None:
    with METHODS.scratch():
        METHODS.register("spoil")(Spoil)
        space = settings_space(3)
    assert space["observer"] == Choice(*OBSERVERS.names())
    assert space["methods.spoil"] == Choice(False, True)
    assert "batches" not in settings_space(1)


def test_methods_and_their_settings_are_searched(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    with METHODS.scratch():
        METHODS.register("spoil")(Spoil)
        assert arguments_of({"methods.spoil": False, "methods.spoil.amount": 2.0}) == {
            "methods": []
        }
        assert arguments_of({"methods.spoil": True})["methods"] == ["spoil"]
        given = arguments_of({"methods.spoil": True, "methods.spoil.amount": 2.0})
        assert given["methods"] == [Spoil(2.0)]
        found = search_settings(
            small, images(1), calibration=batches, objective="kl", trials=4, sampler="random",
            space={"methods.spoil": Choice(True, False), "weight_bits": Choice(8, 3)},
        )  # fmt: skip
    assert found.settings == {"weight_bits": 8, "methods": []}
    assert {"kl", "sqnr"} == set(found.result.best.metrics)
    assert found.value == min(trial.value or 0.0 for trial in found.result.trials)


def test_every_trial_keeps_the_budget(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    space = {"observer": Choice("minmax", "percentile")}
    within, without = (
        search_settings(
            small, images(1), calibration=batches, space=space, trials=2, max_float=share
        )
        for share in (0.5, None)
    )
    assert within.value > without.value + 1
    q = ptq(
        small, images(1), calibration=batches[:3], limit=Limit(max_float=0.5), **within.settings
    )
    distance = OutputDistance(small, [sk.Inputs((batches[3],))])
    assert within.value == pytest.approx(decibels(distance.noise(q)), abs=1e-3)
    with pytest.raises(InputError, match="max_float"):
        search_settings(small, images(1), calibration=batches, space=space, max_float=10)


def test_a_metric_is_used_where_there_is_one(
    small: nn.Module, images: Images, batches: list[Tensor]
) -> None:
    found = search_settings(
        small, images(1), calibration=iter(batches), trials=2, sampler="random",
        space={"batches": Choice(1, 4)},
        evaluate=lambda q: float(max(a.high for a in q.activation_quantizers().values())),
    )  # fmt: skip
    assert found.objective == "metric"
    assert found.settings == {"batches": 4}


def test_what_cannot_be_is_said(small: nn.Module, images: Images, batches: list[Tensor]) -> None:
    def run(calibration: Any = batches, **options: Any) -> Any:
        return search_settings(small, images(1), calibration=calibration, trials=2, **options)

    with pytest.raises(DataError, match="one batch cannot be divided"):
        run(batches[:1])
    with pytest.raises(InputError, match="did you mean 'kl'"):
        run(objective="kll")
    for name in ("observers", "methods", "granularity.x"):
        with pytest.raises(InputError, match="no setting to search"):
            run(space={name: Choice("a", "b")})

    class Loader(list[Tensor]):
        role = "test"

    with pytest.raises(DataError, match="test data"):
        run(Loader(batches))

    def failing(model: nn.Module) -> float:
        raise RuntimeError("out of luck")

    with pytest.raises(SearchError, match="no evaluation succeeded"):
        _ = run(evaluate=failing).settings
