"""Several teachers through one iterator: matched by number, merged or united, each sample once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from knowledge_helpers import ToyTeacher, batches, toy_record
from torch import Tensor

from slimkit.distill.knowledge import Knowledge, Patience, Question, dump, serve
from slimkit.distill.knowledge.merging import merge
from slimkit.errors import DataError, InputError, TeacherError

QUICK = Patience(answer=2.0, lost=3.0)


class ListedTeacher(ToyTeacher):
    """A toy teacher that can be dumped: it lists its samples."""

    @property
    def ids(self) -> np.ndarray:
        return np.arange(self.schema.samples)


def test_three_teachers_of_different_batch_sizes_are_matched_by_number(tmp_path: Path) -> None:
    dump(ListedTeacher(scale=7.0, batch_size=11), tmp_path / "k", passes=3, shard_rows=20)
    with (
        serve(ToyTeacher(scale=1.0, batch_size=5)) as one,
        serve(ToyTeacher(scale=1.0, batch_size=32)) as other,
        Knowledge(
            [one.address, other.address, f"file:{tmp_path / 'k'}"],
            merge="sum",
            patience=QUICK,
        ) as knowledge,
    ):
        assert knowledge.passes == 3
        for epoch in range(4):
            seen: Counter[int] = Counter()
            for ids, answers in knowledge.stream(list(batches(64, 6, seed=epoch)), epoch):
                seen.update(ids.tolist())
                assert torch.equal(answers["logits"], toy_record(ids, 3 * (epoch % 3), 3, 9.0))
            assert seen == Counter(range(64))


def test_keys_that_one_teacher_has_are_united() -> None:
    with (
        serve(ToyTeacher()) as one,
        serve(ToyTeacher(key="layer3", classes=5)) as other,
        Knowledge([one.address, other.address], patience=QUICK) as knowledge,
    ):
        assert knowledge.names == ("logits", "layer3")
        for _, answers in knowledge.stream(list(batches(64, 16))):
            assert answers["logits"].shape == (16, 3)
            assert answers["layer3"].shape == (16, 5)
        ((_, some),) = knowledge.stream([np.arange(4)], names=["layer3"])
        assert list(some) == ["layer3"]
        with pytest.raises(DataError, match="did you mean 'layer3'"):
            next(knowledge.stream([np.arange(4)], names=["layer33"]))


def test_rules_of_merging_by_hand() -> None:
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert torch.equal(merge([sure, unsure], "mean", "k", [0, 1]), torch.tensor([[5.0, 0.0]]))
    assert torch.equal(merge([sure, unsure], "sum", "k", [0, 1]), torch.tensor([[10.0, 0.0]]))
    assert torch.equal(merge([sure, unsure], [3, 1], "k", [0, 1]), torch.tensor([[7.5, 0.0]]))
    assert torch.equal(merge([sure, unsure], [9, 3, 1], "k", [1, 2]), torch.tensor([[7.5, 0.0]]))
    p = torch.softmax(sure, 1)[0, 0]
    found = merge([sure, unsure], "confidence", "k", [0, 1])
    torch.testing.assert_close(found[0, 0], 10 * p / (p + 0.5))
    mixed = {"k": "sum"}
    assert merge([sure, unsure], mixed, "k", [0, 1])[0, 0] == 10
    assert merge([sure, unsure], mixed, "other", [0, 1])[0, 0] == 5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("median", "there is no rule 'median'"),
        ([1.0], "expected 2 weights"),
        ([1.0, -1.0], "expected 2 weights"),
        ([0.0, 0.0], "all weights are 0"),
        ({"logit": "sum"}, "no teacher knows 'logit'.*'logits'"),
    ],
)
def test_a_rule_that_cannot_be_followed(rule: object, message: str) -> None:
    sources = [ListSource("one"), ListSource("two")]
    with pytest.raises(InputError, match=message):
        Knowledge(sources, merge=rule)


def test_somebody_must_count_who_knows_a_key() -> None:
    other = ListSource("other")
    other.schema = ToyTeacher(key="layer3").schema
    sources = [other, ListSource("one"), ListSource("two")]
    with pytest.raises(InputError, match="all teachers that know logits have weight 0"):
        Knowledge(sources, merge=[1.0, 0.0, 0.0])
    Knowledge(sources, merge=[0.0, 0.0, 1.0])  # layer3 comes from one alone, whatever it weighs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 4}, r"the shape of logits is not that of .*\(4,\), it is \(3,\)"),
        ({"samples": 65}, "the number of samples is not that of"),
        ({"fingerprint": "other"}, "the data is not that of"),
        ({"seed": 1}, "the seed is not that of"),
    ],
)
def test_teachers_that_do_not_fit_each_other_are_named(
    changes: dict[str, object], message: str
) -> None:
    with (
        serve(ToyTeacher()) as one,
        serve(ToyTeacher(**changes)) as other,
        pytest.raises(DataError, match=f"{other.address}: {message}"),
    ):
        Knowledge([one.address, other.address], patience=QUICK)


def test_places_that_are_none() -> None:
    with pytest.raises(InputError, match="did you mean 'file'"):
        Knowledge(["fil:knowledge"])
    with pytest.raises(InputError, match="at least one teacher"):
        Knowledge([])
    with pytest.raises(DataError, match=r"no index\.json"):
        Knowledge(["file:/nowhere"])


class ListSource:
    """A source of one's own, which may misbehave."""

    def __init__(self, name: str, *, stop: int | None = None, rows: int = 0, more: int = 0) -> None:
        self.name, self.stop, self.rows, self.more = name, stop, rows, more
        self.schema = ToyTeacher().schema
        self.closed = False

    def stream(
        self, questions: Iterable[Question], number: int, names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        for position, question in enumerate(questions):
            if position == self.stop:
                return
            ids = question.ids[self.rows :]
            yield {"logits": toy_record(ids, number, 3)}
        for _ in range(self.more):
            yield {"logits": torch.zeros(1, 3)}

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"stop": 2}, "bad: it ended after 2 of 8 batches"),
        ({"rows": 1}, "bad: it answered about 7 of 8 samples"),
        ({"more": 1}, "bad: it goes on after all 8 batches"),
    ],
)
def test_a_teacher_of_another_length_is_an_error_that_names_it(
    fault: dict[str, int], message: str
) -> None:
    bad = ListSource("bad", **fault)
    with (
        Knowledge([ListSource("good"), bad]) as knowledge,
        pytest.raises(TeacherError, match=message),
    ):
        list(knowledge.stream(list(batches(64, 8))))
    assert bad.closed


def test_a_new_stream_ends_the_one_before() -> None:
    with Knowledge([ListSource("one")]) as knowledge:
        first = knowledge.stream(list(batches(64, 8)))
        next(first)
        second = knowledge.stream(list(batches(64, 8)), 1)
        assert len(list(second)) == 8
        with pytest.raises(TeacherError, match="a newer stream"):
            list(first)
