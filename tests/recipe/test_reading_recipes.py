from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimkit.quantize.observers.ranges import describe_observer
from slimkit.recipe import dump_recipe, load_recipe, parse_recipe, recipe_schema
from slimkit.recipe.stages.quantization import QuantizeOptions


def test_a_resolved_recipe_reads_back_as_the_same_recipe(values: dict[str, Any]) -> None:
    recipe = parse_recipe(values)
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert "weight_decay" in dump_recipe(recipe)  # defaults are written out


def test_overrides_are_yaml_and_reach_lists_and_absent_sections(values: dict[str, Any]) -> None:
    overrides = [
        "stages.train.lr=1e-3",
        "stages.recover.distill.0.temperature=2",
        "stages.recover.distill[0].weight=0.5",
        "require.accuracy_drop=1",
        "variants.third=[train, int8]",
        "model.args.width=8",
        "data.augment.flip=true",
    ]
    recipe = parse_recipe(values, overrides)
    train, recover = (recipe.model_dump()["stages"][name] for name in ("train", "recover"))
    assert train["lr"] == 1e-3
    assert recover["distill"][0]["temperature"] == 2
    assert recover["distill"][0]["weight"] == 0.5
    assert recipe.require.accuracy_drop == 1
    assert recipe.variants["third"] == ("train", "int8")
    assert recipe.model.args == {"width": 8}
    assert recipe.data.augment.flip


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("kl", "kl"),
        ("{type: percentile, percentile: 99.9}", "percentile(percentile=99.9)"),
        ("{type: mse}", "mse"),
        ("{type: 'slimkit.quantize:MSE', bins: 64}", "mse(bins=64)"),
    ],
)
def test_an_observer_is_a_name_or_a_mapping_with_settings(
    values: dict[str, Any], written: str, meant: str
) -> None:
    recipe = parse_recipe(values, [f"stages.int8.observer={written}"])
    stage = recipe.stages["int8"]
    assert isinstance(stage, QuantizeOptions)
    assert describe_observer(stage.chosen_observer()) == meant
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_numbers_without_a_decimal_point_and_merged_anchors_are_read(tmp_path: Path) -> None:
    text = """
name: anchors
data: {source: digits}
model: {name: "slimkit:resnet20", args: {in_channels: 1}}
stages:
  first: &same {type: train, lr: 1e-2, epochs: 2}
  second: {<<: *same, epochs: 3}
variants: {a: [first], b: [second]}
"""
    (tmp_path / "r.yaml").write_text(text)
    stages = load_recipe(tmp_path / "r.yaml").model_dump()["stages"]
    assert stages["first"]["lr"] == stages["second"]["lr"] == 0.01
    assert (stages["first"]["epochs"], stages["second"]["epochs"]) == (2, 3)


@pytest.mark.parametrize("name", ["quickstart", "cifar10/mobilenet_v1", "imagenet/mobilenet_v1"])
def test_recipes_that_come_with_slimkit_are_valid_and_fit_the_schema(name: str) -> None:
    recipe = load_recipe(name)
    assert len(recipe.variants) > 1


KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def _errors(schema: Any, value: Any, root: Any) -> bool:
    """A minimal JSON Schema check: the words that pydantic uses for recipes."""
    items = schema.get("items", {})
    if "$ref" in schema:
        return _errors(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    conditions = [s for s in schema.get("allOf", ()) if "if" in s]
    return (
        any(
            not _errors(s["if"], value, root) and _errors(s["then"], value, root)
            for s in conditions
        )
        or ("anyOf" in schema and all(_errors(s, value, root) for s in schema["anyOf"]))
        or value != schema.get("const", value)
        or value not in schema.get("enum", [value])
        or not isinstance(value, KINDS[schema["type"]] if "type" in schema else object)
        or (isinstance(value, str) and not re.search(schema.get("pattern", ""), value))
        or (isinstance(value, list) and any(_errors(items, v, root) for v in value))
        or (isinstance(value, dict) and _errors_in_mapping(schema, value, root))
    )


def _errors_in_mapping(schema: Any, value: dict[str, Any], root: Any) -> bool:
    known = schema.get("properties", {})
    extra = [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties")][0]
    if any(key not in value for key in schema.get("required", ())):
        return True
    if extra is False and any(key not in known for key in value):
        return True
    other = extra if isinstance(extra, dict) else {}
    return any(_errors(known.get(key, other), item, root) for key, item in value.items())


def test_the_schema_accepts_recipes_and_refuses_mistakes(values: dict[str, Any]) -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    plain = json.loads(json.dumps(parse_recipe(values).model_dump(mode="json")))
    assert not _errors(schema, values, schema)
    assert not _errors(schema, plain, schema)
    for path, value in [
        (("stages", "train", "lrr"), 1),
        (("stages", "train", "type"), "trian"),
        (("stages", "train"), {"lr": 0.1}),
        (("stages", "prune", "criterion"), "l3"),
        (("stages", "recover", "distill"), [{"type": "kd", "temperatur": 1}]),
        (("data", "sauce"), "digits"),
        (("task",), "clasification"),
        (("task",), {"type": "classification", "smoothing": 1}),
        (("seed",), "zero"),
    ]:
        wrong = json.loads(json.dumps(values))
        target = wrong
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        assert _errors(schema, wrong, schema), path


def test_the_schema_names_every_stage_criterion_and_loss() -> None:
    text = json.dumps(recipe_schema())
    for name in ("train", "prune", "ptq", "qat", "fpgm", "bn_scale", "mimic", "dist", "minmax"):
        assert f'"{name}"' in text
