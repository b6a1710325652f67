"""Public verbs answer bad arguments with one typed error, and hide no error of their own."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from benchmarks.fuzz import odd
from benchmarks.fuzz.arguments import cases
from torch import Tensor, nn

import slimkit as sk
from slimkit.doors import door, structure_door
from slimkit.errors import (
    ArtifactError,
    CaptureError,
    DataError,
    InputError,
    ModelError,
    SlimkitError,
    TrainingError,
)
from slimkit.outside import called, iterated, run_forward, signalled


@door
def verb(
    model: nn.Module | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    count: int = 1,
    share: float = 0.5,
    flag: bool = False,
    threads: int = 1,
    kind: Literal["l1", "l2"] = "l1",
    names: Sequence[str] = (),
    sizes: Mapping[str, tuple[int, int]] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> tuple[Any, ...]:
    """Answer the numbers."""
    return count, share, threads


def test_a_door_keeps_signature_and_docstring() -> None:
    assert str(inspect.signature(sk.profile)).startswith("(model: 'nn.Module', example_inputs")
    assert verb.__doc__ == "Answer the numbers."
    assert verb() == (1, 0.5, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": nn.ReLU}, r"model: expected a torch\.nn\.Module, got the class ReLU \(ReLU is"),
        ({"model": {"weight": torch.ones(1)}}, r"model: .*got dict \(weights are loaded into"),
        ({"count": 1.5}, "count: expected an integer, got 1.5"),
        ({"count": True}, "count: expected an integer, got True"),
        ({"count": 10**400}, "count: expected an integer ≤ 9223372036854775807, got a whole"),
        ({"threads": 0}, "threads: expected an integer ≥ 1, got 0"),
        ({"share": float("nan")}, "share: expected a finite number, got nan"),
        ({"share": "0.5"}, "share: expected a finite number, got '0.5'"),
        ({"flag": "no"}, "flag: expected True or False, got 'no'"),
        ({"kind": "L2"}, r"kind: expected l1 or l2, got 'L2' \(did you mean 'l2'"),
        ({"names": "image"}, "names: expected a list, of text, got 'image'"),
        ({"names": ["a", 5]}, r"names\.1: expected text, got 5"),
        ({"sizes": {"a": (1, 2, 3)}}, r"sizes\.a: expected \(an integer, an integer\)"),
        ({"sizes": {"a": (1, "b")}}, r"sizes\.a\.1: expected an integer, got 'b'"),
        ({"sizes": {1: (1, 2)}}, r"sizes\.keys: expected text, got 1"),
        ({"evaluate": 0.9}, "evaluate: expected a function, got 0.9"),
        ({"path": 5}, "path: expected a path, got 5"),
        ({"path": ""}, "path: the path is empty"),
        ({"path": "a\0b"}, "path: .* cannot be the name of a file"),
        ({"path": "\ud800"}, "path: .* cannot be the name of a file"),
        ({"path": "x" * 300}, "path: .* is too long: 300 bytes in one name"),
        ({"thread": 1}, r"verb: it has no argument 'thread' \(did you mean 'threads'"),
    ],
)
def test_a_wrong_argument_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verb(**given)


def test_a_wrong_call_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match="profile: missing a required argument: 'example_inputs'"):
        sk.profile(odd.network())  # type: ignore[call-arg]


def test_numbers_of_numpy_become_those_of_python() -> None:
    count, share, _ = verb(count=np.int64(3), share=np.float32(0.5))
    assert (type(count), type(share)) == (int, float)


def test_pipes_and_devices_are_neither_replaced_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="no regular file but a device, a pipe"):
        sk.Plan.load(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="no regular file but a device, a pipe"):
        sk.prune.plan(odd.network(), odd.images(), ratio=0.5).save(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyConv2d(8, 3)), r"model\.0\.weight: .* the layer is lazy"),
        (odd.half_on_meta(), r"model\.second\.0\.weight: it is on the device 'meta'"),
        (odd.nested_parameter(), r"model\.extra: it is a nested tensor"),
        (odd.NotInitialised(), r"model: NotInitialised is not initialised: .*super"),
    ],
    ids=["lazy", "meta", "nested", "not initialised"],
)
def test_a_network_that_cannot_be_worked_with_is_refused(model: nn.Module, message: str) -> None:
    x = odd.images()
    for call in (
        lambda: sk.profile(model, x),
        lambda: sk.prune.plan(model, x, ratio=0.5),
        lambda: sk.quantize.ptq(model, x, calibration=[x]),
        lambda: sk.reparam.fuse(model, x),
        lambda: sk.export(model, "net.onnx", x),
        lambda: sk.benchmark(model, backend="torch", inputs=x),
        lambda: sk.save(model, "folder"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_names_and_shapes_are_enough_where_no_values_are_read() -> None:
    @structure_door
    def names(model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    assert "head.weight" in names(odd.on_meta())


@pytest.mark.parametrize("inputs", [odd.nested(), (odd.nested(),), {"x": odd.nested()}])
def test_nested_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match="example_inputs: a nested tensor has no shape"):
        sk.profile(odd.network(), inputs)


def test_inputs_without_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"example_inputs: .*'meta' holds no values"):
        sk.profile(odd.network(), odd.images().to("meta"))


def test_what_a_network_raises_is_the_cause_of_an_error_that_names_the_module() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("no luck")

    model = nn.Sequential(nn.ReLU(), nn.Sequential(Inner()))
    with pytest.raises(CaptureError, match=r"1\.0: the forward failed with ZeroDivisionError: no"):
        sk.benchmark(model, backend="torch", inputs=torch.ones(1))
    with pytest.raises(CaptureError) as caught:
        run_forward(model, (torch.ones(1),), {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_network_that_cannot_be_copied_names_the_attribute() -> None:
    with pytest.raises(ModelError, match=r"model\.lock: it cannot be copied"):
        sk.reparam.fuse(odd.with_attribute("lock", threading.Lock()))


def test_an_error_of_the_verb_itself_stays_what_it_is() -> None:
    @door
    def broken(count: int) -> int:
        raise KeyError(count)

    with pytest.raises(KeyError):
        broken(3)

    def ours() -> None:
        raise KeyError("a mistake of Slimkit's own")

    ours.__module__ = "slimkit.prune"
    with pytest.raises(KeyError):
        called(ours, InputError, "argument")


def test_functions_of_the_users_are_named() -> None:
    def fails(*_: object) -> float:
        raise ZeroDivisionError("no luck")

    loader = odd.image_batches()
    settings = sk.train.TrainSettings(epochs=1)
    with pytest.raises(TrainingError, match="loss_fn: it failed with ZeroDivisionError: no luck"):
        sk.train.fit(odd.network(), loader, loss_fn=fails, settings=settings, progress=False)
    with pytest.raises(DataError, match="batches: it failed behind 1 entries with RuntimeError"):
        sk.train.reestimate_batch_norm(odd.network(), odd.falls_over())
    with pytest.raises(InputError, match="loader: expected something to iterate over, got int"):
        list(iterated(5, where="loader"))  # type: ignore[arg-type]


def test_a_signal_of_the_users_own_class_passes_through_a_callback() -> None:
    def stops() -> None:
        raise odd.OwnError

    def fails() -> None:
        raise ValueError("no luck")

    with pytest.raises(odd.OwnError):
        signalled(stops, TrainingError, "callbacks.0")
    with pytest.raises(TrainingError, match=r"callbacks\.0: it failed with ValueError: no luck"):
        signalled(fails, TrainingError, "callbacks.0")


def test_settings_name_the_field_and_the_nearest_choice() -> None:
    with pytest.raises(InputError, match="temperature: input should be greater than 0, got -1"):
        sk.distill.KD(temperature=-1)
    with pytest.raises(InputError, match=r"epoch: .*\(did you mean 'epochs'"):
        sk.train.TrainSettings(epoch=3)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"optimizer: .*got 'adam' \(did you mean 'adamw'"):
        sk.train.TrainSettings(optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"schedule\.final: "):
        sk.distill.KD(schedule={"final": -1})  # type: ignore[arg-type]


def test_bad_arguments_from_a_seed_end_typed() -> None:
    for case in cases(seed=7, count=120):
        try:
            result = case.act()
        except SlimkitError:
            continue
        assert case.judge is None or case.judge(result), case.name
