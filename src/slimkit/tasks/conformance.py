"""Does a task keep its promises? Every member is asked, and the answers must fit each other.

For the tests of a task of one's own::

    check_task(MyTask(), MyData(source="…"), model=my_network())
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from torch import Tensor, nn

from slimkit.errors import SlimkitError, TaskError, nearest
from slimkit.inputs import Inputs, as_batch
from slimkit.modules import copy_module
from slimkit.runtime.structure import named_outputs
from slimkit.tasks.interface import TASKS, Answer, Metric, Task, answers_to
from slimkit.tasks.running import device_of, module_run
from slimkit.tasks.splits import Splits, first_batches
from slimkit.train.settings import TrainSettings

__all__ = ["check_task"]

ROLES = {"train": "train", "calibration": "train", "validation": "validation", "test": "test"}


def check_task(
    task: Task | type[Task] | str,
    settings: BaseModel | Mapping[str, Any] | None = None,
    *,
    model: nn.Module,
    smoke: bool = False,
) -> Splits:
    """Ask every member of a task for its answer, on one network and (some of) its data.

    Args:
        task: itself, its class, its name, or ``package.module:Class``.
        settings: of its data; a mapping is read as a recipe would; None takes the defaults.
        model: that fits the data; it is copied.
        smoke: take made-up data, as ``--smoke`` does, instead of reading any.

    Returns:
        The data, for checks of one's own.

    Raises:
        TaskError: the first member that is missing or answers wrongly, with what was expected.
    """
    checked = _instance(task)
    _check_declarations(checked)
    with _answering("data_settings", "reads the settings"):
        read = (
            settings
            if isinstance(settings, checked.data_settings)
            else checked.data_settings.model_validate(dict(settings or {}))
        )
    network = copy_module(model)
    with _answering("synthetic", "makes up data for a smoke run"):
        splits = checked.synthetic(read, copy_module(model), batches=2)
    _check_splits(splits, "synthetic")
    if not smoke:
        with _answering("load", "reads the data"):
            splits = checked.load(read)
        _check_splits(splits, "load")
    _check_inputs(checked, splits, network)
    _check_loss(checked, splits, network)
    scores = _check_scores(checked, splits, network)
    _check_deployment(checked, splits, network, scores)
    _check_texts(checked, splits, network)
    return splits


def _instance(task: Task | type[Task] | str) -> Task:
    if isinstance(task, Task):
        return task
    kind: object = TASKS.get(task) if isinstance(task, str) else task
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise TaskError(f"{task!r} is no subclass of slimkit.tasks.Task", where="task")
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        raise TaskError("it is missing", where=missing[0], hint=f"define {', '.join(missing)}")
    return kind.model_validate({})


def _fail(member: str, message: str, hint: str | None = None) -> TaskError:
    return TaskError(message, where=member, hint=hint)


@contextlib.contextmanager
def _answering(member: str, what: str) -> Iterator[None]:
    """Whatever a member raises is the answer to what it was asked for."""
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        raise _fail(member, f"{what}: {type(error).__name__}: {error}") from error


def _check_declarations(task: Task) -> None:
    """Class variables: name, settings of the data, metrics."""
    kind = type(task)
    settings = getattr(kind, "data_settings", None)
    if not (isinstance(settings, type) and issubclass(settings, BaseModel)):
        raise _fail("data_settings", f"expected a pydantic class, got {settings!r}")
    if not kind.model_fields["type"].default:
        raise _fail("type", "it has no default", 'write: type: Literal["name"] = "name"')
    metrics = getattr(kind, "metrics", ())
    if not metrics or not all(isinstance(metric, Metric) for metric in metrics):
        raise _fail("metrics", f"expected one or more slimkit.tasks.Metric, got {metrics!r}")
    names = [metric.name for metric in metrics]
    if len({*names}) < len(names):
        raise _fail("metrics", f"a name is there twice: {names}")


def _check_splits(splits: object, member: str) -> None:
    """Loaders with their roles, and facts that a report can hold."""
    if not isinstance(splits, Splits):
        raise _fail(member, f"expected slimkit.tasks.Splits, got {type(splits).__name__}")
    if not splits.fingerprint:
        raise _fail(member, "the fingerprint is empty: results of other data would be reused")
    for name, role in ROLES.items():
        loader = getattr(splits, name)
        if loader is None and name == "validation":
            continue
        for attribute in ("role", "batch_size", "augmented", "samples", "set_epoch", "set_seed"):
            if not hasattr(loader, attribute):
                raise _fail(
                    member,
                    f"the loader {name} has no {attribute}",
                    "slimkit.tasks.SampleLoader has all that is asked of one",
                )
        if loader.role != role:
            raise _fail(member, f"the loader {name} has the role {loader.role!r}, not {role!r}")
        if len(loader) < 1:
            raise _fail(member, f"the loader {name} has no batches")
        with _answering(member, f"yields the batches of {name}"):
            as_batch(next(iter(loader)), where=name)
    if _signature(splits.calibration) != _signature(splits.calibration):
        raise _fail(member, "the loader calibration yields another first batch the second time")
    for part in ("preprocessing", "facts"):
        _check_json(getattr(splits, part), member, part)


def _signature(loader: Any) -> list[tuple[tuple[int, ...], float]]:
    batch = as_batch(next(iter(loader)))
    return [(tuple(t.shape), float(t.double().sum())) for t in batch.inputs.tensors()]


def _check_json(value: Any, member: str, what: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise _fail(member, f"{what} cannot be written as JSON: {error}") from error


def _check_inputs(task: Task, splits: Splits, network: nn.Module) -> None:
    """Examples that the model takes, and a head that fits."""
    examples: list[object]
    with _answering("example_inputs", "gives calls of the model"):
        examples = [task.example_inputs(splits, count) for count in (1, 2)]
    for inputs in examples:
        if not isinstance(inputs, Inputs) or not inputs.tensors():
            raise _fail("example_inputs", f"expected slimkit.Inputs with tensors, got {inputs!r}")
    with _answering("check_head", "finds that the model fits"):
        task.check_head(network, splits)
    with _answering("model_arguments", "says what the data decide"):
        arguments = task.model_arguments(splits)
    _check_json(dict(arguments), "model_arguments", "it")


def _check_loss(task: Task, splits: Splits, network: nn.Module) -> None:
    """A finite scalar with gradients, in training and in evaluation mode."""
    batch = as_batch(next(iter(splits.train))).to(device_of(network))
    for training in (True, False):
        twin = copy_module(network).train(training)
        flags = [module.training for module in twin.modules()]
        with _answering("loss", f"in {'training' if training else 'evaluation'} mode"):
            answer: Any = task.loss(twin, batch)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise _fail("loss", f"expected (scalar, outputs), got {type(answer).__name__}")
        value = answer[0]
        if not isinstance(value, Tensor) or value.dim() or not math.isfinite(value.item()):
            raise _fail("loss", f"expected a finite scalar tensor, got {value!r}")
        if not value.requires_grad:
            raise _fail("loss", "it does not depend on the model's parameters")
        if flags != [module.training for module in twin.modules()]:
            raise _fail("loss", "it leaves the model in another mode", "use in_training(model)")
    loss_fn: object = task.loss_fn()
    if loss_fn is not None and not callable(loss_fn):
        raise _fail("loss_fn", f"expected a function or None, got {loss_fn!r}")
    with _answering("tuned", "takes what a training stage says"):
        tuned: object = task.tuned(TrainSettings())
    if not isinstance(tuned, Task):
        raise _fail("tuned", f"expected a task, got {type(tuned).__name__}")
    with _answering("teacher_inputs", "says what a teacher sees"), module_run(network) as run:
        run(task.teacher_inputs(batch))


def _check_scores(task: Task, splits: Splits, network: nn.Module) -> dict[str, float]:
    """All metrics within their intervals, and the same of a function as of the module."""
    some = list(first_batches(splits.test, 2))
    with _answering("scores", "measures a module"):
        scores: dict[str, Any] = dict(task.evaluate(network, some))
    known = {metric.name: metric for metric in task.metrics}
    if task.metric.name not in scores:
        hint = nearest(task.metric.name, scores)
        raise _fail("scores", f"the metric that decides, {task.metric.name}, is not there", hint)
    for name, value in scores.items():
        if not isinstance(value, int | float) or math.isnan(value):
            raise _fail("scores", f"{name} is {value!r}, no number")
        if name in known and not known[name].holds(value):
            low, high = known[name].low, known[name].high
            raise _fail("metrics", f"{name} is {value:g}, outside of {low} … {high}")
    try:
        task.evaluate(network, [])
    except SlimkitError:
        pass
    except Exception as error:
        raise _fail("scores", f"no batches are no InputError but {error!r}") from error
    else:
        raise _fail("scores", "no batches are not an error", "raise InputError, or read them all")
    return scores


def _check_deployment(
    task: Task, splits: Splits, network: nn.Module, scores: dict[str, float]
) -> None:
    """The exported module on prepared inputs, completed, is as good as the model itself."""
    some = list(first_batches(splits.test, 2))
    with _answering("exported", "gives the module for a file"):
        exported: object = task.exported(network, splits)
    if not isinstance(exported, nn.Module):
        raise _fail("exported", f"expected a module, got {type(exported).__name__}")

    with module_run(exported) as run:

        def file(inputs: Inputs) -> Any:
            with _answering("prepare", "makes inputs of the file"):
                prepared = task.prepare(inputs)
                found = run(prepared)
            named = {name or "output": tensor for name, tensor in named_outputs(found)}
            with _answering("complete", "makes outputs of the model"):
                return task.complete(named, inputs)

        again = dict(task.scores(answers_to(file, some, device_of(network))))
    name = task.metric.name
    if not math.isclose(again[name], scores[name], rel_tol=1e-3, abs_tol=1e-6):
        raise _fail(
            "complete",
            f"{name} of the exported module is {again[name]:g}, of the model {scores[name]:g}",
        )
    with _answering("export_options", "adds to the export"):
        dict(task.export_options(splits))


def _check_evidence(task: Task, splits: Splits, asked: list[Answer]) -> None:
    """What is kept of single answers: beside the same scores, and of a form for a report."""
    with _answering("examine", "scores and keeps"):
        examined = task.examine(iter(asked), splits)
        scores = dict(task.scores(iter(asked)))
    if dict(examined.scores) != scores:
        raise _fail("examine", f"its scores are {examined.scores}, those of scores() {scores}")
    _check_json(examined.record, "examine", "the record")
    record = json.loads(json.dumps(examined.record))
    with _answering("evidence", "tells what the records say"):
        evidence = task.evidence({"first": record, "last": record}, splits)
    _check_json(dict(evidence.variants), "evidence", "it")
    _check_json([dict(drawing) for drawing in evidence.drawings], "evidence", "its drawings")


def _check_texts(task: Task, splits: Splits, network: nn.Module) -> None:
    """Predictions, drawings, metadata and the script."""
    with task.running(network) as run:
        asked: list[Answer] = list(answers_to(run, first_batches(splits.test, 1)))
    outputs, batch = asked[0]
    with _answering("predictions", "says what outputs mean"):
        found = task.predictions(outputs, splits)
    if found and len(found) != (batch.size or len(found)):
        raise _fail("predictions", f"{len(found)} of them for {batch.size} samples")
    _check_json(found, "predictions", "they")
    with _answering("drawings", "draws"):
        drawings = task.drawings({"first": iter(asked), "last": iter(asked)}, splits)
        _check_json([dict(drawing) for drawing in drawings], "drawings", "they")
    _check_evidence(task, splits, asked)
    with _answering("metadata", "describes the file"):
        metadata = task.metadata(splits)
    if not all(isinstance(x, str) for x in (*metadata, *metadata.values())):
        raise _fail("metadata", "keys and values are strings", "json.dumps the values")
    with _answering("predict_script", "is Python"):
        compile(task.predict_script(splits), "predict.py", "exec")
