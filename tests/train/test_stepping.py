"""What a training step may be: any batch, a loss in the model, several forwards, accumulation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import DataError, InputError, TrainingError
from slimkit.inputs import Batch
from slimkit.tasks.data import ArrayLoader
from slimkit.train import Callback, StepContext, StepTools, TrainSettings, fit

PLAIN = TrainSettings(
    epochs=1, lr=0.05, precision="fp32", weight_decay=0, momentum=0, schedule="constant"
)


def train(network: nn.Module, data: Any, settings: TrainSettings = PLAIN, **kwargs: Any) -> Any:
    return fit(network, data, settings=settings, progress=False, **kwargs)


class Slim(nn.Module):
    """A hidden layer of which only the first ``width`` units are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head, self.width = nn.Linear(6, 8), nn.Linear(8, 3), 8

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.body.weight[: self.width], self.body.bias[: self.width]).relu()
        return F.linear(hidden, self.head.weight[:, : self.width], self.head.bias)


def numbers(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, **tolerance)


class Detector(nn.Module):
    """Images of any sizes; its loss is its own, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 5)

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        pooled = [self.body(image[None]).mean((2, 3)) for image in images]
        answers = self.head(self.norm(torch.cat(pooled)))
        if targets is None:
            return [{"boxes": answer[None, :4], "scores": answer[4:]} for answer in answers]
        assert self.training
        losses = [
            (answer[:4] - target["boxes"]).abs().sum()
            for answer, target in zip(answers, targets, strict=True)
        ]
        return {"boxes": torch.stack(losses).sum(), "scores": answers[:, 4].square().sum()}


def scenes() -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    sizes = [(8, 10), (12, 9), (7, 7)]
    images = [torch.randn(3, *size) for size in sizes]
    targets = [{"boxes": torch.rand(count, 4)} for count in (2, 0, 1)]
    return [(images, targets), (images[:2], targets[:2])]


def detector_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    losses = model(*batch.inputs.args, batch.targets)
    return torch.stack(list(losses.values())).sum(), losses


def test_a_loss_inside_the_model_trains_it_on_lists_of_images_of_any_sizes() -> None:
    seen: list[StepContext] = []

    class Watch(Callback):
        def on_step_end(self, context: StepContext) -> None:
            seen.append(context)

    network = Detector()
    settings = PLAIN.model_copy(
        update={"epochs": 6, "lr": 0.01, "precision": "auto", "batch_norm_reestimation": 2}
    )
    history = train(network, scenes(), settings, batch_loss=detector_loss, callbacks=[Watch()])
    assert history.epochs[-1]["loss"] < 0.9 * history.epochs[0]["loss"]
    assert set(seen[0].outputs) == {"boxes", "scores"}
    assert [image.shape[-1] for image in seen[0].inputs] == [10, 9, 7]
    assert [len(target["boxes"]) for target in seen[0].targets] == [2, 0, 1]
    assert not network.norm.running_mean.isnan().any()


def test_images_are_counted_and_not_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("slimkit.train.running.time.perf_counter", lambda: float(next(clock)))
    history = train(Detector(), scenes(), batch_loss=detector_loss)
    record = history.epochs[0]
    assert record["images_per_second"] == round((3 + 2) / record["seconds"], 1)


def test_mappings_are_keywords_and_targets_are_what_they_are() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.norm = nn.Embedding(20, 8), nn.BatchNorm1d(8)
            self.out = nn.Linear(8, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            words = self.word(input_ids) * attention_mask[..., None]
            return {"logits": self.out(self.norm(words.mean(1)))}

    words = {"input_ids": torch.randint(0, 20, (4, 5)), "attention_mask": torch.ones(4, 5)}
    batches = [(words, {"label": torch.arange(4), "note": "kept"}), (words, None)]
    kinds: list[Any] = []

    def loss_fn(outputs: Any, targets: Any) -> Tensor:
        kinds.append(targets)
        labels = torch.arange(4) if targets is None else targets["label"]
        return F.cross_entropy(outputs["logits"], labels)

    def term(context: StepContext) -> Tensor:
        assert set(context.inputs) == {"input_ids", "attention_mask"}
        return context.outputs["logits"].square().mean()

    settings = PLAIN.model_copy(update={"batch_norm_reestimation": 1})
    assert train(Text(), batches, settings, loss_fn=loss_fn, losses=[term]).steps == 2
    assert kinds[0]["note"] == "kept"
    assert kinds[1] is None


def test_the_sandwich_rule_sums_the_gradients_of_all_widths() -> None:
    """Yu & Huang 2019, algorithm 1: widest by the labels, others by the widest, one update."""
    data, expected = numbers(), Slim()
    stepper = torch.optim.SGD(expected.parameters(), lr=0.05)
    for images, labels in data:
        stepper.zero_grad()
        expected.width = 8
        widest = expected(images)
        F.cross_entropy(widest, labels).backward()
        for expected.width in (2, 5):
            soft = widest.detach().softmax(1)
            (0.5 * F.cross_entropy(expected(images), soft)).backward()
        stepper.step()

    def sandwich(tools: StepTools, batch: Batch) -> Tensor:
        model = tools.model
        model.width = 8
        widest = tools.forward(batch)
        tools.backward(tools.loss(widest, batch))
        for model.width in (2, 5):
            narrow = F.cross_entropy(tools.forward(batch.inputs), widest.detach().softmax(1))
            tools.backward(narrow, weight=0.5)
            tools.log(f"width{model.width}", narrow)
        return widest

    class Watch(Callback):
        outputs: Any = None

        def on_update(self, context: StepContext) -> None:
            self.outputs = context.outputs

    network, watch = Slim(), Watch()
    history = train(network, data, loss_fn=F.cross_entropy, step=sandwich, callbacks=[watch])
    same(expected, network, rtol=1e-5, atol=1e-6)
    assert torch.allclose(watch.outputs, widest, atol=1e-5)  # what the step returned
    record = history.epochs[0]
    assert set(record["scalars"]) == {"width2", "width5"}
    assert record["loss"] > sum(record["scalars"].values()) / 2  # of all that went backward


def test_a_step_may_compute_its_own_loss_and_return_nothing() -> None:
    seen: list[Any] = []

    class Watch(Callback):
        def on_step_end(self, context: StepContext) -> None:
            seen.append(context.outputs)

    def step(tools: StepTools, batch: Batch) -> None:
        tools.backward(F.cross_entropy(tools.forward(batch), batch.targets))

    network, expected, data = Slim(), Slim(), numbers()
    train(network, data, step=step, callbacks=[Watch()])
    train(expected, data, loss_fn=F.cross_entropy)
    same(expected, network, rtol=0, atol=0)
    assert [output.shape for output in seen] == [(8, 3)] * 4


def test_one_forward_and_loss_serves_every_kind_of_loss() -> None:
    def step(tools: StepTools, batch: Batch) -> Any:
        loss, outputs = tools.forward_loss(batch)
        tools.backward(loss)
        return outputs

    torch.manual_seed(0)
    data, network, expected = scenes(), Detector(), Detector()
    train(network, data, batch_loss=detector_loss, step=step)
    train(expected, data, batch_loss=detector_loss)
    same(expected, network, rtol=0, atol=0)
    outside, plain = Slim(), Slim()
    train(outside, numbers(), loss_fn=F.cross_entropy, step=step)
    train(plain, numbers(), loss_fn=F.cross_entropy)
    same(plain, outside, rtol=0, atol=0)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulated_batches_are_one_large_batch(clip: float | None) -> None:
    small = numbers(count=6, size=4)
    pairs = list(zip(small[::2], small[1::2], strict=True))
    large = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in pairs]
    expected, network = Slim(), Slim()
    settings = PLAIN.model_copy(update={"clip_grad_norm": clip, "momentum": 0.9, "ema": 0.5})
    one = train(expected, large, settings, loss_fn=F.cross_entropy)
    two = train(
        network, small, settings.model_copy(update={"accumulate": 2}), loss_fn=F.cross_entropy
    )
    same(expected, network, rtol=1e-5, atol=1e-6)
    assert one.steps == two.steps == 3
    assert two.epochs[0]["loss"] == pytest.approx(one.epochs[0]["loss"], rel=1e-5)


def test_the_last_step_of_an_epoch_accumulates_what_is_left() -> None:
    sizes: list[float] = []

    class Watch(Callback):
        begun = 0

        def on_step_begin(self, context: StepContext) -> None:
            assert context.outputs is None
            self.begun += 1

        def on_step_end(self, context: StepContext) -> None:
            sizes.append(float(context.model.body.bias.grad.norm()))

    data, watch = numbers(count=1) * 3, Watch()
    frozen = PLAIN.model_copy(update={"accumulate": 2, "lr": 1e-12, "epochs": 2})
    history = train(Slim(), data, frozen, loss_fn=F.cross_entropy, callbacks=[watch])
    assert history.steps == watch.begun == 4
    assert sizes == pytest.approx([sizes[0]] * 4, rel=1e-5)  # means, not sums


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing says what is minimised"),
        ({"loss_fn": F.cross_entropy, "batch_loss": detector_loss}, "both say"),
    ],
)
def test_what_is_minimised_must_be_clear(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(Slim(), numbers(), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": lambda tools, batch: tools.forward(batch)}, r"step: .*tools\.backward"),
        ({"batch_loss": lambda model, batch: model(*batch.inputs.args)}, r"\(loss, outputs\)"),
        ({"loss_fn": lambda outputs, targets: outputs}, r"scalar tensor, got \(8, 3\)"),
        ({"loss_fn": lambda outputs, targets: 1.0}, "scalar tensor, got float"),
        ({"loss_fn": lambda outputs, targets: outputs.detach().sum()}, "does not depend"),
    ],
)
def test_mistakes_in_steps_and_losses_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(Slim(), numbers(), **given)


def test_a_loss_inside_the_model_is_none_of_outputs() -> None:
    def step(tools: StepTools, batch: Batch) -> None:
        tools.backward(tools.loss(tools.forward(batch), batch))

    with pytest.raises(InputError, match="forward_loss"):
        train(Detector(), scenes(), batch_loss=detector_loss, step=step)


def test_what_is_no_batch_is_named() -> None:
    with pytest.raises(InputError, match=r"loader: .*\(inputs, targets\)"):
        train(Slim(), ["words"], loss_fn=F.cross_entropy)


def test_a_loader_that_yields_nothing_ends_the_run() -> None:
    class Empty:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(DataError, match="yields no batch"):
        train(Slim(), Empty(), loss_fn=F.cross_entropy)


@pytest.mark.parametrize("where", ["step", "callback", "loss", "term"])
def test_an_exception_of_the_users_leaves_a_model_that_can_be_used(
    network: nn.Sequential, data: ArrayLoader, where: str, tmp_path: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("mine")

    class Failing(Callback):
        def on_update(self, context: StepContext) -> None:
            fails()

    given: dict[str, Any] = {"loss_fn": fails if where == "loss" else F.cross_entropy}
    given["step"] = fails if where == "step" else None
    given["callbacks"] = [Failing()] if where == "callback" else []
    given["losses"] = [fails] if where == "term" else []
    path = tmp_path / "run.safetensors"
    settings = PLAIN.model_copy(update={"ema": 0.9, "freeze_batch_norm": True})
    with pytest.raises(TrainingError, match="it failed with ZeroDivisionError: mine") as caught:
        train(network, data, settings, checkpoint=path, **given)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not any(module.training for module in network.modules())
    assert all("forward" not in vars(module) for module in network.modules())
    assert not list(tmp_path.iterdir())
    train(network, data, settings, loss_fn=F.cross_entropy, checkpoint=path)


def test_parameters_of_five_dimensions_train_beside_convolutions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.flat, self.deep = nn.Conv2d(1, 3, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(self.flat(x)[:, None]).mean((2, 3, 4))

    batches = [(torch.randn(4, 1, 6, 6), torch.arange(4) % 2)] * 3
    layouts: list[bool] = []
    trained = []
    for layout in (True, False):
        network = Mixed()
        network.flat.register_forward_hook(
            lambda module, args, out: layouts.append(
                module.weight.is_contiguous(memory_format=torch.channels_last)
                and args[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        settings = PLAIN.model_copy(update={"channels_last": layout})
        train(network, batches, settings, loss_fn=F.cross_entropy)
        trained.append(network)
    same(trained[0], trained[1], rtol=1e-4, atol=1e-6)
    assert all(layouts[:3])


def test_a_teacher_of_dictionaries_teaches_through_fit() -> None:
    from slimkit.distill import KD, Distiller

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word, self.out = nn.Embedding(20, 8), nn.Linear(8, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out((self.word(input_ids) * attention_mask[..., None]).mean(1))

    torch.manual_seed(0)
    teacher, student = Text(), Text()
    words = {"input_ids": torch.randint(0, 20, (16, 5)), "attention_mask": torch.ones(16, 5)}
    batches = [(words, torch.arange(16) % 4)] * 4

    def distance() -> float:
        answers = [network(**words).softmax(1) for network in (teacher, student)]
        return (answers[0] - answers[1]).abs().mean().item()

    before = distance()
    settings = PLAIN.model_copy(update={"epochs": 40, "lr": 1.0, "loss_weight": 0})
    with Distiller(student, teacher, [KD()]) as distiller:
        train(student, batches, settings, loss_fn=F.cross_entropy, losses=[distiller])
    assert distance() < 0.3 * before


def test_lists_of_images_are_handed_to_the_teacher_too() -> None:
    from slimkit.distill import L1, Distiller

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)

        def forward(self, images: list[Tensor]) -> Tensor:
            return torch.cat([self.body(image[None]).mean((2, 3)) for image in images])

    torch.manual_seed(0)
    student, teacher = Pooled(), Pooled()
    batches = [(images, None) for images, _ in scenes()] * 4
    with Distiller(student, teacher, [L1()]) as distiller:
        history = train(
            student,
            batches,
            PLAIN.model_copy(update={"loss_weight": 0, "epochs": 3}),
            loss_fn=F.cross_entropy,
            losses=[distiller],
        )
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]


def test_terms_count_in_every_loss_of_a_step() -> None:
    def step(tools: StepTools, batch: Batch) -> None:
        for _ in range(2):
            tools.backward(tools.loss(tools.forward(batch), batch), weight=0.5)

    calls: list[int] = []

    def term(context: StepContext) -> Tensor:
        calls.append(context.step)
        return 0.1 * context.outputs.square().mean()

    network, expected = Slim(), Slim()
    train(network, numbers(), loss_fn=F.cross_entropy, step=step, losses=[term])
    train(expected, numbers(), loss_fn=F.cross_entropy, losses=[term])
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3]
    same(expected, network, rtol=1e-5, atol=1e-6)


def test_bf16_holds_in_a_step_of_ones_own(
    make_network: Callable[[], nn.Sequential], data: ArrayLoader
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    inner: list[torch.dtype] = []

    def step(tools: StepTools, batch: Batch) -> None:
        outputs = tools.forward(batch)
        with tools.autocast():
            seen.append((outputs.dtype, (outputs @ outputs.T).dtype))
        tools.backward(tools.loss(outputs, batch))

    network = copy.deepcopy(make_network())
    network[7].register_forward_hook(lambda _m, _i, out: inner.append(out.dtype))
    settings = PLAIN.model_copy(update={"precision": "bf16"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimkit.train.running.multiplies_bf16", lambda device: True)
        train(network, data, settings, loss_fn=F.cross_entropy, step=step)
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert set(inner) == {torch.bfloat16}
