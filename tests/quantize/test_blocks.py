from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.inputs import Inputs
from slimkit.quantize.methods.blocks import Block, Outline, outline


class Residual(nn.Module):
    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.second(self.relu(self.first(x))))


class Network(nn.Module):
    def __init__(self, *, share: bool = False) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.stem = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU(inplace=True)
        blocks = [Residual(relu if share else nn.ReLU()) for _ in range(3)]
        self.stage = nn.Sequential(*blocks)
        self.twice = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(self.act(self.stem(x)))
        y = self.twice(self.twice(y))
        y += 1
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


def found(model: nn.Module, *, largest: int = 8) -> Outline:
    x = Inputs((torch.randn(2, 3, 8, 8),))
    whole = outline(model.eval(), x, set())
    layers = {a for a in whole.addresses if "conv2d" in a or "linear" in a}
    return outline(model, x, layers, largest=largest)


def sources(block: Block) -> list[str]:
    """Which block made each tensor that it is given; "" for what comes from outside."""
    return [source.block if source.made else "" for source in block.sources]


def test_residual_blocks_and_the_modules_between_them_are_blocks() -> None:
    blocks = found(Network()).blocks
    assert list(blocks) == ["stem", "act", "stage.0", "stage.1", "stage.2", "fc"]
    assert [sources(b) for b in blocks.values()] == [
        [""], ["stem"], ["act"], ["stage.0"], ["stage.1"], [""],
    ]  # fmt: skip
    assert "stage.0.first:conv2d#0" in blocks["stage.0"].addresses


def test_large_modules_are_taken_apart() -> None:
    blocks = found(Network(), largest=1).blocks
    assert "stage.0" not in blocks
    assert {"stage.0.first", "stage.0.second", "stage.2.second"} <= set(blocks)


def test_modules_that_share_a_function_with_others_cannot_run_alone() -> None:
    blocks = found(Network(share=True)).blocks
    assert "stage.1" not in blocks  # its calls of the shared ReLU are numbered from 2
    assert "stage.1.first" in blocks


def test_what_was_changed_in_place_is_not_what_a_block_made() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.second = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            y *= 2
            return self.second(y)

    assert sources(found(Changed()).blocks["second"]) == [""]
