"""The distiller inside the training loop of the library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distill_helpers import Batches, network
from torch import Tensor

from slimkit.distill import KD, Distiller, Mimic
from slimkit.errors import CheckpointError, InputError
from slimkit.train import TrainSettings, fit


class Anonymous(Batches):
    """Does not know which samples it yields."""

    with_ids = None  # type: ignore[assignment]


class Numbered(Batches):
    """Yields the numbers of its samples unasked."""

    def __iter__(self) -> Iterator[Any]:
        return self.with_ids()


class KilledError(Exception):
    """Stands for a killed process."""


PLAIN: list[Any] = [KD(temperature=2), Mimic(student="2")]
REMEMBERING: list[Any] = [
    {"type": "crd", "student": {"module": "5", "part": "input"}, "samples": 32, "negatives": 8,
     "size": 4},
    {"type": "mgd", "student": "2", "schedule": "cosine"},
    {"type": "dkd", "schedule": {"stop_epoch": 2}},
]  # fmt: skip


def trained(
    checkpoint: Path, *, losses: list[Any] = PLAIN, stop_after: int | None = None
) -> dict[str, Tensor]:
    student, teacher = network(4), network(8)
    example = torch.zeros(1, 3, 6, 6)
    steps = 0
    with Distiller(student, teacher, losses, example_inputs=example) as distiller:

        class Term:
            """The distiller, until the process is killed."""

            parameters = distiller.parameters
            state_dict = distiller.state_dict
            load_state_dict = distiller.load_state_dict
            needs = distiller.needs

            def __call__(self, context: object) -> Tensor:
                nonlocal steps
                steps += 1
                if steps == stop_after:
                    raise KilledError
                return distiller(context)  # type: ignore[arg-type]

        settings = TrainSettings(epochs=3, lr=0.05, precision="fp32", ema=0.9)
        fit(
            student,
            Batches(),
            loss_fn=F.cross_entropy,
            settings=settings,
            losses=[Term()],
            checkpoint=checkpoint,
            progress=False,
        )
        return {**student.state_dict(), **distiller.state_dict()}


@pytest.mark.parametrize("losses", [PLAIN, REMEMBERING], ids=["plain", "remembering"])
def test_a_resumed_run_ends_like_an_undisturbed_one(losses: list[Any], tmp_path: Path) -> None:
    """With memories, random masks and weights that follow a schedule, too."""
    whole = trained(tmp_path / "whole", losses=losses)
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", losses=losses, stop_after=7)
    resumed = trained(tmp_path / "killed", losses=losses)
    assert whole.keys() == resumed.keys()
    different = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert different == []


def test_the_connector_is_trained(tmp_path: Path) -> None:
    with Distiller(
        network(4), network(8), [Mimic(student="2")], example_inputs=torch.zeros(1, 3, 6, 6)
    ) as fresh:
        before = fresh.state_dict()
    after = trained(tmp_path / "run")
    pairs = zip(
        [value for key, value in before.items() if key.endswith("weight")],
        [value for key, value in after.items() if key.startswith("connectors") and "weight" in key],
        strict=True,
    )
    assert all(not torch.equal(a, b) for a, b in pairs)


def test_the_state_carries_the_teachers_precision() -> None:
    images = torch.randn(4, 3, 6, 6)
    with Distiller(network(4), network(8), [KD()], precision="bf16") as first:
        state = first.state_dict()
    student = network(4)
    with Distiller(student, network(8), [KD()]) as second:
        second.load_state_dict(state)
        second.loss(images, student(images))
        assert second.precision == "bf16"


def test_the_state_of_another_distiller_is_refused() -> None:
    example = torch.zeros(1, 3, 6, 6)
    with (
        Distiller(network(4), network(8), [Mimic(student="2")], example_inputs=example) as one,
        Distiller(network(4), network(16), [Mimic(student="2")], example_inputs=example) as two,
    ):
        with pytest.raises(CheckpointError):
            two.load_state_dict(one.state_dict())
        with pytest.raises(CheckpointError):
            two.load_state_dict({})


@pytest.mark.parametrize("loader", [Batches, Numbered])
def test_the_loop_hands_on_the_numbers_of_the_samples(loader: type[Batches]) -> None:
    seen: list[Any] = []

    class Term:
        def needs(self, argument: str) -> bool:
            return argument == "ids"

        def __call__(self, context: Any) -> Tensor:
            seen.append(context.ids)
            return torch.zeros(())

    settings = TrainSettings(epochs=1, precision="fp32")
    student = network(4)
    fit(student, loader(), loss_fn=F.cross_entropy, settings=settings, losses=[Term()],
        progress=False)  # fmt: skip
    assert torch.equal(torch.cat(seen), torch.arange(32))


def test_ids_that_the_loader_does_not_know_are_missed_with_a_reason() -> None:
    student, example = network(4), torch.zeros(1, 3, 6, 6)
    with (
        Distiller(student, network(8), REMEMBERING, example_inputs=example) as distiller,
        pytest.raises(InputError, match=r"losses\.0: the loss 'crd' needs ids .*loader"),
    ):
        fit(student, Anonymous(), loss_fn=F.cross_entropy, losses=[distiller], progress=False,
            settings=TrainSettings(epochs=1, precision="fp32"))  # fmt: skip
