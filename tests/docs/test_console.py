"""Every console line of the README and the pages runs: as printed, or with --smoke --dry-run.

``NOT_RUN`` names the others, each with its reason.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimkit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/guides/*.md"))
PAGES = [
    "README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))),
]
NOT_RUN = {
    "make demo": "makes an environment and trains for minutes: what continuous integration does",
    "make test": "it is what runs this",
    "pip install": "needs a network",
    "python -m benchmarks.": "measures for minutes, with a published file or data",
    "python runs/": "of a finished run",
    "slimkit predict runs/": "of a finished run: tests/cli predict with a file",
    "slimkit compare runs/": "of finished runs: tests/cli compare two",
    "slimkit evaluate": "needs weights and data of one's own: tests/cli evaluate with small ones",
    "slimkit export torchvision:resnet18 --checkpoint": "needs weights: a guide exports",
    "slimkit benchmark resnet18.onnx": "needs that file: the guides time two",
    "slimkit profile resnet18.onnx": "needs that file: tests/cli profile one",
    "slimkit quantize torchvision:resnet18": "needs weights and photographs: the guides quantize",
    "slimkit run student.yaml": "needs what a teacher wrote: tests/distill/knowledge run it",
    "slimkit teach dump student.yaml": "of a recipe that the page shows in part: a guide does it",
    "slimkit teach serve": "serves until it is stopped: tests/distill/knowledge serve",
    "openssl": "any random text will do",
    "export SLIMKIT_": "of a server that runs: tests/distill/knowledge have tokens",
    "for seed in": "a loop of a shell over recipes that test_pages checks",
}
GUIDES_RUN = ("slimkit evaluate", "slimkit teach dump")
"""What a page names but does not run, and a guide does."""


def console(page: str) -> list[str]:
    """Commands of a page, continued lines joined, comments and output left out."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[str] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n(> )?\s*", "", block).splitlines():
            if line.startswith("$ "):
                found.append(re.sub(r"\s+# .*", "", line[2:]).strip())
            elif line.startswith("> "):
                found[-1] += "; " + line[2:].strip()
    return found


def reason(command: str, *, guide: bool = False) -> str | None:
    for start, why in NOT_RUN.items():
        if command.startswith(start) and not (guide and start in GUIDES_RUN):
            return None if guide and start == "slimkit teach dump student.yaml" else why
    return None


def files_of(page: str) -> dict[str, str]:
    """Blocks that begin with the comment of a file's name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(
        r"^```(?:python|yaml)\n(# (\S+\.(?:py|yaml))\n.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    return {name: content for content, name in found}


def run(command: str) -> None:
    """A command in this process, a recipe without its data and its hours."""
    program, *arguments = shlex.split(command)
    if program == "python":
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        subprocess.run([sys.executable, *arguments], check=True, env=environment)
        return
    assert program == "slimkit"
    if arguments[0] == "run":
        recipe = ROOT / arguments[1]
        arguments[1] = str(recipe) if recipe.exists() else arguments[1]
        arguments += [flag for flag in ("--smoke", "--dry-run") if flag not in arguments]
    assert main(arguments) == 0, command


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder without data, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIMKIT_DATA", str(tmp_path / "nothing"))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_the_console_lines_of_a_page_run(page: str, workplace: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    recipes = re.findall(r"^```yaml\n(name: .*?)^```", text, re.DOTALL | re.MULTILINE)
    for command in console(page):
        if reason(command) is not None:
            continue
        named = re.search(r"slimkit run (\w+)\.yaml", command)
        for recipe in recipes:  # a page shows the recipe that its lines run
            if named and recipe.startswith(f"name: {named[1]}\n"):
                (workplace / f"{named[1]}.yaml").write_text(recipe, encoding="utf-8")
        run(command)


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_works_from_its_first_line_to_its_last(page: str, workplace: Path) -> None:
    for name, content in files_of(page).items():
        (workplace / name).write_text(content, encoding="utf-8")
    for command in console(page):
        if reason(command, guide=True) is None:
            run(command)
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if not re.match(r"# \S+\.py\n", block):
            exec(compile(block, page, "exec"), {"__name__": "__main__"})


def test_every_line_that_is_not_run_is_on_a_page() -> None:
    commands = [command for page in [*PAGES, *GUIDES] for command in console(page)]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands), start


def test_the_guides_are_linked_first_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = [text.index(f"]({guide})") for guide in GUIDES]
    assert len(places) == 4
    assert max(places) < text.index("```console")
