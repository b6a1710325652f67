"""A frozen teacher is not asked twice about the same image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimkit.distill import KD, L1, Distiller, Mimic, Record
from slimkit.distill.recording.answer_cache import AnswerCache
from slimkit.errors import InputError
from slimkit.inputs import Inputs, as_inputs


class Counting:
    """Answers with each sample's sum and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        (x,) = inputs.tensors()
        self.asked.append(len(x))
        return {"": x.flatten(1).float().sum(1, keepdim=True), "a": 2 * x.float()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_samples_are_not_asked_again_in_any_order(dtype: torch.dtype) -> None:
    ask, cache = Counting(), AnswerCache(1)
    x = torch.randn(6, 3, 2).to(dtype)
    cache(as_inputs(x[:4]), ask)
    mixed = x[[5, 0, 3, 4, 1]]
    answer = cache(as_inputs(mixed), ask)
    assert ask.asked == [4, 2]
    assert (cache.hits, cache.misses) == (3, 6)
    expected = Counting()(as_inputs(mixed))
    assert all(torch.equal(answer[name], expected[name]) for name in expected)
    cache(as_inputs(x), ask)
    assert ask.asked == [4, 2]


def test_another_image_or_another_mask_is_another_sample() -> None:
    ask, cache = Counting(), AnswerCache(1)
    x = torch.randn(2, 3)
    cache(as_inputs(x), ask)
    cache(as_inputs(x + 1e-6), ask)

    def both(inputs: Inputs) -> dict[str, Tensor]:
        a, b = inputs.tensors()
        return {"": a + b}

    pairs = AnswerCache(1)
    first = pairs(as_inputs((x, x)), both)[""]
    second = pairs(as_inputs((x, 3 * x)), both)[""]
    assert ask.asked == [2, 2]
    assert torch.equal(first, 2 * x)
    assert torch.equal(second, x + 3 * x)


def test_memory_is_bounded_by_what_came_first() -> None:
    ask = Counting()
    cache = AnswerCache(3 * (4 + 4 * 4) / 2**20)  # room for three answers
    x = torch.randn(5, 4)
    for _ in range(2):
        answer = cache(as_inputs(x), ask)
    assert ask.asked == [5, 2]
    assert torch.allclose(answer[""], x.sum(1, keepdim=True))


def test_answers_about_the_whole_batch_are_not_kept() -> None:
    asked = []

    def ask(inputs: Inputs) -> dict[str, Tensor]:
        asked.append(len(inputs.tensors()[0]))
        return {"parameter fc.weight": torch.ones(3, 7)}

    cache = AnswerCache(1)
    for _ in range(2):
        answer = cache(as_inputs(torch.randn(5, 2)), ask)
        assert answer["parameter fc.weight"].shape == (3, 7)
    assert asked == [5, 5]


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_distiller_with_a_cache_gives_the_same_losses() -> None:
    student, teacher, images = network(4), network(8), torch.randn(12, 6)
    losses = [KD(), Mimic(student="1"), L1(student=Record(module="2", part="input"))]
    values = []
    for cache_mb in (0, 1):
        with Distiller(
            student, teacher, losses, example_inputs=images, precision="fp32", cache_mb=cache_mb
        ) as distiller:
            for order in (range(12), reversed(range(12))):
                batch = images[list(order)]
                values.append(distiller.loss(batch, student(batch)).item())
            cache = distiller._teachers["teacher"]._cache
            assert cache is None or (cache.hits, cache.misses) == (12, 12)
    assert values[2:] == pytest.approx(values[:2], rel=1e-5)


def test_a_negative_size_is_refused() -> None:
    student = network(4)
    with pytest.raises(InputError, match="cache_mb"):
        Distiller(student, network(8), [KD()], cache_mb=-1)
    with pytest.raises(InputError, match="draws nothing"):
        Distiller(student, network(8), [KD()], cache_mb=1, deliveries=["torch:relu"])
    assert not student._forward_pre_hooks
