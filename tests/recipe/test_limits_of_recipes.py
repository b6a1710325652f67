"""What no recipe means (billion laughs, absurd numbers) is refused at once, and typed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from slimkit.errors import RecipeError, SlimkitError
from slimkit.recipe import load_recipe, parse_recipe
from slimkit.recipe.loading import dump_recipe
from slimkit.recipe.yaml_text import parse_yaml

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x0: 1, y0: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], x{n}: *a{n - 1}, y{n}: *a{n - 1}}}\n"
    for n in range(1, 20)
)
TEXTS = {
    "laughs": (LAUGHS, "more than 20000 values"),
    "merges": (MERGES, "more than 20000 values"),
    "brackets": ("[" * 100_000, "nested more than 40"),
    "braces": ("{a: " * 5_000, "nested more than 40"),
    "indented": ("".join(" " * n + f"k{n}:\n" for n in range(200)), "nested more than 40"),
    "circle": ("a: &a [1, *a]", "within what it names"),
    "digits": ("seed: " + "1" * 5_000, "cannot read '1111"),
    "hexadecimal": ("seed: 0x" + "f" * 5_000, "more than 64 bits"),
    "large": ("seed: 100000000000000000000", "more than 64 bits"),
    "date": ("name: 2026-13-45", "cannot read '2026-13-45'"),
    "tag": ("name: !!int what", "cannot read 'what'"),
    "bool": ("name: !!bool what", "cannot read 'what'"),
    "character": ('name: "\\UFFFFFFFF"', "not valid YAML"),
    "surrogate": ('name: "\\ud800"', "not Unicode"),
    "control": ("name: \x07", "not valid YAML"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_text_is_one_error_within_a_second(name: str, tmp_path: Path) -> None:
    text, told = TEXTS[name]
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(RecipeError, match=told):
        load_recipe(path)
    with pytest.raises(RecipeError, match=told):
        load_recipe("quickstart", [f"name={text}"])
    assert time.perf_counter() - started < 5


def test_aliases_and_merges_within_the_limits_are_read() -> None:
    found = parse_yaml("a: &a {x: 1, z: 1e-4}\nb: {<<: *a, x: 2}\nc: [*a, *a]\nd: *a\n", "text")
    a = {"x": 1, "z": 1e-4}
    assert found == {"a": a, "b": {"x": 2, "z": 1e-4}, "c": [a, a], "d": a}


def test_a_file_that_is_too_large_or_too_deep_a_value_is_refused(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(dump_recipe(parse_recipe(values)) + "# " + "x" * 2**20)
    with pytest.raises(RecipeError, match="more than 1048576 bytes"):
        load_recipe(path)
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(RecipeError, match="at most 40 deep"):
        parse_recipe({**values, "name": deep})
    values["model"]["args"] = values["model"]
    with pytest.raises(RecipeError, match="at most 40 deep"):
        parse_recipe(values)
    for path_given in (".".join("a" * 5_000), "variants.baseline.²", "stages.x" + "[0]" * 99):
        with pytest.raises(RecipeError):
            load_recipe("quickstart", [f"{path_given}=1"])


ABSURD = [
    ("stages.train.epochs=.inf", "at most 100000"),
    ("stages.train.epochs=1e9", "at most 100000"),
    ("stages.train.epochs=.nan", "at most 100000, got nan"),
    ("stages.train.lr=.inf", "at most 1000"),
    ("stages.train.weight_decay=.inf", "at most 1000"),
    ("stages.train.loss_weight=.inf", "finite"),
    ("stages.train.warmup_epochs=.inf", "at most 100000"),
    ("stages.train.clip_grad_norm=.inf", "finite"),
    ("stages.int8.epochs=.inf", "at most 100000"),
    ("stages.int8.lr=.inf", "at most 1000"),
    ("stages.prune.steps=1e9", "at most 1000"),
    ("stages.prune.threads=5000", "at most 1024"),
    ("data.augment.crop=1e9", "at most 4096"),
    ("data.augment.cutout=1e9", "at most 4096"),
    ("data.batch_size=1e9", "at most 65536"),
    ("data.eval_batch_size=1e9", "at most 65536"),
    ("data.seed=-1", "at least 0"),
    ("measure.backends=[{name: onnxruntime, threads: 5000}]", "at most 1024"),
    ("measure.backends=[{name: onnxruntime, batch: 1e9}]", "at most 65536"),
    ("measure.seconds=.inf", "at most 3600"),
]


@pytest.mark.parametrize(("override", "told"), ABSURD, ids=[case[0] for case in ABSURD])
def test_absurd_numbers_are_refused_with_the_range(
    values: dict[str, Any], override: str, told: str
) -> None:
    path = override.partition("=")[0]
    with pytest.raises(RecipeError, match=told) as caught:
        parse_recipe(values, [override])
    assert (caught.value.where or "").startswith(path)


def test_a_factory_whose_module_fails_names_file_and_line(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimkit.recipe.cache import Cache
    from slimkit.recipe.workbench import Workbench

    (tmp_path / "unfinished_models.py").write_text("import torch\n\nWIDTH = 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    values["model"]["name"] = "unfinished_models:net"
    with pytest.raises(SlimkitError, match=r"model\.name.*unfinished_models\.py:3: ZeroDivision"):
        Workbench(parse_recipe(values), Cache(tmp_path / "cache")).check_models()
    values["stages"]["prune"]["criterion"] = "unfinished_models:score"
    with pytest.raises(RecipeError, match=r"stages\.prune\.criterion.*models\.py:3"):
        parse_recipe(values)


@pytest.mark.parametrize(
    "setting",
    [
        "stages.train.epochs=.inf",
        "stages.train.log_every=10000000000",
        "stages.train.loss_weight=1e300",
        "data.augment={crop: 1000000000}",
        "data.batch_size=1000000000",
        "data.limit=10000000000",
        "measure.backends=[{threads: 5000}]",
        "require.latency_ratio=.inf",
        "require.accuracy_drop=.nan",
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"at most|at least|less than|finite"):
        load_recipe("quickstart", [setting])
