"""Blocks of several inputs, as the layers of transformers are: right, and linear in depth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.inputs import Inputs
from slimkit.quantize import ptq
from slimkit.quantize.methods import streams
from slimkit.quantize.methods.blocks import Outline, outline
from slimkit.quantize.methods.gptq import GPTQ
from slimkit.quantize.methods.reconstruction import Reconstruct


class Layer(nn.Module):
    """Attention of one head: a mask by keyword, cosines in a tuple, the length as a number."""

    runs = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(width, width) for _ in range(3))

    def forward(
        self, hidden: Tensor, *, mask: Tensor, position: tuple[Tensor, Tensor], length: int
    ) -> tuple[Tensor, Tensor]:
        Layer.runs += 1
        turned = hidden * position[0] + hidden.roll(1, -1) * position[1]
        scores = self.query(turned) @ self.key(turned).transpose(1, 2) / length + mask
        weights = scores.softmax(-1)
        return F.relu(self.out(weights @ hidden)) + hidden, weights


class Transformer(nn.Module):
    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word = nn.Embedding(30, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, ids: Tensor, present: Tensor) -> Tensor:
        mask = (1.0 - present[:, None, :]) * -1e4
        angle = torch.arange(ids.shape[1]).float()[:, None].expand(-1, self.word.embedding_dim)
        position = angle.cos(), angle.sin()
        hidden = self.word(ids)
        for layer in self.layers:
            hidden, _ = layer(hidden, mask=mask, position=position, length=ids.shape[1])
        return self.head(hidden.mean(1))


def words(count: int, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    present = torch.ones(count, length)
    present[:, -1] = (torch.rand(count, generator=generator) > 0.5).float()
    return {"ids": torch.randint(0, 30, (count, length), generator=generator), "present": present}


BATCHES = [words(4, length, seed) for seed, length in enumerate((6, 6, 5, 7))]


def outline_of(model: nn.Module, example: Any) -> Outline:
    inputs = Inputs((), example)
    layers = {a for a in outline(model.eval(), inputs, set()).addresses if "linear" in a}
    return outline(model, inputs, layers)


def without_blocks(*args: Any, **kwargs: Any) -> Outline:
    found = outline(*args, **kwargs)
    return Outline(found.addresses, {}, found.functions)


@pytest.fixture
def counted() -> Iterator[None]:
    Layer.runs = 0
    yield
    Layer.runs = 0


def quantized(depth: int, method: Any) -> nn.Module:
    return ptq(
        Transformer(depth).eval(),
        words(1),
        calibration=BATCHES,
        weight_bits=4,
        methods=[method],
    )


def test_layers_with_masks_and_positions_are_blocks() -> None:
    blocks = outline_of(Transformer(3), words(1)).blocks
    assert [path for path in blocks if path.startswith("layers.")] == [
        "layers.0", "layers.1", "layers.2",
    ]  # fmt: skip
    first, second = blocks["layers.0"], blocks["layers.1"]
    assert second.sources[0] == ("layers.0", True, 0)
    assert second.sources[1:] == first.sources[1:]  # given from outside, once for all


@pytest.mark.parametrize("method", [GPTQ(images=16), Reconstruct(iterations=3, images=16)])
def test_blocks_change_no_result(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(method, Reconstruct):
        monkeypatch.setattr(Reconstruct, "_units", _single_layers)
    with_blocks = quantized(3, method).state_dict()
    monkeypatch.setattr(streams, "outline", without_blocks)
    plain = quantized(3, method).state_dict()
    assert all(torch.allclose(plain[k], v, atol=1e-6) for k, v in with_blocks.items())


def _single_layers(_self: Any, flow: Any) -> Iterator[Any]:
    for layer in flow.layers:
        yield None, [layer]


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("method", ["gptq", "bias_correction", "reconstruct"])
def test_time_is_linear_in_depth(method: str) -> None:
    chosen: Any = Reconstruct(iterations=2) if method == "reconstruct" else method
    runs = []
    for depth in (3, 6, 12):
        Layer.runs = 0
        quantized(depth, chosen)
        runs.append(Layer.runs)
    assert runs[2] - runs[1] == 2 * (runs[1] - runs[0])


def test_reconstruction_optimises_blocks_of_several_inputs() -> None:
    model = Transformer(3).eval()
    plain, better = (
        ptq(model, words(1), calibration=BATCHES, weight_bits=3, methods=methods)
        for methods in ([], [Reconstruct(iterations=60, batch=2, drop=0.0)])
    )
    with torch.no_grad():
        errors = [
            sum(float((q(**b) - model(**b)).square().sum()) for b in BATCHES)
            for q in (plain, better)
        ]
    assert errors[1] < 0.7 * errors[0]


def test_a_state_that_grows_with_every_call_keeps_a_layer_from_being_a_block() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(_Appending() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            cache = _Cache()
            for layer in self.layers:
                x = layer(x, cache=cache)
            return x

    blocks = outline(Caching().eval(), Inputs((torch.randn(2, 4),)), set(), largest=0).blocks
    assert not {"layers.0", "layers.1"} & set(blocks)


class _Cache:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class _Appending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: _Cache) -> Tensor:
        cache.kept.append(x)
        return self.fc(torch.stack(cache.kept).sum(0))


def test_skip_connections_between_blocks_are_kept_until_they_are_read() -> None:
    class Joining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return self.conv(torch.cat([x, skip], 1))

    class Hourglass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.up = nn.ModuleList(Joining() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            kept = []
            for layer in self.down:
                kept.append(x)
                x = layer(x)
            for layer in self.up:
                x = layer(x, kept.pop())
            return x

    model = Hourglass().eval()
    found = outline(model, Inputs((torch.randn(2, 4, 6, 6),)), set(), largest=0)
    sources = [source.block for source in found.blocks["up.2"].sources]
    assert sources == ["up.1", "down.0"]
    assert found.way(found.blocks["up.0"], set(found.blocks["down.0"].sources)) is not None


def test_the_layers_of_a_hugging_face_network_are_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (8, 10), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][:, 7:] = 0
    example = {name: tensor[:1] for name, tensor in batch.items()}
    blocks = outline_of(model, example).blocks
    layers = [f"bert.encoder.layer.{number}" for number in range(4)]
    assert [path for path in blocks if path in layers] == layers
    assert blocks[layers[2]].sources[0].block == layers[1]
    runs: list[int] = []
    hook = model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: runs.append(1))
    q = ptq(model, example, calibration=[batch], weight_bits=4, methods=["gptq"])
    hook.remove()
    assert len(runs) < 30  # 24 layers: two runs each, if the network ran for every one
    assert all(s.scale == "fixed" for s in q.plan.quantizers if s.name.endswith("dense_weight"))
