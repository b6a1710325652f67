"""What the README and the pages show runs as it stands, and what they list is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from slimkit.distill import CONNECTORS, DISTILL_LOSSES, GENERATION
from slimkit.prune import ALLOCATIONS, CRITERIA
from slimkit.quantize import METHODS, OBSERVERS
from slimkit.recipe import STAGES, load_recipe, parse_recipe, run_recipe
from slimkit.recipe.schema.recipe import (
    BackendSettings,
    MeasureSettings,
    ModelSettings,
    Recipe,
    RequireSettings,
)
from slimkit.search import SAMPLERS
from slimkit.tasks.data.settings import AugmentSettings, DataSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "docs/training.md",
    "docs/detection.md",
    "docs/segmentation.md",
    "docs/sparsity.md",
    "docs/pruning.md",
    "docs/quantization.md",
    "docs/export.md",
    "docs/distillation.md",
    "docs/knowledge.md",
    "docs/search.md",
]


def _blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_on_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = _blocks(page, "python")
    assert blocks
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks).replace("224, 224", "64, 64")  # the same, faster
    with SAMPLERS.scratch(), OBSERVERS.scratch():
        # a dataclass looks its module up
        exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_the_readme_example_is_short() -> None:
    (example,) = _blocks("README.md", "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 11


def test_the_recipe_on_the_page_is_valid() -> None:
    (text,) = _blocks("docs/recipes.md", "yaml")
    recipe = parse_recipe(yaml.safe_load(text))
    assert list(recipe.variants) == ["baseline", "final"]


def test_the_recipes_about_distillation_are_valid(tmp_path: Path) -> None:
    """Each is a whole one, or becomes one with a first stage; the last one runs."""
    (*parts, ablation) = _blocks("docs/distillation.md", "yaml")
    for text in parts:
        values = yaml.safe_load(text)
        values.setdefault("variants", {"final": list(values["stages"])})
        values["stages"].setdefault("train", {"type": "train"})
        whole = {"name": "page", "data": {}, "model": {"name": "slimkit:resnet20"}, **values}
        recipe = parse_recipe(whole)
        assert any(getattr(stage, "distill", ()) for stage in recipe.stages.values())
    file = tmp_path / "losses.yaml"
    file.write_text(ablation, encoding="utf-8")
    commands = "".join(_blocks("docs/distillation.md", "console"))
    edits = [edit for edit in re.findall(r"--set (\S+)", commands) if "$" not in edit]
    assert len(edits) == 2
    assert list(load_recipe(file).variants) == ["unpruned", "plain", "kd", "dkd", "features"]
    only = "variants={features: [train, prune, features]}"
    recipe = load_recipe(file, [*edits, only, "measure.seconds=0.02"])
    report = run_recipe(recipe, tmp_path / "run", smoke=True, progress=False)
    last = report["variants"][-1]["stages"][-1]["settings"]
    assert [loss["type"] for loss in last["distill"]] == ["kd", "pkd"]


@pytest.mark.parametrize(
    "settings",
    [
        Recipe, DataSettings, AugmentSettings, ModelSettings, MeasureSettings, BackendSettings,
        RequireSettings, *(STAGES.get(name) for name in ("train", "prune", "ptq", "qat")),
    ],
)  # fmt: skip
def test_the_reference_of_recipes_names_every_key(settings: type[BaseModel]) -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)`", page))
    assert set(settings.model_fields) - {"type"} <= named


def test_registered_names_are_documented() -> None:
    for page, registry in (
        ("docs/pruning.md", CRITERIA),
        ("docs/pruning.md", ALLOCATIONS),
        ("docs/quantization.md", OBSERVERS),
        ("docs/quantization.md", METHODS),
        ("docs/distillation.md", DISTILL_LOSSES),
        ("docs/distillation.md", CONNECTORS),
        ("docs/distillation.md", GENERATION),
    ):
        text = (ROOT / page).read_text(encoding="utf-8")
        missing = [name for name in registry.names() if name not in text and name != "random"]
        assert not missing, f"{page} does not mention {missing}"


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")]:
        links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        local = [link for link in links if "://" not in link]
        broken += [f"{page.name}: {link}" for link in local if not (page.parent / link).exists()]
    assert not broken
