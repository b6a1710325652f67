"""Random choices of one network replayed into the other one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimkit.distill import L1, Delivery, Distiller
from slimkit.errors import InputError, ModelError, UnknownNameError


def drawn(like: Tensor) -> Tensor:
    """The random choice of both networks."""
    return torch.rand_like(like)


class Noisy(nn.Module):
    """Adds random numbers to its features, as often as it is told."""

    def __init__(self, width: int = 6, draws: int = 2) -> None:
        super().__init__()
        self.body = nn.Linear(4, width)
        self.fc = nn.Linear(width, 3)
        self.draws = draws
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = []
        for _ in range(self.draws):
            noise = drawn(x)
            self.seen.append(noise.clone())
            x = x + noise.mul_(2)  # in place: what was delivered must not change with it
        return self.fc(self.body(x))


class Watched(Noisy):
    """Remembers across deep copies what it drew."""

    log: list[list[Tensor]] = []  # noqa: RUF012 - shared by the copies on purpose

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        self.log.append(self.seen)
        return outputs


HERE = f"{__name__}:drawn"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


@pytest.fixture(autouse=True)
def _forget() -> None:
    Watched.log.clear()


@pytest.mark.parametrize("delivery", [HERE, Delivery(function=HERE, source="student")])
def test_both_networks_draw_the_same_in_order(delivery: Any, x: Tensor) -> None:
    student = Noisy()
    with Distiller(student, Watched(8), [L1()], deliveries=[delivery]) as distiller:
        for _ in range(2):
            outputs = student(x)
            distiller.loss(x, outputs).backward()
            ours, theirs = student.seen, Watched.log[-1]
            assert len(ours) == len(theirs) == 2
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert not torch.equal(ours[0], ours[1])
    assert distiller.precision == "fp32"


def test_without_delivery_they_draw_apart(x: Tensor) -> None:
    student = Noisy()
    with Distiller(student, Watched(8), [L1()], precision="fp32") as distiller:
        distiller.loss(x, student(x))
    assert not torch.equal(student.seen[0], Watched.log[-1][0])


def test_a_teacher_that_runs_ahead_gives_the_loss_of_the_same_draws(x: Tensor) -> None:
    """With the student's weights the teacher says the same, so nothing is left to learn."""
    student = Noisy()
    with Distiller(student, student, [L1()], deliveries=[HERE]) as distiller:
        assert distiller.loss(x, student(x)).item() == pytest.approx(0, abs=1e-6)


def test_an_evaluation_between_two_steps_draws_for_itself(x: Tensor) -> None:
    student = Noisy()
    with Distiller(student, Watched(8), [L1()], deliveries=[HERE]) as distiller:
        distiller.loss(x, student(x))
        runs = len(Watched.log)
        with torch.no_grad():
            student(x)
        assert len(Watched.log) == runs
        assert not torch.equal(student.seen[0], Watched.log[-1][0])


def test_the_function_is_itself_again_even_after_an_error(x: Tensor) -> None:
    before = drawn
    student = Noisy()
    with Distiller(student, Noisy(8), [L1()], deliveries=[HERE]) as distiller:
        distiller.loss(x, student(x))
        assert globals()["drawn"] is before
        with pytest.raises(RuntimeError, match="shapes"):
            student(torch.randn(5, 4, 4)[:, :, :3])
        assert globals()["drawn"] is before
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


@pytest.mark.parametrize(
    ("source", "ours", "theirs", "words"),
    [
        ("teacher", 2, 1, "called more often than the teacher"),
        ("teacher", 1, 2, "the student called it 1 times less often"),
        ("student", 1, 2, "called more often than the student"),
        ("student", 2, 1, "the teacher called it 1 times less often"),
    ],
)
def test_calls_that_do_not_pair_up_are_an_error(
    source: Any, ours: int, theirs: int, words: str, x: Tensor
) -> None:
    student = Noisy(draws=ours)
    delivery = Delivery(function=HERE, source=source)
    with (
        Distiller(student, Noisy(8, draws=theirs), [L1()], deliveries=[delivery]) as distiller,
        pytest.raises(ModelError, match=words),
    ):
        distiller.loss(x, student(x))


class Paused(Noisy):
    """Lets another thread go on in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        self.inside.set()
        assert self.go_on.wait(30)
        return outputs


def test_other_threads_draw_for_themselves_or_are_told_one_at_a_time(x: Tensor) -> None:
    student = Paused()
    delivery = Delivery(function=HERE, source="student")
    with (
        Distiller(student, Watched(8), [L1()], deliveries=[delivery]) as distiller,
        ThreadPoolExecutor(1) as pool,
    ):
        job = pool.submit(student, x)
        assert student.inside.wait(30)
        try:
            drawn(x)  # would be delivered to the teacher
            with pytest.raises(ModelError, match="one at a time"):
                student(x)
        finally:
            student.go_on.set()
        distiller.loss(x, job.result())
        assert all(map(torch.equal, student.seen, Watched.log[-1]))


def test_students_of_two_threads_get_the_draws_of_their_own_teachers(x: Tensor) -> None:
    def seen_and_taught(_: int) -> bool:
        student, teacher = Noisy(), Noisy()
        with Distiller(student, teacher, [L1()], deliveries=[HERE]) as distiller:
            for _step in range(20):
                distiller.loss(x, student(x))
        return True

    before = drawn
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(seen_and_taught, range(4)))
    assert globals()["drawn"] is before


def test_mistakes_are_typed() -> None:
    with pytest.raises(UnknownNameError, match="'drawn'"):
        Distiller(Noisy(), Noisy(), [L1()], deliveries=[f"{__name__}:drown"])
    with pytest.raises(InputError, match="function: 'drawn' is no import path"):
        Delivery(function="drawn")
    with pytest.raises(InputError, match=r"deliveries\.0\.function: 'drawn' is no import path"):
        Distiller(Noisy(), Noisy(), [L1()], deliveries=["drawn"])
    with pytest.raises(InputError, match=r"deliveries\.0\.sorce"):
        Distiller(Noisy(), Noisy(), [L1()], deliveries=[{"function": HERE, "sorce": "student"}])
    both = [HERE, Delivery(function="torch:relu", source="student")]
    with pytest.raises(InputError, match="waits for the other"):
        Distiller(Noisy(), Noisy(), [L1()], deliveries=both)
    with pytest.raises(InputError, match="one teacher, not 2"):
        Distiller(Noisy(), [Noisy(), Noisy()], [L1()], deliveries=[HERE])
