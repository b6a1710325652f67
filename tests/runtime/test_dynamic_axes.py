from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import ExportError, InputError
from slimkit.measure.latency import benchmark, random_feeds
from slimkit.runtime.exporting import export
from slimkit.runtime.output_parity import parity
from slimkit.runtime.sessions import available_backends, open_session
from slimkit.runtime.structure import named_feeds


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.kind = nn.Embedding(40, 16), nn.Embedding(2, 16)
        self.mix = nn.Linear(16, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        h = torch.relu(self.mix(self.word(input_ids) + self.kind(token_type_ids)))
        mask = attention_mask.unsqueeze(-1).float()
        return self.out((h * mask).sum(1) / mask.sum(1).clamp(min=1))


def tokens(rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    """In the order of a tokenizer, which is not that of ``forward``."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {
        "input_ids": torch.randint(0, 40, (rows, length)),
        "token_type_ids": torch.randint(0, 2, (rows, length)),
        "attention_mask": mask,
    }


@pytest.fixture(scope="module")
def text() -> Text:
    torch.manual_seed(0)
    return Text().eval()


SEQUENCE = {name: {0: "batch", 1: "sequence"} for name in tokens()}


@pytest.mark.parametrize("quantized", [False, True])
def test_inputs_keep_their_names_in_any_order(text: Text, quantized: bool, tmp_path: Path) -> None:
    x = tokens()
    model = (
        sk.quantize.ptq(text, x, calibration=[tokens() for _ in range(3)]) if quantized else text
    )
    written = export(model, tmp_path / "text.onnx", x)
    assert [spec.name for spec in written.inputs] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    feeds = {name: value.numpy() for name, value in x.items()}
    (answer,) = open_session(written.path).run(feeds)
    with torch.inference_mode():
        expected = model(**x)
    assert torch.allclose(torch.from_numpy(answer), expected, atol=0.05 if quantized else 1e-5)
    again = export(model, tmp_path / "again.onnx", dict(reversed(x.items())))
    assert again.path.read_bytes() == written.path.read_bytes()
    shuffled = [dict(sorted(tokens(rows).items())) for rows in (1, 3)]
    assert parity(model, written.path, shuffled).sqnr_db > (20 if quantized else 80)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_named_dimension_takes_any_size(text: Text, quantized: bool, tmp_path: Path) -> None:
    model: nn.Module = text
    if quantized:
        model = sk.quantize.ptq(text, tokens(), calibration=[tokens() for _ in range(3)])
    written = export(model, tmp_path / "text.onnx", tokens(1, 5), dynamic_axes=SEQUENCE)
    assert {spec.axes for spec in written.inputs} == {("batch", "sequence")}
    assert written.inputs[0].shape == (None, None)
    calls = [tokens(rows, length) for rows, length in ((1, 2), (3, 9), (2, 17))]
    assert parity(model, written.path, calls).sqnr_db > (20 if quantized else 80)


def test_a_list_has_the_usual_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    path = tmp_path / "net.onnx"
    written = export(net, path, torch.randn(1, 3, 16, 16), dynamic_axes=["height", "width"])
    assert written.inputs[0].axes == ("batch", None, "height", "width")
    assert written.outputs[0].shape == (None, 2, None, None)
    assert "height" in str(written.outputs[0].axes[2])
    images = [torch.randn(2, 3, 12, 30), torch.randn(1, 3, 33, 7)]
    assert parity(net, path, images).max_abs_diff < 1e-5
    if available_backends()["openvino"].version:
        assert parity(net, path, images, backend="openvino").max_abs_diff < 1e-5


def test_adaptive_pooling_follows_an_open_size(tmp_path: Path) -> None:
    class Pools(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            pool = nn.functional.adaptive_avg_pool2d
            return pool(x, (3, 4)), pool(x, 1)

    path = tmp_path / "pools.onnx"
    export(Pools(), path, torch.randn(1, 2, 8, 8), dynamic_axes=["height", "width"])
    images = [torch.randn(1, 2, 7, 11), torch.randn(2, 2, 9, 4), torch.randn(1, 2, 2, 3)]
    assert parity(Pools(), path, images).max_abs_diff < 1e-5


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.transpose(2, 3)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[-1] > 20 else x


@pytest.mark.parametrize(
    ("model", "x", "axes", "words"),
    [
        (Positions(), torch.randn(2, 6, 4), ["sequence"], "one sequence only, 6"),
        (Square(), torch.randn(1, 3, 8, 8), ["height", "width"], "one size: .*both one name"),
        (Branches(), torch.randn(1, 3, 8, 32), ["width"], "at width 16 .*something else"),
        (Branches(), torch.randn(1, 3, 8, 18), ["width"], "at width 36 .*something else"),
    ],
)
def test_a_dimension_that_the_network_fixes_is_named(
    model: nn.Module, x: Tensor, axes: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=words):
        export(model, tmp_path / "net.onnx", x, dynamic_axes=axes)
    assert list(tmp_path.iterdir()) == []


def test_dimensions_of_one_name_are_tied(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    written = export(
        Square(), path, torch.randn(1, 3, 8, 8), dynamic_axes={"input": {2: "side", -1: "side"}}
    )
    assert written.inputs[0].axes == ("batch", None, "side", "side")
    assert parity(Square(), path, [torch.randn(1, 3, 5, 5)]).max_abs_diff == 0


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"input_id": {1: "sequence"}}, "did you mean 'input_ids'"),
        ({"input_ids": {2: "sequence"}}, "no dimension 2"),
        ({"input_ids": {1: 7}}, r"dynamic_axes\.input_ids\.1: expected text, got 7"),
        ({"input_ids": [1]}, "from an integer to text"),
        ({"input_ids": {0: "size", 1: "size"}}, "'size' is 2 in input_ids and 6"),
        (["lenght"], "usual names"),
        (["height"], "no input has a height"),
        ("sequence", "a list, of text"),
    ],
)
def test_wrong_names_are_input_errors(
    text: Text, axes: Mapping[str, dict[int, str]], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        export(text, tmp_path / "net.onnx", tokens(), dynamic_axes=axes)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_several_open_dimensions_are_timed_at_given_sizes(backend: str, tmp_path: Path) -> None:
    if not available_backends()[backend].version:
        pytest.skip(f"{backend} is not installed")
    net = nn.Conv2d(3, 2, 3)
    path = tmp_path / "net.onnx"
    export(net, path, torch.randn(1, 3, 8, 8), dynamic_axes=["height", "width"])
    session = open_session(path, backend=backend)
    (image,) = random_feeds(session, 2, {"height": 5, "width": 9})
    assert image.shape == (2, 3, 5, 9)
    timing = benchmark(path, backend=backend, runs=2, sizes={"height": 5, "width": 9})
    assert timing.runs == 2
    assert benchmark(path, backend=backend, runs=2, inputs=torch.randn(4, 3, 6, 7)).batch == 4
    with pytest.raises(InputError, match=r"height and width.*sizes=\{'height': …, 'width': …\}"):
        benchmark(path, backend=backend, runs=2)
    with pytest.raises(InputError, match="did you mean 'height'"):
        benchmark(path, backend=backend, runs=2, sizes={"heigth": 5, "width": 9})


def test_keywords_reach_a_file_by_name() -> None:
    x = tokens()
    feeds = named_feeds(sk.Inputs((), x), ("input_ids", "attention_mask", "token_type_ids"))
    assert isinstance(feeds, dict)
    assert all((feeds[name] == x[name].numpy()).all() for name in x)
    mixed = sk.Inputs((x["input_ids"],), {"images": [torch.zeros(1), torch.ones(2)]})
    feeds = named_feeds(mixed, ("ids", "images0", "images1"))
    assert {name: array.shape for name, array in feeds.items()} == {  # type: ignore[union-attr]
        "ids": (2, 6),
        "images0": (1,),
        "images1": (2,),
    }
    (only,) = named_feeds(sk.Inputs((), {"pixels": torch.ones(2)}), ("input",))
    assert only.shape == (2,)


def test_a_call_with_labels_is_read_as_everywhere(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, images: list[Tensor]) -> list[Tensor]:
            return [image.mean((1, 2)) for image in images]

    images = [torch.randn(3, 8, 8), torch.randn(3, 6, 6)]
    path = tmp_path / "pair.onnx"
    export(Pair(), path, (images,), dynamic_batch=False)
    calls = [(images, [{"boxes": torch.zeros(0, 4)}] * 2), (images,), sk.Inputs((images,))]
    assert parity(Pair(), path, calls).samples == 9
