from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import slimkit as sk

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "accelerate", "jinja2", "lightning", "matplotlib", "onnx", "onnxruntime", "onnxscript",
    "openvino", "optuna", "pandas", "PIL", "pyarrow", "pydantic", "rich", "scipy", "sklearn",
    "tensorboard", "timm", "torchvision", "transformers", "typer", "yaml",
)  # fmt: skip


def _submodules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(sk.__path__, "slimkit.")]


def _python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_submodule_hides_a_public_function() -> None:
    modules = _submodules()
    assert len(modules) > 30
    for name in modules:
        importlib.import_module(name)
    for name in sk.__all__:
        found = getattr(sk, name)
        if name in sk._VERBS:
            assert not isinstance(found, ModuleType), f"slimkit.{name} is a module, not a verb"
            assert callable(found)
    for call in (
        sk.prune.plan, sk.quantize.ptq, sk.quantize.qat, sk.distill.Distiller, sk.reparam.fuse,
    ):  # fmt: skip
        assert callable(call), call


def test_no_submodule_hides_what_its_package_exports() -> None:
    modules = {name: importlib.import_module(name) for name in _submodules()}
    for name, package in modules.items():
        for exported in getattr(package, "__all__", ()):
            found = getattr(package, exported)
            assert not isinstance(found, ModuleType), f"{name}.{exported} is a module"


def test_every_module_says_what_it_exports_and_has_it() -> None:
    for name in _submodules():
        module = importlib.import_module(name)
        assert module.__doc__, f"{name} says nothing about itself"
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == name]
        assert hasattr(module, "__all__") or not own, f"{name} has no __all__"
        exports = getattr(module, "__all__", ())
        missing = [exported for exported in exports if not hasattr(module, exported)]
        assert not missing, f"{name} exports {missing} and does not have them"


def test_lazy_root_names_are_the_ones_that_type_checkers_see() -> None:
    assert set(sk.__all__) == {*sk._VERBS, *sk._ROOMS, "__version__"}
    tree = ast.parse((ROOT / "src/slimkit/__init__.py").read_text())
    typed = {
        alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == set(sk.__all__) - {"__version__"}
    assert dir(sk) == sorted(sk.__all__)


def test_a_mistyped_root_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(AttributeError, match="did you mean 'quantize'"):
        sk.quantise  # noqa: B018


IMPORTS = """
import json, sys, time
start = time.perf_counter()
import torch
with_torch, before = time.perf_counter(), set(sys.modules)
import slimkit
end = time.perf_counter()
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"torch": with_torch - start, "slimkit": end - start, "added": added}))
"""


def test_importing_the_root_is_cheap_and_loads_no_heavy_library() -> None:
    measured = [json.loads(_python(IMPORTS)) for _ in range(2)]
    assert not set(measured[0]["added"]) & set(HEAVY)
    assert min(run["slimkit"] / run["torch"] for run in measured) <= 1.5


def test_the_wheel_carries_types_templates_recipes_and_the_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "slimkit = slimkit.cli.main:main" in archive.read(entry).decode()
    assert sk.__version__ in wheel.name
    assert {
        "slimkit/py.typed",
        "slimkit/report/templates/report.html.j2",
        "slimkit/recipes/quickstart.yaml",
    } <= names
    sources = {
        f"slimkit/{path.relative_to(ROOT / 'src/slimkit').as_posix()}"
        for path in (ROOT / "src/slimkit").rglob("*.py")
    }
    assert sources <= names
    assert not [name for name in names if name.startswith("tests")]


def test_the_version_is_an_ordinary_one() -> None:
    assert [int(part) for part in sk.__version__.split(".")]
