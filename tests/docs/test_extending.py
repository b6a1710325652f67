"""The code on the page about extending Slimkit runs as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from slimkit.distill import DISTILL_LOSSES
from slimkit.models import MODELS
from slimkit.prune import CRITERIA
from slimkit.quantize import TARGETS
from slimkit.recipe import STAGES, parse_recipe, run_recipe
from slimkit.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def blocks(language: str) -> list[tuple[int, str]]:
    """Fenced blocks of one language with the line they start on."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


@pytest.fixture(scope="module")
def my_methods() -> Iterator[ModuleType]:
    """All Python blocks of the page, run one after the other as one module."""
    module = ModuleType("my_methods")
    module.__file__ = str(PAGE)
    with ExitStack() as stack:
        for registry in (CRITERIA, DISTILL_LOSSES, STAGES, MODELS, TARGETS, TASKS):
            stack.enter_context(registry.scratch())
        stack.callback(sys.modules.pop, "my_methods")
        sys.modules["my_methods"] = module
        for line, source in blocks("python"):
            # blank lines in front make tracebacks show the line of the page
            exec(compile("\n" * line + source, str(PAGE), "exec"), module.__dict__)
        yield module


def test_the_page_has_one_of_each() -> None:
    code = "".join(source for _, source in blocks("python"))
    for registry in ("CRITERIA", "DISTILL_LOSSES", "STAGES", "MODELS", "TASKS"):
        assert f"@{registry}.register(" in code
    assert "TARGETS.register(" in code
    assert len(blocks("yaml")) == 2


def test_the_python_blocks_run(my_methods: ModuleType) -> None:
    assert my_methods.plan.kept
    assert my_methods.network.conv1.weight.grad is not None
    assert my_methods.quantized.plan.target == "my_npu"


def test_the_recipe_runs(my_methods: ModuleType, tmp_path: Path) -> None:
    (_, text) = blocks("yaml")[-1]
    recipe = parse_recipe(yaml.safe_load(text))
    report = run_recipe(recipe, tmp_path / "run", smoke=True, progress=False)
    names = [variant["name"] for variant in report["variants"]]
    assert names == ["baseline", "final"]
    assert [stage["name"] for stage in report["variants"][1]["stages"]] == [
        "train",
        "prune",
        "recover",
        "clip",
    ]


def test_the_recipe_of_the_task_runs(my_methods: ModuleType, tmp_path: Path) -> None:
    (_, text) = blocks("yaml")[0]
    report = run_recipe(parse_recipe(yaml.safe_load(text)), tmp_path, smoke=True, progress=False)
    assert all(variant["metrics"]["rmse"] > 0 for variant in report["variants"])
    assert report["task"]["metrics"][0]["label"] == "RMSE"
    assert "RMSE" in (tmp_path / "report.html").read_text(encoding="utf-8")
