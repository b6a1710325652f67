"""Calibration data in every form that training takes, counted and divided as examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.errors import DataError
from slimkit.inputs import Batch, Inputs
from slimkit.quantize import MinMax, ptq, qat
from slimkit.quantize.batches import Batches
from slimkit.quantize.outputs.check import _first


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = F.relu(self.hidden(self.word(input_ids))) * attention_mask[..., None]
        return self.out(x.mean(1))


class Detector(nn.Module):
    """Normalises, as torchvision's do: one channel would broadcast to three without an error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.counts: list[int] = []

    def forward(self, images: list[Tensor]) -> Tensor:
        self.counts.append(len(images))
        mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
        return self.head(F.relu(self.conv(torch.stack([(i - mean) / 0.2 for i in images]))))


class Whole(MinMax):
    divisible = False


def words(count: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(0, 20, (count, 5), generator=torch.Generator().manual_seed(count))
    return {"input_ids": ids, "attention_mask": torch.ones(count, 5)}


def pictures(count: int, size: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, size, size, generator=generator) for _ in range(count)]


def bounds(quantized: nn.Module) -> dict[str, tuple[float, float]]:
    found = quantized.activation_quantizers()  # type: ignore[operator]
    return {name: (float(q.low), float(q.high)) for name, q in found.items()}


@pytest.mark.parametrize("quantize", [ptq, qat])
def test_keywords_with_labels_calibrate_like_keywords_alone(quantize: Any) -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    plain = quantize(Text(), words(), calibration=[words()])
    for batch in ((words(), labels), [words(), labels], Batch(Inputs((), words()), labels),
                  {**words(), "labels": labels}):  # fmt: skip
        assert bounds(quantize(Text(), words(), calibration=[batch])) == bounds(plain)


@pytest.mark.parametrize("form", ["pair", "single", "bare", "tuples"])
def test_a_list_of_images_counts_by_its_length(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimkit.quantize.calibration._LARGEST_ACTIVATION", 3000)
    targets: list[dict[str, Tensor]] = [{}] * 4
    batch: Any = {
        "pair": (pictures(4), targets),
        "single": (pictures(4),),
        "bare": pictures(4),
        "tuples": (tuple(pictures(4)), tuple(targets)),
    }[form]
    example = (pictures(1),)
    divided = ptq(Detector(), example, calibration=[batch, batch])
    whole = ptq(Detector(), example, calibration=[batch, batch], observer=Whole())
    assert bounds(divided) == bounds(whole)
    assert divided.model.counts[:5] == [4, 1, 1, 1, 1]  # type: ignore[index]


def test_lists_may_be_longer_than_at_capture() -> None:
    model, batch = Detector().eval(), pictures(3, seed=1)
    q = ptq(model, (pictures(1),), calibration=[(pictures(4),)])
    with torch.no_grad():
        assert torch.allclose(q(batch), model(batch), atol=0.1)
        assert not torch.equal(q(batch), model(batch))
        apart = torch.cat([q([image]) for image in batch])
        assert torch.allclose(q(batch), apart, atol=1e-6)
    q.train()(batch).sum().backward()
    assert all(p.grad is not None for p in q.model.parameters())


def test_the_output_check_takes_whole_images_of_a_list() -> None:
    batch = Inputs((pictures(12),))
    assert [len(part.args[0]) for part in (_first(batch, 8), _first(batch, 20))] == [8, 12]
    assert _first(batch, 1).args[0][0].shape == (3, 8, 8)


def test_methods_take_lists_of_images() -> None:
    quantized = ptq(
        Detector(),
        (pictures(1),),
        calibration=[(pictures(12, seed=seed), None) for seed in range(2)],
        weight_bits=4,
        methods=["gptq", "bias_correction", "bias_tuning"],
    )
    assert all(spec.scale == "fixed" for spec in quantized.plan.quantizers if spec.parameter)
    assert {6, 8, 12} == set(quantized.model.counts)  # type: ignore[arg-type]


def test_images_of_a_list_may_differ_in_size_but_not_in_channels() -> None:
    example = Inputs((pictures(1, size=8),))
    mixed = [*pictures(1, size=9), *pictures(1, size=12)]
    assert [b.examples for b in Batches([(mixed, None)], example)] == [2]
    with pytest.raises(DataError, match=r"batch 1 has shape \(1, 8, 8\)"):
        list(Batches([([torch.rand(1, 8, 8)], None)], example))


def test_one_image_where_a_list_is_expected_is_an_error() -> None:
    with pytest.raises(DataError, match="has a Tensor where the example inputs have a list"):
        ptq(Detector(), (pictures(1),), calibration=[pictures(1)[0]])


def test_a_list_where_a_tensor_is_expected_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(DataError, match="has a list where the example inputs have a Tensor"):
        ptq(net, torch.rand(2, 3, 8, 8), calibration=[(pictures(2), None)])


def test_what_is_no_batch_names_its_number() -> None:
    with pytest.raises(DataError, match="calibration: batch 2: expected a tensor"):
        list(Batches([torch.rand(2, 3), 7], Inputs((torch.rand(2, 3),))))


def test_quantization_says_how_far_it_is_when_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)),
        [torch.rand(2, 3, 8, 8)] * 4,
    )
    settings: dict[str, Any] = {"calibration": data, "methods": ["gptq"]}
    ptq(model, data[0], **settings)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("slimkit.progress._SOONEST", 0.0)
    for module in ("calibration", "methods.interface"):
        monkeypatch.setattr(f"slimkit.quantize.{module}.LONG", 1e-9)
    ptq(model, data[0], **settings)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibration 4/4 batches" in err
    assert "gptq 1/2 0: error" in err
    assert "left" in err
    ptq(model, data[0], **settings, progress=False)
    assert capsys.readouterr() == ("", "")
