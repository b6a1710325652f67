"""Trains small networks in as many processes as the environment says; writes what came out.

Started by ``test_processes.py``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.inputs import Batch
from slimkit.train import StepContext, StepTools, TrainSettings, fit


class Paths(nn.Module):
    """A supernet of two paths: one of them, or both one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.head, self.path = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.a, self.b)[self.path](x))


class Shards:
    """Six batches of eight; each process sees its part of every batch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (
                torch.randn(8, 6, generator=generator),
                torch.randint(0, 3, (8,), generator=generator),
            )
            for _ in range(6)
        ]
        self.shard(0, 1)

    def shard(self, rank: int, world_size: int) -> None:
        self.part = slice(rank, None, world_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield images[self.part], labels[self.part]


class Scale(nn.Module):
    """A term with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, context: StepContext) -> Tensor:
        return (self.scale * context.outputs).square().mean()


def take_paths(tools: StepTools, batch: Batch) -> None:
    """Both paths, after some steps with the first alone."""
    for path in (0, 1) if tools.step > 2 else (0,):
        tools.model.path = path
        tools.backward(tools.loss(tools.forward(batch), batch))


def trained(step: Any, accumulate: int) -> list[float]:
    network, term = Paths(), Scale()
    if step is None:
        network.b = nn.Identity()
    settings = TrainSettings(
        epochs=2, lr=0.05, precision="fp32", device="cpu", accumulate=accumulate, clip_grad_norm=0.5
    )
    fit(
        network, Shards(), loss_fn=F.cross_entropy, step=step, losses=[term], settings=settings,
        progress=False,
    )  # fmt: skip
    return [float(p.detach().double().sum()) for p in (*network.parameters(), term.scale)]


def all_runs() -> dict[str, list[float]]:
    """Kind of step and batches per step → sums of the trained parameters."""
    return {
        f"{getattr(step, '__name__', 'plain')} {accumulate}": trained(step, accumulate)
        for step in (None, take_paths)
        for accumulate in (1, 2)
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    sums = all_runs()
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(sums), encoding="utf-8")
