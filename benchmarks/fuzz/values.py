"""What people pass: bad and odd values of every kind of argument, each made anew."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.fuzz.odd import (
    Answers,
    Deep,
    Loader,
    Net,
    NoCopy,
    NoState,
    NotInitialised,
    Odd,
    OwnError,
    Raises,
    fails,
    falls_over,
    half_on_meta,
    hooked,
    image_batches,
    images,
    nested,
    nested_parameter,
    network,
    not_finite,
    on_meta,
    quantized,
    shared,
    sparse_weight,
    with_attribute,
)
from slimkit.inputs import Batch, Inputs

__all__ = ["POOLS", "Make"]

Make = Callable[[], Any]


ANYTHING: Mapping[str, Make] = {
    "None": lambda: None,
    "5": lambda: 5,
    "text": lambda: "text",
    "list": list,
    "dict": dict,
    "object": object,
    "odd": Odd,
    "class": lambda: Net,
    "tensor": lambda: torch.zeros(3),
    "array": lambda: np.zeros(3),
    "lambda": lambda: lambda: None,
    "nan": lambda: float("nan"),
}

MODELS: Mapping[str, Make] = {
    "a class": lambda: nn.Conv2d,
    "a state dict": lambda: network().state_dict(),
    "a forward": lambda: network().forward,
    "a list of layers": lambda: list(network().children()),
    "a ModuleList": lambda: nn.ModuleList(network().children()),
    "a ModuleDict": lambda: nn.ModuleDict({"a": nn.ReLU()}),
    "a plain Module": nn.Module,
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()),
    "lazy head": lambda: with_attribute("head", nn.LazyLinear(4)),
    "meta": on_meta,
    "partly meta": half_on_meta,
    "nested parameter": nested_parameter,
    "not initialised": NotInitialised,
    "without parameters": nn.ReLU,
    "empty": nn.Sequential,
    "raises ValueError": lambda: Raises(ValueError("no")),
    "raises KeyError": lambda: Raises(KeyError("no")),
    "raises its own": lambda: Raises(OwnError()),
    "raises StopIteration": lambda: Raises(StopIteration()),
    "raises NotImplementedError": lambda: Raises(NotImplementedError()),
    "raises AssertionError": lambda: Raises(AssertionError()),
    "raises in a layer": lambda: Raises(ValueError("no"), inner=True),
    "recursion": Deep,
    "hook raises": hooked,
    "holds a lock": lambda: with_attribute("lock", threading.Lock()),
    "holds a generator": lambda: with_attribute("parts", (i for i in range(3))),
    "holds bytes": lambda: with_attribute("file", io.BytesIO()),
    "no deep copy": lambda: NoCopy().eval(),
    "no state dict": lambda: NoState().eval(),
    "answers None": lambda: Answers(lambda _: None),
    "answers text": lambda: Answers(lambda _: "text"),
    "answers an object": lambda: Answers(lambda _: object()),
    "answers a number": lambda: Answers(lambda x: x.sum().item()),
    "answers a list": lambda: Answers(lambda x: [x, [x]]),
    "answers a dict": lambda: Answers(lambda x: {"a": x, 5: x}),
    "answers nested": lambda: Answers(lambda _: nested()),
    "half": lambda: network().half(),
    "double": lambda: network().double(),
    "complex": lambda: network().to(torch.complex64),
    "NaN weights": lambda: not_finite(float("nan")),
    "infinite weights": lambda: not_finite(float("inf")),
    "sparse weights": sparse_weight,
    "in training mode": lambda: network().train(),
    "quantized": quantized,
    "scripted": lambda: torch.jit.trace(network(), images()),
    "exported": lambda: torch.export.export(network(), (images(),)).module(),
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "data parallel": lambda: nn.DataParallel(network()),
    "shared layer": shared,
    "frozen": lambda: network().requires_grad_(requires_grad=False),
}

INPUTS: Mapping[str, Make] = {
    "a list": lambda: [images()],
    "an empty tuple": tuple,
    "an array": lambda: images().numpy(),
    "wrong channels": lambda: torch.zeros(2, 5, 8, 8),
    "wrong rank": lambda: torch.zeros(3),
    "scalar": lambda: torch.tensor(1.0),
    "no examples": lambda: torch.zeros(0, 3, 8, 8),
    "no pixels": lambda: torch.zeros(2, 3, 0, 0),
    "integers": lambda: torch.ones(2, 3, 8, 8, dtype=torch.int64),
    "bools": lambda: torch.ones(2, 3, 8, 8, dtype=torch.bool),
    "complex": lambda: torch.ones(2, 3, 8, 8, dtype=torch.complex64),
    "half": lambda: images().half(),
    "double": lambda: images().double(),
    "NaN": lambda: images() * float("nan"),
    "infinite": lambda: images() * float("inf"),
    "meta": lambda: images().to("meta"),
    "nested": nested,
    "nested in a tuple": lambda: (nested(),),
    "sparse": lambda: images().to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(images(), 0.1, 0, torch.quint8),
    "with gradients": lambda: images().requires_grad_(),
    "not a leaf": lambda: images().requires_grad_() * 2,
    "too many": lambda: (images(), images()),
    "wrong keyword": lambda: {"y": images()},
    "keys are numbers": lambda: {1: images()},
    "Inputs of a number": lambda: Inputs(5),  # type: ignore[arg-type]
    "Inputs of a tensor": lambda: Inputs(images()),  # type: ignore[arg-type]
    "Inputs of nothing": Inputs,
    "Inputs of None": lambda: Inputs(None, None),  # type: ignore[arg-type]
    "a batch": lambda: Batch(Inputs((images(),)), torch.arange(2)),
    "tuple of text": lambda: ("text",),
    "tuple of None": lambda: (None,),
    "a generator": lambda: (images() for _ in range(2)),
    "one image": lambda: images()[:1],
    "larger images": lambda: torch.ones(1, 3, 32, 16),
    "not contiguous": lambda: images().transpose(2, 3),
    "expanded": lambda: torch.zeros(1, 1, 1, 1).expand(2, 3, 8, 8),
    "a parameter": lambda: nn.Parameter(images()),
}

NUMBERS: Mapping[str, Make] = {
    "-1": lambda: -1,
    "0": lambda: 0,
    "1": lambda: 1,
    "2": lambda: 2,
    "1.5": lambda: 1.5,
    "0.5": lambda: 0.5,
    "-0.1": lambda: -0.1,
    "1e-300": lambda: 1e-300,
    "1e300": lambda: 1e300,
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "10**30": lambda: 10**30,
    "10**400": lambda: 10**400,
    "-10**400": lambda: -(10**400),
    "text 3": lambda: "3",
    "True": lambda: True,
    "numpy int": lambda: np.int64(3),
    "numpy float": lambda: np.float32(0.5),
    "numpy nan": lambda: np.float64("nan"),
    "0-d tensor": lambda: torch.tensor(0.5),
    "complex": lambda: 1j,
    "(1,)": lambda: (1,),
}

TEXTS: Mapping[str, Make] = {
    "empty": str,
    "unknown": lambda: "no such name",
    "nearly": lambda: "chanel",
    "bytes": lambda: b"l2",
    "colon": lambda: ":",
    "two colons": lambda: "no_such_module:b:c",
    "no module": lambda: "no_such_module:thing",
    "no attribute": lambda: "json:thing",
    "a function": lambda: "json:loads",
    "not callable": lambda: "math:pi",
    "dots": lambda: "..:..",
    "long": lambda: "x" * 10_000,
    "null": lambda: "a\0b",
    "surrogate": lambda: "\ud800",
    "escape": lambda: "\x1b[31mred",
    "newline": lambda: "a\nb",
    "format": lambda: "%s {0} {x}",
    "upper": lambda: "L2",
}


def _fifo() -> str:
    os.mkfifo("pipe.onnx")
    return "pipe.onnx"


def _in_a_file() -> str:
    Path("file").write_text("text", encoding="utf-8")
    return "file/a.onnx"


def _a_file() -> str:
    Path("file.onnx").write_text("text", encoding="utf-8")
    return "file.onnx"


def _dangling() -> str:
    Path("link.onnx").symlink_to("nowhere/at/all")
    return "link.onnx"


def _circle() -> str:
    Path("circle.onnx").symlink_to("circle.onnx")
    return "circle.onnx"


# Nothing outside of the folder that a case runs in: what writes is meant to write.
PATHS: Mapping[str, Make] = {
    "empty": str,
    "null": lambda: "a\0b.onnx",
    "surrogate": lambda: "\ud800.onnx",
    "long name": lambda: "x" * 300 + ".onnx",
    "long path": lambda: "/".join(["x" * 100] * 60) + "/a.onnx",
    "here": lambda: ".",
    "missing": lambda: "no/such/place/a.onnx",
    "in a file": _in_a_file,
    "a file": _a_file,
    "a pipe": _fifo,
    "a dangling link": _dangling,
    "a circle of links": _circle,
    "bytes": lambda: b"a.onnx",
    "no suffix": lambda: "model",
    "other suffix": lambda: "model.pt",
    "spaces": lambda: " .onnx",
    "Path": lambda: Path("a.onnx"),
    "home": lambda: "~/a.onnx",
}

PATTERNS: Mapping[str, Make] = {
    "empty": str,
    "bracket": lambda: "[",
    "star": lambda: "*",
    "unmatched": lambda: "no.such.layer",
    "list of numbers": lambda: [5],
    "list of None": lambda: [None],
    "list of lists": lambda: [["first"]],
    "a class": lambda: nn.Conv2d,
    "no module class": lambda: int,
    "an instance": nn.ReLU,
    "good": lambda: ["first*"],
    "bytes": lambda: b"first",
    "generator": lambda: (name for name in ("first.0",)),
    "raising": falls_over,
}

BATCHES: Mapping[str, Make] = {
    "one tensor": lambda: images(4),
    "nothing": list,
    "list of None": lambda: [None],
    "list of numbers": lambda: [1, 2],
    "list of text": lambda: ["a", "b"],
    "falls over": falls_over,
    "wrong shape": lambda: [torch.zeros(2, 5, 8, 8)],
    "NaN": lambda: [images() * float("nan")],
    "nested": lambda: [nested()],
    "meta": lambda: [images().to("meta")],
    "no examples": lambda: [torch.zeros(0, 3, 8, 8)],
    "integers": lambda: [torch.ones(2, 3, 8, 8, dtype=torch.int64)],
    "a mapping": lambda: {"train": images()},
    "mappings": lambda: [{"x": images(), "labels": torch.arange(2)}],
    "mappings of text": lambda: [{"x": "a"}],
    "arrays": lambda: [images().numpy()],
    "odd entries": lambda: [Odd()],
    "too many parts": lambda: [(images(), 1, 2, 3)],
    "test data": lambda: Loader("test", image_batches()),
    "labels of text": lambda: [(images(), ["a", "b"])],
    "labels too many": lambda: [(images(), torch.arange(7))],
    "labels out of range": lambda: [(images(), torch.tensor([99, -5]))],
    "labels of floats": lambda: [(images(), torch.tensor([0.5, 1.5]))],
    "no labels": lambda: [images()],
    "good": image_batches,
}

FUNCTIONS: Mapping[str, Make] = {
    "raises": lambda: fails,
    "no arguments": lambda: lambda: 1.0,
    "answers None": lambda: lambda *_, **__: None,
    "answers text": lambda: lambda *_, **__: "text",
    "answers NaN": lambda: lambda *_, **__: float("nan"),
    "answers infinity": lambda: lambda *_, **__: float("inf"),
    "answers a tensor": lambda: lambda *_, **__: torch.zeros(3),
    "answers a dict": lambda: lambda *_, **__: {},
    "answers 1": lambda: lambda *_, **__: 1.0,
    "a class": lambda: int,
    "text": lambda: "evaluate",
}

MAPPINGS: Mapping[str, Make] = {
    "keys are numbers": lambda: {1: 1},
    "values are text": lambda: {"first.0": "a"},
    "values are None": lambda: {"first.0": None},
    "values are lists": lambda: {"first.0": []},
    "unknown names": lambda: {"no such": 0.5},
    "negative": lambda: {"first.0": -1},
    "huge": lambda: {"first.0": 10**30},
    "NaN": lambda: {"first.0": float("nan")},
    "pairs": lambda: [("first.0", 1)],
    "pair values": lambda: {"first.0": (9, 3)},
    "nested": lambda: {"a": {"b": {"c": 1}}},
    "surrogates": lambda: {"\ud800": "\ud800"},
    "text values": lambda: {"a": "b"},
}

SEQUENCES: Mapping[str, Make] = {
    "text": lambda: "images",
    "numbers": lambda: [1, 2],
    "None inside": lambda: [None],
    "doubles": lambda: ["a", "a"],
    "too many": lambda: list("abcdefgh"),
    "empty text": lambda: [""],
    "NaN inside": lambda: [float("nan")],
    "negative": lambda: [-1, 0],
    "huge": lambda: [10**30],
    "objects": lambda: [object()],
    "a set": lambda: {"a"},
    "generator": lambda: (i for i in range(3)),
    "odd inside": lambda: [Odd()],
    "mappings": lambda: [{}],
    "unknown type": lambda: [{"type": "no such"}],
}

POOLS: Mapping[str, Mapping[str, Make]] = {
    "anything": ANYTHING,
    "model": MODELS,
    "inputs": INPUTS,
    "number": NUMBERS,
    "text": TEXTS,
    "path": PATHS,
    "pattern": PATTERNS,
    "batches": BATCHES,
    "function": FUNCTIONS,
    "mapping": MAPPINGS,
    "sequence": SEQUENCES,
}
"""Kind of argument → name → what makes a value of that kind."""
