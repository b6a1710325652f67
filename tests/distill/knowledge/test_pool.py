"""A pool of teachers: parts of the samples, restarts elsewhere, nothing lost."""

from __future__ import annotations

import os
import sys

import numpy as np
import psutil
import pytest
import torch
from knowledge_helpers import ToyTeacher, batches, digits_splits, network, toy_record

from slimkit.distill.knowledge import (
    Knowledge,
    NetworkTeacher,
    OnlineTeacher,
    Patience,
    Question,
    TeacherPool,
    TeacherServer,
    ray_pool,
    serve,
)
from slimkit.errors import DataError, InputError, MissingDependencyError, TeacherError
from slimkit.tasks.data.samples import training_samples

QUICK = Patience(answer=1.0, lost=4.0)


def pool_of(servers: list[TeacherServer], samples: int = 64) -> TeacherPool:
    places = [lambda place=place: servers[place].address for place in range(len(servers))]
    return TeacherPool(np.arange(samples), places, patience=QUICK)


def test_an_uneven_division_loses_no_sample() -> None:
    servers = [serve(ToyTeacher(samples=10)) for _ in range(4)]
    pool = pool_of(servers, 10)
    assert [len(part) for part in pool.parts] == [3, 3, 2, 2]
    with Knowledge([pool]) as knowledge:
        for ids, answers in knowledge.stream(list(batches(10, 7)), 1):
            assert torch.equal(answers["logits"], toy_record(ids, 1, 3))
    for server, part in zip(servers, pool.parts, strict=True):
        asked = np.concatenate(server.teacher.asked)
        assert sorted(asked) == part.tolist()
        server.close()


def test_more_teachers_than_samples() -> None:
    servers = [serve(ToyTeacher(samples=2)) for _ in range(3)]
    pool = pool_of(servers, 2)
    assert [len(part) for part in pool.parts] == [1, 1]
    (found,) = pool.stream([Question(np.array([1, 0]))], 0, ["logits"])
    assert torch.equal(found["logits"], toy_record(np.array([1, 0]), 0, 3))
    with pytest.raises(DataError, match="no sample 2"):
        list(pool.stream([Question(np.array([1, 2]))], 0, ["logits"]))
    for server in servers:
        server.close()


def test_a_teacher_that_dies_is_found_at_its_next_address() -> None:
    servers = [serve(ToyTeacher()), serve(ToyTeacher())]
    pool = pool_of(servers)
    wanted = [Question(ids) for ids in batches(64, 8)]
    answers = []
    for number, answer in enumerate(pool.stream(wanted, 0, ["logits"])):
        answers.append(answer["logits"])
        if number == 2:
            servers[1].close()
            servers[1] = serve(ToyTeacher())
    for asked, found in zip(wanted, answers, strict=True):
        assert torch.equal(found, toy_record(asked.ids, 0, 3))
    servers[0].close()
    servers[0] = serve(ToyTeacher(teacher="another"))
    with pytest.raises((DataError, TeacherError), match="another teacher"):
        list(pool.stream(wanted, 0, ["logits"]))
    for server in servers:
        server.close()


def test_a_pool_can_be_served_as_one_teacher() -> None:
    servers = [serve(ToyTeacher()) for _ in range(3)]
    with serve(pool_of(servers)) as gate, Knowledge([gate.address], patience=QUICK) as knowledge:
        for ids, answers in knowledge.stream(list(batches(64, 10)), 2):
            assert torch.equal(answers["logits"], toy_record(ids, 2, 3))
    for server in servers:
        server.close()


def test_teachers_of_a_pool_know_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(OnlineTeacher, "close", lambda teacher: closed.append(teacher.name))
    with (
        serve(ToyTeacher()) as one,
        serve(ToyTeacher(teacher="other")) as other,
        pytest.raises(DataError, match=f"{other.address}: it is another teacher"),
    ):
        pool_of([one, other])
    assert closed == [one.address, other.address]
    with pytest.raises(InputError, match="needs a teacher"):
        TeacherPool(np.arange(3), [])


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"slimkit\[distributed\]"):
        ray_pool(small_teacher, 2)


def small_teacher() -> NetworkTeacher:
    samples = training_samples(digits_splits())
    return NetworkTeacher(network(1), samples, dtype="float32", precision="fp32", batch_size=4)


def test_a_ray_cluster_serves_parts_and_restarts_what_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray", reason="pip install 'slimkit[distributed]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # actors import this file
    local = small_teacher()
    expected = network(1).eval()(local.samples.inputs(local.samples.ids, 0)).detach()
    try:
        pool = ray_pool(small_teacher, 2, insecure=True, patience=Patience(5.0, 60.0))
        questions = [Question(ids) for ids in np.array_split(local.ids, 6)]
        answers, killed = [], 0
        for number, answer in enumerate(pool.stream(questions, 0, ["logits"])):
            answers.append(answer["logits"])
            if number == 1:  # every teacher of the pool
                for process in psutil.process_iter():
                    if _command(process).startswith("ray::_Worker"):
                        process.kill()
                        killed += 1
        assert killed == 2
        torch.testing.assert_close(torch.cat(answers), expected)
        pool.close()
    finally:
        ray.shutdown()


def test_actors_that_find_no_place_are_an_error() -> None:
    ray = pytest.importorskip("ray", reason="pip install 'slimkit[distributed]'")
    try:
        with pytest.raises(TeacherError, match="has not started within 2 s") as caught:
            ray_pool(
                small_teacher,
                1,
                insecure=True,
                patience=Patience(1.0, 2.0),
                actor_options={"num_cpus": 100_000},
            )
        assert "num_cpus" in caught.value.hint
    finally:
        ray.shutdown()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
