"""Batches repeat by (seed, epoch), and random changes are what their names say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.tasks.data import ArrayLoader, AugmentSettings
from slimkit.tasks.data.augmentation import Draws, augment, draw
from slimkit.tasks.data.splitting import stratified

EVERYTHING = AugmentSettings(crop=2, flip=True, scale=0.5, cutout=3)


def images(count: int = 20, size: int = 8, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, size, size, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def loader(**kwargs: object) -> ArrayLoader:
    options = {"batch_size": 6, "role": "train", "shuffle": True, "augment": EVERYTHING, **kwargs}
    return ArrayLoader(images(), torch.arange(20), **options)  # type: ignore[arg-type]


def epoch(source: ArrayLoader, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    source.set_epoch(number)
    pixels, labels = zip(*source, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def test_an_epoch_repeats_exactly_and_epochs_differ() -> None:
    first, second = loader(seed=3), loader(seed=3)
    a, b = epoch(first, 2), epoch(second, 2)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(epoch(first, 1)[1], a[1])
    first.set_seed(4)
    assert not torch.equal(epoch(first, 2)[1], a[1])


def test_global_random_state_plays_no_part() -> None:
    torch.manual_seed(1)
    a = epoch(loader(), 0)[0]
    torch.manual_seed(2)
    assert torch.equal(a, epoch(loader(), 0)[0])


def test_every_image_comes_once() -> None:
    assert epoch(loader(), 5)[1].sort().values.tolist() == list(range(20))


def test_ids_are_places_in_the_labels_and_change_nothing_else() -> None:
    source = loader(indices=torch.tensor([9, 3, 5, 17, 11, 2, 8]), batch_size=3)
    source.set_epoch(1)
    plain = list(source)
    for (pixels, labels), (same, alike, ids) in zip(plain, source.with_ids(), strict=True):
        assert torch.equal(pixels, same)
        assert torch.equal(labels, alike)
        assert torch.equal(source.labels[ids], labels)
    everything = torch.cat([ids for *_, ids in source.with_ids()])
    assert everything.sort().values.tolist() == list(range(7))


def test_length_and_last_batch() -> None:
    assert [len(labels) for _, labels in loader()] == [6, 6, 6, 2]
    assert [len(labels) for _, labels in loader(drop_last=True)] == [6, 6, 6]
    assert [len(labels) for _, labels in loader(drop_last=True, batch_size=50)] == [20]
    for kwargs in ({}, {"drop_last": True}, {"drop_last": True, "batch_size": 50}):
        source = loader(**kwargs)
        assert len(source) == len(list(source))
    assert len(list(loader().batches(2))) == 2


def test_batches_are_normalised_and_channels_last() -> None:
    source = ArrayLoader(
        images(), torch.arange(20), batch_size=20, role="test", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    ((pixels, _),) = source
    assert pixels.shape == (20, 3, 8, 8)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    expected = (images().permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_are_disjoint_and_equally_long(world: int) -> None:
    seen, lengths = [], []
    for rank in range(world):
        source = loader(batch_size=4)
        source.shard(rank, world)
        lengths.append(len(source))
        batches = [labels for _, labels in source]
        assert len(batches) == len(source)
        seen.append(torch.cat(batches))
    together = torch.cat(seen)
    assert len(together.unique()) == len(together) == 20 - 20 % world
    assert len(set(lengths)) == 1


def test_crop_cuts_a_window_out_of_the_padded_image() -> None:
    batch = images(4)
    draws = Draws(top=torch.tensor([0, 2, 4, 1]), left=torch.tensor([2, 2, 0, 3]))
    changed = augment(batch, AugmentSettings(crop=2), draws)
    padded = torch.nn.functional.pad(batch, (0, 0, 2, 2, 2, 2))
    for index, (top, left) in enumerate([(0, 2), (2, 2), (4, 0), (1, 3)]):
        assert torch.equal(changed[index], padded[index, top : top + 8, left : left + 8])
    assert torch.equal(changed[1], batch[1])


def test_flip_mirrors_the_chosen_images_only() -> None:
    batch = images(3)
    draws = Draws(flip=torch.tensor([True, False, True]))
    changed = augment(batch, AugmentSettings(flip=True), draws)
    assert torch.equal(changed[0], batch[0].flip(1))
    assert torch.equal(changed[1], batch[1])
    both = Draws(draws.flip, torch.zeros(3).long() + 2, torch.zeros(3).long() + 2)
    both = Draws(top=both.left, left=both.left, flip=draws.flip)
    changed = augment(batch, AugmentSettings(crop=2, flip=True), both)
    assert torch.equal(changed[2], batch[2].flip(1))


def test_enlarging_the_whole_image_changes_nothing() -> None:
    batch = images(2)
    draws = Draws(box=torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
    assert torch.equal(augment(batch, AugmentSettings(scale=1), draws), batch)


def test_enlarging_a_quarter_shows_that_quarter() -> None:
    batch = torch.zeros(1, 8, 8, 1, dtype=torch.uint8)
    batch[:, :4, :4] = 100
    draws = Draws(box=torch.tensor([[-0.5, -0.5, 0.5, 0.5]]))
    changed = augment(batch, AugmentSettings(scale=0.25), draws)
    assert (changed[0, :6, :6] == 100).all()


def test_cutout_blackens_a_square() -> None:
    batch = torch.full((1, 8, 8, 1), 9, dtype=torch.uint8)
    changed = augment(batch, AugmentSettings(cutout=4), Draws(hole=torch.tensor([[0.5, 0.5]])))
    assert (changed == 0).sum() == 16
    assert (changed[0, 2:6, 2:6] == 0).all()


@given(
    st.integers(1, 6),
    st.integers(4, 12),
    st.integers(4, 12),
    st.sampled_from([1, 3]),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([None, 0.3, 1.0]),
    st.integers(0, 4),
)
@settings(max_examples=30)
def test_shape_and_type_are_kept(
    count: int, height: int, width: int, channels: int,
    crop: int, flip: bool, scale: float | None, cutout: int,
) -> None:  # fmt: skip
    chosen = AugmentSettings(crop=crop, flip=flip, scale=scale, cutout=cutout)
    batch = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)
    draws = draw(chosen, count, torch.Generator().manual_seed(1))
    changed = augment(batch, chosen, draws)
    assert changed.shape == batch.shape
    assert changed.dtype == torch.uint8


def test_drawn_parts_stay_inside_the_image() -> None:
    draws = draw(AugmentSettings(scale=0.1), 1000, torch.Generator().manual_seed(1))
    centre, half = draws.box[:, :2].abs(), draws.box[:, 2:]
    assert (centre + half).max() <= 1 + 1e-6
    assert half.prod(1).min() >= 0.1 - 1e-6 or half.max() == 1


@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
@settings(max_examples=50)
def test_stratified_split_is_exact_and_proportional(values: list[int], data: st.DataObject) -> None:
    labels = torch.tensor(values)
    wanted = data.draw(st.integers(0, len(values) - 1))
    rest, held = stratified(labels, wanted, seed=1)
    assert len(held) == wanted
    assert torch.cat([rest, held]).sort().values.tolist() == list(range(len(values)))
    for label in set(values):
        share = wanted * values.count(label) / len(values)
        assert abs(int((labels[held] == label).sum()) - share) < 1 + 1e-6
