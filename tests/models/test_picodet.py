"""PicoDet: published sizes, cells and boxes, and a loss that places objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

import slimkit as sk
from slimkit.artifact import write_tensors
from slimkit.errors import ModelError
from slimkit.models import build_model, load_checkpoint
from slimkit.models.cells import boxes_at, cells_of, distances_to, mean_distances
from slimkit.models.picodet import PicoDet
from slimkit.models.picodet.lcnet import LCNet
from slimkit.reparam import fuse

RATIOS = (0.5,) * 13


def small(num_classes: int = 2) -> PicoDet:
    torch.manual_seed(0)
    return PicoDet(num_classes, scale=0.25, ratios=RATIOS, neck=32, layers=1)


@pytest.mark.parametrize(("size", "count"), [("s", 992_715), ("m", 2_152_554), ("l", 3_305_009)])
def test_the_parameters_are_the_published_ones(size: str, count: int) -> None:
    model = build_model(f"slimkit:picodet_{size}")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("scale", "count", "channels"),
    [
        (0.35, 136_810, (48, 88, 176)),
        (0.5, 270_896, (64, 128, 256)),
        (1.0, 1_016_160, (128, 256, 512)),
    ],
)
def test_the_lcnet_backbone_has_the_published_sizes(
    scale: float, count: int, channels: tuple[int, ...]
) -> None:
    """Parameters as timm's lcnet_035, lcnet_050 and lcnet_100 have them without classifier."""
    network = LCNet(scale)
    assert sum(p.numel() for p in network.parameters()) == count
    assert network.channels == channels
    features = network(torch.zeros(1, 3, 64, 96))
    assert [f.shape[2:] for f in features] == [(8, 12), (4, 6), (2, 3)]


def test_the_lcnet_variant_is_a_whole_detector() -> None:
    model = build_model(
        "slimkit:picodet", num_classes=3, backbone="lcnet", scale=0.25, neck=32, layers=1
    ).eval()
    logits, distances = model(torch.zeros(1, 3, 64, 64))
    assert (logits.shape, distances.shape) == ((1, 85, 3), (1, 85, 32))
    with pytest.raises(ModelError, match=r"unknown backbone 'lcnett'.*lcnet"):
        PicoDet(backbone="lcnett")  # type: ignore[arg-type]


def test_folded_it_has_the_weights_of_the_published_file() -> None:
    """The file's initialisers are 983,939 numbers, 48 of them shapes."""
    model = build_model("slimkit:picodet_s")
    folded = fuse(model, torch.zeros(1, 3, 64, 64))
    assert sum(p.numel() for p in folded.parameters()) == 983_939 - 48
    assert len([m for m in folded.modules() if isinstance(m, torch.nn.Conv2d)]) == 133


def test_one_prediction_per_cell_whatever_the_size() -> None:
    model = small(3).eval()
    for height, width in ((64, 64), (96, 160), (70, 50)):
        logits, distances = model(torch.zeros(2, 3, height, width))
        cells = cells_of((height, width), model.strides)
        assert logits.shape == (2, len(cells.strides), 3)
        assert distances.shape == (2, len(cells.strides), 32)


def test_cells_lie_row_by_row_in_their_middles() -> None:
    cells = cells_of((16, 24), (8, 16))
    first = [[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [4.0, 12.0]]
    assert cells.centres[:4].tolist() == first
    assert cells.centres[6:].tolist() == [[8.0, 8.0], [24.0, 8.0]]
    assert cells.strides.tolist() == [8.0] * 6 + [16.0] * 2


def test_a_distance_is_the_mean_of_its_distribution() -> None:
    logits = torch.zeros(1, 1, 32)
    logits[0, 0, 3] = 50.0  # all of the first side's mass on 3
    means = mean_distances(logits)[0, 0]
    assert means.tolist() == pytest.approx([3.0, 3.5, 3.5, 3.5])


def test_boxes_and_distances_are_inverse() -> None:
    cells = cells_of((64, 64), (8, 16))
    distances = torch.rand(len(cells.strides), 4) * 6
    again = distances_to(cells, boxes_at(cells, distances), largest=6.99)
    torch.testing.assert_close(again, distances)


def scenes() -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Four images of bright squares on dark ground; the last one has none."""
    torch.manual_seed(1)
    images = 0.1 * torch.randn(4, 3, 64, 64)
    boxes = [[(4, 6, 28, 30, 0), (34, 36, 60, 60, 1)], [(20, 10, 50, 44, 1)], [(8, 30, 30, 60, 0)]]
    targets = []
    for image, found in zip(images, [*boxes, []], strict=True):
        for x1, y1, x2, y2, label in found:
            image[label, y1:y2, x1:x2] += 2.0
        rows = torch.tensor(found).reshape(-1, 5)
        targets.append({"boxes": rows[:, :4].float(), "labels": rows[:, 4].long()})
    return images, targets


def test_the_loss_teaches_a_network_where_things_are() -> None:
    model, (images, targets) = small().train(), scenes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = torch.stack(list(model.loss(model(images), targets, (64, 64)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # plain mean over the steps that follow
            module.reset_running_stats()
    with torch.no_grad():
        for _ in range(3):
            model(images)
        boxes, scores = model.eval().decode(model(images), (64, 64))
    for found, score, target in zip(boxes[:3], scores[:3], targets[:3], strict=True):
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            best = found[score[:, label].argmax()]
            assert float(box_iou(best[None], box[None])) > 0.6
    assert float(scores[3].max()) < 0.3


def test_a_batch_without_any_object_trains() -> None:
    model, images = small(), torch.randn(2, 3, 64, 64)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    losses = model.loss(model(images), [nothing, nothing], (64, 64))
    assert losses["giou"].item() == losses["distribution"].item() == 0.0
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[0, 0, 9, 9]], [2], "2 classes"),
        ([[0, 0, 9, 9]], [-1], "2 classes"),
        ([[0, 0, 9, 9]], [0, 1], "1 boxes but 2 labels"),
    ],
)
def test_targets_that_do_not_fit_are_named(
    boxes: list[list[int]], labels: list[int], message: str
) -> None:
    model = small().eval()
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
    predictions = model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(sk.errors.InputError, match=message) as raised:
        model.loss(predictions, [target], (64, 64))
    assert "targets[0]" in str(raised.value)
    with pytest.raises(sk.errors.InputError, match="1 targets for 2 images"):
        model.loss(model(torch.zeros(2, 3, 64, 64)), [target], (64, 64))


def test_it_is_pruned_without_preparation_and_keeps_its_outputs() -> None:
    model, images = small().eval(), torch.randn(1, 3, 64, 64)
    plan = sk.prune.plan(model, images, ratio=0.5, round_to=1)
    before = sum(p.numel() for p in model.parameters())
    sk.apply(model, plan)
    logits, distances = model(images)
    assert logits.shape[-1] == 2
    assert distances.shape[-1] == 32
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before


def test_a_checkpoint_of_other_classes_gives_all_but_their_scores(tmp_path: Path) -> None:
    many, few = small(5).eval(), small(2).eval()
    with torch.no_grad():
        for parameter in many.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_tensors(tmp_path / "many.safetensors", many.state_dict())
    fresh = few.head.outputs[0].weight[:2].clone()
    load_checkpoint(few, tmp_path / "many.safetensors")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(few(images).distances, many(images).distances)
    assert few(images).logits.shape[-1] == 2
    assert torch.equal(few.head.outputs[0].weight[:2], fresh)


def test_a_checkpoint_of_another_width_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "small.safetensors", small(2).state_dict())
    wider = PicoDet(2, scale=0.5, ratios=RATIOS, neck=32, layers=1)
    with pytest.raises(sk.errors.CheckpointError, match="in the file"):
        load_checkpoint(wider, tmp_path / "small.safetensors")
