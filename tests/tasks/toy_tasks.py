"""Two tasks that are as unlike classification as it gets, and small enough to train in a second.

A detector with list inputs of different sizes, its loss inside, dict targets, and images without
boxes; and a text classifier with dict inputs, judged by an error of which less is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import InputError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks import Answer, Metric, SampleLoader, Splits, Task
from slimkit.tasks.deployment import Part
from slimkit.tasks.drawing import Drawing, lines, picture, samples, table
from slimkit.tasks.running import in_training

SIZE, STRIDE = 32, 4
COLOURS = torch.eye(3)


class ToyData(BaseModel):
    """What ``data:`` of both tasks may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "toy"
    count: int = 64
    batch_size: int = 8
    eval_batch_size: int = 16


def toy_splits(
    settings: ToyData,
    samples: Sequence[Any],
    collate: Any,
    *,
    batches: int | None = None,
    **more: Any,
) -> Splits:
    """Half for training, a quarter each for validation and test."""
    quarter = len(samples) // 4
    parts = {"train": (0, 2 * quarter), "validation": (2 * quarter, 3 * quarter)}
    parts["test"] = (3 * quarter, len(samples))

    def loader(role: Any, size: int, **options: Any) -> SampleLoader:
        chosen = list(range(*parts[role]))
        if batches is not None and role == "train":
            chosen = chosen[: batches * size]
        return SampleLoader(samples, collate, batch_size=size, role=role, indices=chosen, **options)

    still = settings.eval_batch_size
    return Splits(
        train=loader("train", settings.batch_size, shuffle=True),
        calibration=loader("train", still),
        validation=loader("validation", still),
        test=loader("test", still),
        fingerprint=f"toy {len(samples)} {settings.batch_size}",
        **more,
    )


# ---- detection


class ToyDetector(nn.Module):
    """One anchor-free head on two strided convolutions; the loss is computed inside."""

    def __init__(self, num_classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(2 * width, num_classes + 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        raw = self.raw(stacked(images))
        if not self.training:
            return decoded(raw)
        if targets is None:
            raise ValueError("targets should not be none when in training mode")
        return losses_of(raw, targets)

    def raw(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def toy_detector(num_classes: int = 3, width: int = 16) -> nn.Module:
    return ToyDetector(num_classes, width)


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Images of any size as one batch, filled up with zeros."""
    return torch.stack([F.pad(x, (0, SIZE - x.shape[2], 0, SIZE - x.shape[1])) for x in images])


def centres() -> Tensor:
    steps = torch.arange(SIZE // STRIDE) * STRIDE + STRIDE / 2
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)


def boxes_of(raw: Tensor) -> Tensor:
    """(N, cells, 4) corners, from distances to the four sides."""
    sides = F.softplus(raw[:, -4:]).flatten(2).mT * STRIDE
    points = centres()
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)


def decoded(raw: Tensor) -> list[dict[str, Tensor]]:
    """The best cell of each class in each image, if it is sure enough."""
    scores, boxes = raw[:, :-4].flatten(2).sigmoid(), boxes_of(raw)
    found = []
    for image_scores, image_boxes in zip(scores, boxes, strict=True):
        best = image_scores.max(dim=1)
        sure = best.values > 0.3
        found.append(
            {
                "boxes": image_boxes[best.indices[sure]],
                "scores": best.values[sure],
                "labels": sure.nonzero().flatten(),
            }
        )
    return found


def losses_of(raw: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    scores, boxes = raw[:, :-4].flatten(2), boxes_of(raw)
    wanted, distance = torch.zeros_like(scores), raw.new_zeros(())
    for number, target in enumerate(targets):
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            middle = (box[:2] + box[2:]) / 2
            cell = int((centres() - middle).norm(dim=1).argmin())
            wanted[number, label, cell] = 1
            distance = distance + (boxes[number, cell] - box).abs().mean() / SIZE
    weight = 1 + 20 * wanted
    classes = F.binary_cross_entropy_with_logits(scores, wanted, weight=weight)
    return {"classes": classes, "boxes": distance / len(targets)}


def drawn_image(number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Up to two coloured squares on grey noise; every fifth image has none."""
    generator = torch.Generator().manual_seed(number)
    height, width = (int(x) for x in torch.randint(24, SIZE + 1, (2,), generator=generator))
    image = 0.2 * torch.rand(3, height, width, generator=generator)
    labels = torch.randperm(3, generator=generator)[: 0 if number % 5 == 0 else 1 + number % 2]
    boxes = []
    for place, label in enumerate(labels.tolist()):
        left, top = (int(x) for x in torch.randint(0, 6, (2,), generator=generator))
        left += 12 * place
        image[:, top : top + 9, left : left + 9] = COLOURS[label][:, None, None]
        boxes.append([left, top, left + 9, top + 9])
    return image, {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "labels": labels}


def collate_images(chosen: list[Any]) -> Batch:
    return Batch(Inputs(([image for image, _ in chosen],)), [target for _, target in chosen])


class ToyDetection(Task):
    """Coloured squares."""

    data_settings: ClassVar = ToyData
    metrics: ClassVar = (
        Metric("map", "mAP"),
        Metric("found", "boxes per image", unit="", high=None),
    )

    type: Literal["toy_detection"] = "toy_detection"
    pictures: int = 3

    def load(self, settings: ToyData) -> Splits:
        return self._splits(settings)

    def synthetic(self, settings: ToyData, model: nn.Module, *, batches: int) -> Splits:
        small = settings.model_copy(update={"batch_size": 2, "eval_batch_size": 2, "count": 16})
        return self._splits(small, batches=batches)

    def _splits(self, settings: ToyData, **more: Any) -> Splits:
        images = [drawn_image(number) for number in range(settings.count)]
        return toy_splits(
            settings,
            images,
            collate_images,
            classes=("red", "green", "blue"),
            preprocessing={"size": [SIZE, SIZE]},
            facts={"boxes": sum(len(target["labels"]) for _, target in images)},
            **more,
        )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        with in_training(model):
            losses = model(*batch.inputs.args, batch.targets)
        return torch.stack(list(losses.values())).sum(), losses

    def scores(self, answers: Iterable[Answer]) -> dict[str, float]:
        right: list[list[tuple[float, bool]]] = [[] for _ in range(3)]
        wanted, images, found = [0, 0, 0], 0, 0
        for outputs, batch in answers:
            for answer, target in zip(outputs, batch.targets, strict=True):
                images, found = images + 1, found + len(answer["labels"])
                for label in target["labels"].tolist():
                    wanted[label] += 1
                for box, score, label in zip(
                    *(answer[k] for k in ("boxes", "scores", "labels")), strict=True
                ):
                    of_class = target["boxes"][target["labels"] == label]
                    hit = any(overlap(box, other) > 0.5 for other in of_class)
                    right[int(label)].append((float(score), hit))
        if not images:
            raise InputError("there are no images", where="loader")
        precision = [
            average(sorted(r, reverse=True), w) for r, w in zip(right, wanted, strict=True) if w
        ]
        return {"map": 100 * sum(precision) / max(1, len(precision)), "found": found / images}

    def predictions(self, outputs: Any, splits: Splits) -> list[Any]:
        return [
            [
                {"box": box, "class": splits.classes[label], "score": score}
                for box, label, score in zip(
                    *(x[k].tolist() for k in ("boxes", "labels", "scores")), strict=True
                )
            ]
            for x in outputs
        ]

    def drawings(
        self, answers: Mapping[str, Iterable[Answer]], splits: Splits
    ) -> Sequence[Drawing]:
        columns: dict[str, list[Any]] = {}
        for name, given in answers.items():
            columns[name] = []
            for outputs, batch in given:
                images = batch.inputs.args[0]
                for image, found in zip(images, self.predictions(outputs, splits), strict=True):
                    boxes = [
                        {"box": f["box"], "label": f"{f['class']} {f['score']:.2f}"} for f in found
                    ]
                    columns[name].append({"image": picture(image), "boxes": boxes})
                break
        shown = [
            row[: len(columns)]
            for row in list(zip(*columns.values(), strict=True))[: self.pictures]
        ]
        return [
            samples("Predictions", list(columns), shown),
            table(
                "Classes", ["class", "number"], [[name, n] for n, name in enumerate(splits.classes)]
            ),
            lines("Precision", "recall", "precision", {n: [(0, 1), (1, 0.5)] for n in columns}),
        ]

    def exported(self, model: nn.Module, splits: Splits) -> nn.Module:
        return Part(model, lambda net, images: net.raw(images))

    def prepare(self, inputs: Inputs) -> Inputs:
        return Inputs((stacked(inputs.args[0]),))

    def complete(self, outputs: dict[str, Tensor], inputs: Inputs) -> Any:
        return decoded(next(iter(outputs.values())))


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two boxes."""
    inside = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp_min(0)
    shared = inside.prod()
    areas = [(box[2:] - box[:2]).clamp_min(0).prod() for box in (one, other)]
    return float(shared / (sum(areas) - shared + 1e-9))


def average(ranked: list[tuple[float, bool]], wanted: int) -> float:
    """Average precision of one class."""
    hits = total = 0.0
    for rank, (_, hit) in enumerate(ranked, start=1):
        hits += hit
        total += hit * hits / rank
    return min(1.0, total / wanted)


# ---- text


class ToyText(nn.Module):
    """A bag of embedded words."""

    def __init__(self, num_classes: int = 2, width: int = 32, words: int = 20) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 16)
        self.hidden = nn.Linear(16, width)
        self.output = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        words = F.relu(self.hidden(self.embedding(input_ids)))
        mask = attention_mask.unsqueeze(-1).to(words.dtype)
        mean = (words * mask).sum(1) / mask.sum(1).clamp_min(1)
        return {"logits": self.output(mean)}


def toy_text(num_classes: int = 2, width: int = 32) -> nn.Module:
    return ToyText(num_classes, width)


def written_text(number: int) -> tuple[Tensor, int]:
    """Words; the class says whether low or high numbers are more."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(4, 9, (1,), generator=generator))
    label = number % 2
    words = torch.randint(1, 20, (length,), generator=generator)
    words[: length // 2] = torch.randint(
        1 + 9 * label, 10 + 9 * label, (length // 2,), generator=generator
    )
    return words, label


def collate_texts(chosen: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """As a tokenizer does: filled up to the longest of the batch."""
    words = nn.utils.rnn.pad_sequence([words for words, _ in chosen], batch_first=True)
    mask = (words > 0).long()
    return {"attention_mask": mask, "input_ids": words}, torch.tensor([n for _, n in chosen])


class ToyTextClassification(Task):
    """Low words or high words."""

    data_settings: ClassVar = ToyData
    metrics: ClassVar = (Metric("error", "error rate", unit="", higher_is_better=False, high=1.0),)

    type: Literal["toy_text"] = "toy_text"

    def load(self, settings: ToyData) -> Splits:
        return self._splits(settings)

    def synthetic(self, settings: ToyData, model: nn.Module, *, batches: int) -> Splits:
        small = settings.model_copy(update={"batch_size": 4, "eval_batch_size": 4, "count": 32})
        return self._splits(small, batches=batches)

    def _splits(self, settings: ToyData, **more: Any) -> Splits:
        texts = [written_text(number) for number in range(settings.count)]
        return toy_splits(settings, texts, collate_texts, classes=("low", "high"), **more)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        outputs = batch.inputs.call(model)
        return F.cross_entropy(outputs["logits"], batch.targets), outputs

    def scores(self, answers: Iterable[Answer]) -> dict[str, float]:
        wrong, count = 0, 0
        for outputs, batch in answers:
            wrong += int((outputs["logits"].argmax(1) != batch.targets).sum())
            count += len(batch.targets)
        if not count:
            raise InputError("there are no texts", where="loader")
        return {"error": wrong / count}

    def complete(self, outputs: dict[str, Tensor], inputs: Inputs) -> Any:
        return outputs

    def export_options(self, splits: Splits) -> Mapping[str, Any]:
        return {"dynamic_axes": ["sequence"]}
