"""What a model is called with, and what a loader yields."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

import slimkit as sk
from slimkit.inputs import Batch, Inputs, as_batch, join

IMAGES = torch.arange(4 * 3 * 2 * 2.0).reshape(4, 3, 2, 2)
LABELS = torch.arange(4)
IDS = torch.arange(10, 14)
WORDS = {"input_ids": torch.zeros(4, 5, dtype=torch.long), "attention_mask": torch.ones(4, 5)}


def test_inputs_are_split_where_examples_can_be_told_apart() -> None:
    pair = sk.Inputs((torch.arange(5.0), torch.arange(10.0).reshape(5, 2)))
    parts = pair.split(2)
    assert [part.examples for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.args[1] for part in parts]), pair.args[1])
    apart = sk.Inputs((torch.zeros(5), torch.zeros(3)))
    (whole,) = apart.split(2)
    assert whole is apart


def test_a_list_counts_by_its_length_and_is_split_into_lists() -> None:
    images = [torch.zeros(3, 8, 6), torch.zeros(3, 5, 9)]
    inputs = Inputs((images,))
    assert inputs.examples == 2
    first, second = inputs.split(1)
    assert first.args[0] == images[:1]
    assert second.args[0] == images[1:]


def test_numbers_beside_tensors_neither_count_nor_are_split() -> None:
    inputs = Inputs((IMAGES, 0.5, None), {"scale": torch.tensor(2.0), "mode": "nearest"})
    assert inputs.examples == 4
    part = inputs.split(3)[1]
    assert part.args[0].shape[0] == 1
    assert part.args[1:] == (0.5, None)
    assert part.kwargs["scale"] is inputs.kwargs["scale"]


def test_nested_tensors_are_not_counted() -> None:
    assert Inputs(((torch.zeros(4, 2), torch.zeros(4, 3)),)).examples is None
    assert Inputs(({"image": torch.zeros(4, 2)},)).examples is None


@pytest.mark.parametrize(
    ("item", "args", "kwargs", "targets", "ids"),
    [
        (IMAGES, 1, (), None, None),
        ((IMAGES,), 1, (), None, None),
        ((IMAGES, LABELS), 1, (), LABELS, None),
        ([IMAGES, LABELS], 1, (), LABELS, None),
        ((IMAGES, LABELS, IDS), 1, (), LABELS, IDS),
        (WORDS, 0, ("input_ids", "attention_mask"), None, None),
        ((WORDS, LABELS), 0, ("input_ids", "attention_mask"), LABELS, None),
        ((UserDict(WORDS), LABELS), 0, ("input_ids", "attention_mask"), LABELS, None),
        (((IMAGES, IMAGES), LABELS), 2, (), LABELS, None),
        (([IMAGES[0], IMAGES[1]], [{}, {}]), 1, (), [{}, {}], None),
        (Inputs((IMAGES,)), 1, (), None, None),
        ((Inputs((IMAGES,), {"x": IMAGES}), LABELS), 1, ("x",), LABELS, None),
    ],
)
def test_what_loaders_yield(item: Any, args: int, kwargs: Any, targets: Any, ids: Any) -> None:
    batch = as_batch(item)
    assert len(batch.inputs.args) == args
    assert tuple(batch.inputs.kwargs) == kwargs
    assert batch.targets is targets or batch.targets == targets
    assert batch.ids is ids


def test_what_an_example_tells_about_an_item() -> None:
    two = Inputs((IMAGES, IMAGES))
    assert as_batch((IMAGES, IMAGES), two).targets is None
    assert as_batch((IMAGES, IMAGES, LABELS), two).targets is LABELS
    assert as_batch(((IMAGES, IMAGES), LABELS), two).targets is LABELS
    labelled = {**WORDS, "labels": LABELS}
    words = Inputs((), WORDS)
    assert set(as_batch(labelled, words).inputs.kwargs) == set(WORDS)
    assert set(as_batch((labelled, LABELS), words).inputs.kwargs) == set(WORDS)
    images = [IMAGES[0], IMAGES[1]]
    detector = Inputs((images,))
    assert as_batch(images, detector).inputs.args[0] is images
    assert as_batch((images,), detector).inputs.args[0] is images
    assert as_batch((images, [{}, {}]), detector).targets == [{}, {}]


@pytest.mark.parametrize("item", [None, 3, "image", (), (IMAGES, LABELS, IDS, IDS), object()])
def test_what_is_no_batch_is_an_error_that_says_what_it_is(item: Any) -> None:
    with pytest.raises(sk.errors.InputError, match=r"expected a tensor.*got a") as raised:
        as_batch(item, where="calibration")
    assert raised.value.where == "calibration"


def test_targets_of_any_structure_are_moved_and_split_alike() -> None:
    boxes = [{"boxes": torch.ones(i, 4)} for i in range(4)]
    batch = Batch(Inputs((IMAGES,)), {"boxes": boxes, "scale": 2.0, "map": IMAGES[:, 0]}, IDS)
    moved = batch.to("meta")
    assert moved.targets["boxes"][3]["boxes"].device.type == "meta"
    assert moved.ids is not None
    assert moved.ids.device.type == "meta"
    parts = batch.split(3)
    assert [part.size for part in parts] == [3, 1]
    assert parts[1].targets["boxes"] == boxes[3:]
    assert parts[1].targets["scale"] == 2.0
    assert torch.equal(parts[1].targets["map"], IMAGES[3:, 0])
    assert torch.equal(parts[1].ids, IDS[3:])


def test_joining_is_the_inverse_of_splitting() -> None:
    targets = {"boxes": [{"boxes": torch.ones(i, 4)} for i in range(4)], "label": LABELS}
    batch = Batch(Inputs((IMAGES,), {"mask": IMAGES[:, 0], "scale": 2.0}), targets, IDS)
    joined = join(batch.split(1))
    assert torch.equal(joined.inputs.args[0], IMAGES)
    assert torch.equal(joined.inputs.kwargs["mask"], IMAGES[:, 0])
    assert joined.inputs.kwargs["scale"] == 2.0
    assert [len(entry["boxes"]) for entry in joined.targets["boxes"]] == [0, 1, 2, 3]
    assert torch.equal(joined.targets["label"], LABELS)
    assert torch.equal(joined.ids, IDS)


def test_batches_that_are_not_alike_are_not_joined() -> None:
    one = Batch(Inputs((IMAGES,)))
    with pytest.raises(sk.errors.InputError, match="not alike"):
        join([one, Batch(Inputs((IMAGES[:, :, :1],)))])
    with pytest.raises(sk.errors.InputError, match="no batch"):
        join([])


def test_images_get_the_layout_and_the_rest_keeps_its_own() -> None:
    moved = Batch(Inputs((IMAGES, LABELS))).to("cpu", layout=torch.channels_last)
    assert moved.inputs.args[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.inputs.args[0], IMAGES)
    assert torch.equal(moved.inputs.args[1], LABELS)
