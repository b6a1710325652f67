"""Every effective setting and every piece of the user's code is in a key."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import slimkit
from slimkit.models import MODELS
from slimkit.prune.criteria.scores import CRITERIA
from slimkit.recipe import parse_recipe
from slimkit.recipe.chains import resolve_steps
from slimkit.recipe.keys import Keys, essence
from slimkit.recipe.schema import methods
from slimkit.recipe.stages.pruning import PruneStage
from slimkit.recipe.stages.quantization import PtqStage
from slimkit.recipe.stages.training import TrainStage

CODE = """\
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from slimkit.distill.losses.connectors import ConnectorSettings
from slimkit.distill.losses.interface import DistillLoss
from slimkit.quantize.observers.ranges import MinMax
from slimkit.recipe import Stage, StageResult
from tiny_models import tiny


def score(group, tensors):
    return torch.arange(group.size).float()


@dataclass(frozen=True)
class Criterion:
    power: int = 2

    def __call__(self, group, tensors):
        return torch.arange(group.size).float() ** self.power


@dataclass(frozen=True)
class Allocation:
    def __call__(self, space):
        return lambda fraction: {}


@dataclass
class Observer(MinMax):
    pass


@dataclass(frozen=True)
class Method:
    def repair(self, *args, **kwargs):
        pass


class Loss(DistillLoss):
    type: Literal["mine"] = "mine"

    def compute(self, student, teacher):
        return (student - teacher).abs().mean()


def distance(input, target):
    return (input - target).abs().mean()


class Mine(Stage):
    type: Literal["mine"] = "mine"
    options: Mapping[str, Any] = {}

    def run(self, model, context):
        return StageResult(model)


def network(num_classes=10):
    return tiny(num_classes)
"""

PLACES: dict[str, dict[str, Any]] = {
    "criterion": {"type": "prune", "ratio": 0.5, "criterion": "own_code:score"},
    "settings of a criterion": {
        "type": "prune",
        "ratio": 0.5,
        "criterion": {"type": "own_code:Criterion", "power": 3},
    },
    "allocation": {"type": "prune", "ratio": 0.5, "allocation": "own_code:Allocation"},
    "observer": {"type": "ptq", "observer": "own_code:Observer"},
    "method": {"type": "ptq", "methods": ["equalize", "own_code:Method"]},
    "loss": {"type": "train", "teacher": "base", "distill": [{"type": "own_code:Loss"}]},
    "function as a loss": {
        "type": "train",
        "teacher": "base",
        "distill": [{"type": "function", "function": "own_code:distance"}],
    },
    "connector": {
        "type": "train",
        "teacher": "base",
        "distill": [
            {
                "type": "mimic",
                "student": "bn2",
                "connector": {"type": "module", "module": "own_code:network"},
            }
        ],
    },
    "delivered function": {
        "type": "train",
        "teacher": "base",
        "distill": [{"type": "kd"}],
        "deliver": ["own_code:distance"],
    },
    "stage": {"type": "own_code:Mine"},
    "somewhere in a stage": {
        "type": "tiny_stage:Free",
        "options": {"list": [{"deep": "own_code:score"}]},
    },
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write a module and forget what was loaded of it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: set[str] = set()

    def write(name: str, text: str, *, reload: bool = True) -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.add(name.partition(".")[0])
        if reload:
            forget(written)

    yield write
    forget(written)


def forget(packages: set[str]) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] in packages]:
        del sys.modules[module]
    importlib.invalidate_caches()


FREE = (
    "from typing import Any, Literal\n"
    "from slimkit.recipe import Stage, StageResult\n"
    "class Free(Stage):\n"
    "    type: Literal['free'] = 'free'\n"
    "    options: dict[str, Any] = {}\n"
    "    def run(self, model, context):\n"
    "        return StageResult(model)\n"
)


def key(values: dict[str, Any], stage: dict[str, Any], **recipe: Any) -> str:
    changed = {
        **values,
        "stages": {"base": {"type": "train"}, "mine": stage},
        "variants": {"base": ["base"], "final": ["mine"]},
        **recipe,
    }
    parsed = parse_recipe(changed)
    return Keys(parsed, resolve_steps(parsed), "data").chain(("mine",))


@pytest.mark.parametrize("place", PLACES)
def test_edited_code_is_another_key_wherever_it_is_named(
    values: dict[str, Any], write: Callable[..., None], place: str
) -> None:
    write("tiny_stage", FREE)
    keys = []
    for text in (CODE, CODE, CODE + "# edited\n"):
        write("own_code", text)
        keys.append(key(values, PLACES[place]))
    assert keys[0] == keys[1] != keys[2]


def test_the_code_of_a_networks_factory_and_of_its_arguments_is_part_of_the_key(
    values: dict[str, Any], write: Callable[..., None]
) -> None:
    train = {"type": "train"}
    for model in (
        {"name": "own_code:network"},
        {"name": "slimkit:resnet20", "args": {"in_channels": 1, "norm": "own_code:distance"}},
    ):
        keys = []
        for text in (CODE, CODE, CODE + "# edited\n"):
            write("own_code", text)
            keys.append(key(values, train, model=model))
        assert keys[0] == keys[1] != keys[2]


def test_the_code_and_the_settings_of_a_task_are_part_of_every_key(
    values: dict[str, Any], write: Callable[..., None]
) -> None:
    text = (
        "from typing import Literal\n"
        "from slimkit.tasks import ClassificationTask\n"
        "class Mine(ClassificationTask):\n"
        "    type: Literal['mine'] = 'mine'\n"
        "    sharpness: float = 1.0\n"
    )
    keys = [key(values, {"type": "train"})]
    for edited in (text, text + "# edited\n"):
        write("own_task", edited)
        tasks = ["own_task:Mine", {"type": "own_task:Mine", "sharpness": 2}]
        keys += [key(values, {"type": "train"}, task=task) for task in tasks]
    assert len(set(keys)) == 5


def test_imports_between_the_users_own_files_are_followed(
    values: dict[str, Any], write: Callable[..., None]
) -> None:
    stage = {"type": "prune", "ratio": 0.5, "criterion": "own.scores:score"}
    files = {
        "own.__init__": "",
        "own.scores": "import torch\nfrom .inner import helper\nfrom own.inner.again import *\n"
        "def score(group, tensors):\n    import own_far\n    return helper(group)\n"
        "try:\n    import not_installed_anywhere\nexcept ImportError:\n    pass\n",
        "own.inner.__init__": "",
        "own.inner.helper": "import own.scores\ndef helper(group):\n    return 1\n",
        "own.inner.again": "x = 1\n",
        "own.unused": "",
        "own_far": "import numpy, torch, slimkit\n",
    }
    for name, text in files.items():
        write(name, text)
    before = key(values, stage)
    for name, text in files.items():
        write(name, text + "\n# edited\n")
        assert (key(values, stage) == before) == (name == "own.unused"), name
        write(name, text)
    assert key(values, stage) == before


def test_code_that_is_edited_but_not_loaded_again_is_not_what_runs(
    values: dict[str, Any], write: Callable[..., None]
) -> None:
    stage = PLACES["criterion"]
    write("own_code", CODE)
    before = key(values, stage)
    write("own_code", CODE + "# edited\n", reload=False)
    assert key(values, stage) == before
    importlib.reload(sys.modules["own_code"])
    assert key(values, stage) != before


def test_code_registered_under_a_plain_name_is_known(
    values: dict[str, Any], write: Callable[..., None]
) -> None:
    keys = []
    for text in (CODE, CODE + "# edited\n"):
        write("own_code", text)
        with CRITERIA.scratch():
            CRITERIA.register("plain")(importlib.import_module("own_code").score)
            keys.append(key(values, {"type": "prune", "ratio": 0.5, "criterion": "plain"}))
        with MODELS.scratch():
            MODELS.register("own")(importlib.import_module("own_code").network)
            keys.append(key(values, {"type": "train"}, model={"name": "slimkit:own"}))
    assert len(set(keys)) == 4


def test_code_without_a_file_is_never_taken_for_that_of_another_process(
    values: dict[str, Any],
) -> None:
    program = (
        "import sys, types; typed = types.ModuleType('typed'); sys.modules['typed'] = typed\n"
        "exec('def score(group, tensors): ...', typed.__dict__)\n"
        "from slimkit.recipe import parse_recipe\n"
        "from slimkit.recipe.chains import resolve_steps\n"
        "from slimkit.recipe.keys import Keys\n"
        "import json\n"
        "recipe = parse_recipe(json.loads(sys.argv[1]))\n"
        "keys = [Keys(recipe, resolve_steps(recipe), 'd') for _ in range(2)]\n"
        "print(*(k.chain((name,)) for name in recipe.stages for k in keys))\n"
    )
    recipe = {
        **values,
        "model": {"name": "slimkit:resnet20", "args": {"in_channels": 1}},
        "stages": {
            "typed": {"type": "prune", "ratio": 0.5, "criterion": "typed:score"},
            "plain": {"type": "qat", "skip": ["fc"]},
        },
        "variants": {"a": ["typed"], "b": ["plain"]},
    }
    found = []
    for seed in ("1", "2"):
        path = str(Path(slimkit.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(recipe)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout.split())
    (first, first_again, plain, _), (second, *_, other_plain, _) = found
    assert first == first_again != second
    assert plain == other_plain  # nor does the order of hashing change a key


def test_a_changed_default_is_a_changed_key(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [
        {"type": "prune", "ratio": 0.5, "criterion": "taylor"},
        {"type": "prune", "ratio": 0.5, "criterion": {"type": "taylor", "squared": False}},
        {"type": "ptq", "observer": "percentile"},
        {"type": "train", "lr": 0.1},  # its default
        {"type": "train"},
    ]
    before = [key(values, stage) for stage in stages]
    assert before[0] == before[1]
    assert before[3] == before[4]
    from slimkit.prune.criteria.gradients import Taylor
    from slimkit.quantize.observers.ranges import Percentile

    with monkeypatch.context() as patch:
        patch.setattr(Taylor.__dataclass_fields__["squared"], "default", True)
        patch.setattr(Percentile.__dataclass_fields__["percentile"], "default", 98.0)
        patch.setattr(TrainStage.model_fields["momentum"], "default", 0.8)
        methods._settings_class.cache_clear()
        TrainStage.model_rebuild(force=True)
        after = [key(values, stage) for stage in stages]
    methods._settings_class.cache_clear()
    TrainStage.model_rebuild(force=True)
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [False, True, False, False, False]
    assert [key(values, stage) for stage in stages] == before


def test_a_field_that_a_later_version_adds_changes_the_key_even_at_its_default() -> None:
    class Later(PruneStage):
        more: int = 0

    assert essence(Later(ratio=0.5)) == {**essence(PruneStage(ratio=0.5)), "more": 0}


def test_the_order_of_keys_and_how_a_number_is_written_do_not_matter(
    values: dict[str, Any],
) -> None:
    stage = {"type": "train", "epochs": 10, "lr": 1}
    assert key(values, stage) == key(values, {"lr": 1.0, "epochs": 10.0, "type": "train"})
    limits = {"conv1": [1, 8], "conv2": [2, None]}
    turned = dict(reversed(limits.items()))
    base = {"type": "prune", "ratio": 0.5}
    assert key(values, {**base, "limits": limits}) == key(values, {"limits": turned, **base})
    assert key(values, {**base, "limits": limits}) != key(values, base)


def test_what_a_target_of_ones_own_says_is_part_of_the_key(
    values: dict[str, Any], write: Callable[..., None]
) -> None:
    from slimkit.quantize.targets import TARGETS, Target

    keys = []
    for bits in ("int32", "int16_pairs", "int32"):
        with TARGETS.scratch():
            TARGETS.register("mine")(Target("mine", sums=bits))  # type: ignore[arg-type]
            keys.append(key(values, {"type": "ptq", "target": "mine"}))
    assert keys[0] == keys[2] != keys[1]
    assert essence(PtqStage()) != essence(PtqStage(target="openvino"))


@dataclass(frozen=True)
class _Plain:
    numbers: frozenset[int] = frozenset({3, 1})
    path: Path = Path("x")


def test_settings_of_every_form_become_plain_values() -> None:
    value = {"a": _Plain(), "b": (1.0, 0.5, True, None), "c": {2, 1}, "d": [json.dumps]}
    assert essence(value) == {
        "a": {"type": "_Plain", "numbers": [1, 3], "path": "x"},
        "b": [1, 0.5, True, None],
        "c": [1, 2],
        "d": ["json:dumps"],
    }
