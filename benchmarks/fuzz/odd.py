"""Networks, tensors and objects that people pass: one that works, and odd ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import slimkit as sk

__all__ = [
    "Answers",
    "Deep",
    "Loader",
    "Net",
    "NoCopy",
    "NoState",
    "NotInitialised",
    "Odd",
    "OwnError",
    "Raises",
    "fails",
    "falls_over",
    "half_on_meta",
    "hooked",
    "image_batches",
    "images",
    "nested",
    "nested_parameter",
    "network",
    "not_finite",
    "on_meta",
    "quantized",
    "shared",
    "sparse_weight",
    "with_attribute",
]


class Net(nn.Module):
    """Two convolutions with batch norms and a linear layer: 3 × 8 × 8 images, 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4)."""
        return self.head(self.second(self.first(x)).mean((2, 3)))


def network() -> Net:
    """A network that every verb can work with, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def images(count: int = 2) -> Tensor:
    """(count, 3, 8, 8), the same every time."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def image_batches() -> list[tuple[Tensor, Tensor]]:
    """Two labelled batches."""
    return [(images(4), torch.arange(4)), (images(4).flip(0), torch.arange(4).flip(0))]


class Raises(nn.Module):
    """A network whose forward raises what it is told."""

    def __init__(self, error: BaseException, inner: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 16, 3)
        self.error, self.inner = error, inner

    def forward(self, x: Tensor) -> Tensor:
        """Raises."""
        if self.inner:
            self.layer(x[:, :1])
        raise self.error


class OwnError(Exception):
    """An exception of the user's own."""


class Answers(nn.Module):
    """A network that answers something of its own."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Conv2d(3, 16, 3), answer

    def forward(self, x: Tensor) -> Any:
        """The answer to what the layer gives."""
        return self.answer(self.layer(x))


class NotInitialised(nn.Module):
    """A module whose constructor forgot torch's."""

    def __init__(self) -> None:
        self.size = 3


class Deep(nn.Module):
    """A forward without end."""

    def forward(self, x: Tensor) -> Tensor:
        """Calls itself."""
        return self.forward(x)


class NoCopy(Net):
    """A network that refuses to be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("this network is one of a kind")


class NoState(Net):
    """A network that keeps its weights to itself."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises."""
        raise KeyError("hidden")


def with_attribute(name: str, value: Any) -> nn.Module:
    """A network with one more attribute."""
    model = network()
    setattr(model, name, value)
    return model


def on_meta() -> nn.Module:
    """A network without values."""
    with torch.device("meta"):
        return Net()


def half_on_meta() -> nn.Module:
    """A network with one layer without values."""
    model = network()
    model.second[0].to(torch.device("meta"))
    return model


def nested() -> Tensor:
    """A nested tensor of two images."""
    return torch.nested.nested_tensor([torch.ones(3, 8, 8), torch.ones(3, 8, 8)])


def nested_parameter() -> nn.Module:
    """A network with a nested parameter."""
    model = network()
    model.extra = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    return model


def sparse_weight() -> nn.Module:
    """A network with a sparse weight."""
    model = network()
    model.head.weight = nn.Parameter(model.head.weight.detach().to_sparse())
    return model


def not_finite(value: float) -> nn.Module:
    """A network with one filter of nothing but ``value``."""
    model = network()
    with torch.no_grad():
        model.first[0].weight[0] = value
    return model


def hooked() -> nn.Module:
    """A network with a hook that raises."""
    model = network()

    def hook(*_: Any) -> None:
        raise LookupError("a hook of the user's own")

    model.head.register_forward_hook(hook)
    return model


def shared() -> nn.Module:
    """A network that runs one layer twice."""
    model = network()
    model.second[0] = nn.Conv2d(16, 16, 3, padding=1)
    model.first.append(model.second[0])
    return model


def quantized() -> nn.Module:
    """A network that is quantized already."""
    return sk.quantize.ptq(network(), images(), calibration=[images()])


def falls_over() -> Iterator[Any]:
    """A loader that raises behind its first batch."""
    yield images()
    raise RuntimeError("the loader fell over")


class Loader:
    """Batches with a role."""

    def __init__(self, role: str, batches: list[Any]) -> None:
        self.role, self.batches = role, batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Odd:
    """An object that raises at whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")

    def __repr__(self) -> str:
        raise RuntimeError("no name here")


def fails(*_: Any, **__: Any) -> Any:
    """A function that raises."""
    raise ZeroDivisionError("a function of the user's own")
