"""A student that learns from knowledge: like one with its teacher beside it, killed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from knowledge_helpers import digits_splits, network
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.distill import KD, Distiller, Mimic
from slimkit.distill.knowledge import Knowledge, KnowledgeDistiller, NetworkTeacher, dump, serve
from slimkit.errors import CheckpointError, DataError, ModelError, UnknownNameError
from slimkit.tasks.data.samples import training_samples
from slimkit.train import TrainSettings, fit

SETTINGS = TrainSettings(epochs=3, lr=0.05, precision="fp32")


class KilledError(Exception):
    """Stands for a killed process."""


def trained(
    places: list[str],
    losses: list[object],
    *,
    checkpoint: Path | None = None,
    stop_after: int | None = None,
) -> tuple[nn.Module, str | None]:
    splits, student = digits_splits(), network(5)
    with (
        Knowledge(places) as knowledge,
        KnowledgeDistiller(
            student,
            knowledge,
            losses,
            splits.train,
            example_inputs=torch.zeros(1, *splits.shape),
            audit=True,
        ) as distiller,
    ):
        steps = 0

        class Term:
            """The distiller, until the process is killed."""

            parameters = staticmethod(distiller.parameters)
            state_dict = staticmethod(distiller.state_dict)
            load_state_dict = staticmethod(distiller.load_state_dict)

            def __call__(self, context: object) -> Tensor:
                nonlocal steps
                steps += 1
                if steps == stop_after:
                    raise KilledError
                return distiller(context)

        fit(
            student, splits.train, loss_fn=F.cross_entropy, settings=SETTINGS, losses=[Term()],
            checkpoint=checkpoint, seed=2, progress=False,
        )  # fmt: skip
        return student, distiller.digest


def test_knowledge_teaches_what_the_teacher_itself_would(tmp_path: Path) -> None:
    net = network(1)
    samples = training_samples(digits_splits(), seed=2)
    teacher = NetworkTeacher(net, samples, ("logits", "0"), dtype="float32", precision="fp32")
    dump(teacher, tmp_path / "k", passes=3)
    losses = [KD(temperature=2), Mimic(student="0", connector="conv1x1", weight=0.1)]
    files, _ = trained([f"file:{tmp_path / 'k'}"], losses)
    with serve(teacher) as server:
        online, _ = trained([server.address], losses)
    splits, student = digits_splits(), network(5)
    splits.train.fix_changes(2)
    example = torch.zeros(1, *splits.shape)
    with Distiller(student, net, losses, example_inputs=example, precision="fp32") as distiller:
        fit(
            student, splits.train, loss_fn=F.cross_entropy, settings=SETTINGS, losses=[distiller],
            seed=2, progress=False,
        )  # fmt: skip
    for name, value in student.state_dict().items():
        torch.testing.assert_close(files.state_dict()[name], value, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(online.state_dict()[name], value, atol=2e-4, rtol=1e-3)


def test_a_killed_and_resumed_student_uses_the_same_knowledge(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    with serve(teacher) as server:
        dump(teacher, tmp_path / "k", passes=2)
        places = [server.address, f"file:{tmp_path / 'k'}"]
        whole, digest = trained(places, [KD()], checkpoint=tmp_path / "whole.safetensors")
        for stop in (3, 8):
            with pytest.raises(KilledError):
                trained(places, [KD()], checkpoint=tmp_path / "cut.safetensors", stop_after=stop)
        again, digest_again = trained(places, [KD()], checkpoint=tmp_path / "cut.safetensors")
    assert digest == digest_again
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_loader_that_yields_other_samples_is_noticed(
    teacher: NetworkTeacher, tmp_path: Path
) -> None:
    dump(teacher, tmp_path / "k")
    splits, student = digits_splits(), network(5)
    with Knowledge([f"file:{tmp_path / 'k'}"]) as knowledge:
        term = KnowledgeDistiller(student, knowledge, [KD()], splits.train)
        batches = iter(splits.train)
        next(batches)
        next(batches)
        with pytest.raises(DataError, match="other samples than it announced for epoch 0"):
            term.take(0)
        term.close()


def test_misfits_are_found_before_training(teacher: NetworkTeacher, tmp_path: Path) -> None:
    dump(teacher, tmp_path / "k")
    splits = digits_splits()
    example = torch.zeros(1, *splits.shape)
    with Knowledge([f"file:{tmp_path / 'k'}"]) as knowledge:
        with pytest.raises(ModelError, match=r"the student has 7 classes, the teachers? 10"):
            KnowledgeDistiller(
                network(5, 7), knowledge, [KD()], splits.train, example_inputs=example
            )
        with pytest.raises((DataError, UnknownNameError), match="'0'"):
            KnowledgeDistiller(network(5), knowledge, [Mimic(student="0")], splits.train)
        term = KnowledgeDistiller(network(5), knowledge, [KD()], splits.train)
        with pytest.raises(CheckpointError, match="another audit"):
            term.load_state_dict({"digest": torch.zeros(32, dtype=torch.uint8)})
