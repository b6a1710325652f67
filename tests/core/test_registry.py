from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from slimkit.errors import InputError, MissingDependencyError, SlimkitError, UnknownNameError
from slimkit.registry import Registry, import_object


def test_a_registered_object_is_found_by_its_name() -> None:
    registry: Registry[object] = Registry("criterion")

    @registry.register("mine")
    def mine() -> None: ...

    assert registry.get("mine") is mine
    assert "mine" in registry
    assert list(registry) == registry.names() == ["mine"]
    assert len(registry) == 1


def test_a_lazy_entry_is_imported_on_first_use_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_library_for_test.py").write_text("thing = object()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[object] = Registry("criterion")
    registry.register_lazy("heavy", "heavy_library_for_test:thing")
    assert registry.names() == ["heavy"]
    assert "heavy_library_for_test" not in sys.modules
    thing = registry.get("heavy")
    assert registry.get("heavy") is thing is sys.modules["heavy_library_for_test"].thing


def test_a_lazy_entry_can_be_replaced_and_does_not_replace() -> None:
    registry: Registry[object] = Registry("criterion")
    registry.register_lazy("a", "math:pi")
    registry.register("a")(one := object())
    registry.register_lazy("a", "math:e")
    assert registry.get("a") is one


def test_a_name_is_given_once() -> None:
    registry: Registry[object] = Registry("criterion")
    registry.register("a")(first := object())
    registry.register("a")(first)
    with pytest.raises(SlimkitError, match="criterion 'a' is registered already"):
        registry.register("a")(object())
    assert registry.get("a") is first


def test_a_notebook_cell_may_be_run_again() -> None:
    registry: Registry[object] = Registry("criterion")

    def cell() -> object:
        @registry.register("mine")
        def mine() -> None: ...

        return mine

    cell()
    second = cell()
    assert registry.get("mine") is second


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    registry: Registry[object] = Registry("criterion")
    registry.register("geometric_median")(object())
    with pytest.raises(UnknownNameError, match="did you mean 'geometric_median'") as caught:
        registry.get("geometric_mean", where="stages.prune.criterion")
    assert caught.value.where == "stages.prune.criterion"


def test_a_users_own_object_needs_no_registration() -> None:
    registry: Registry[object] = Registry("criterion")
    assert registry.get("os.path:join") is __import__("os").path.join
    assert import_object("collections:OrderedDict.fromkeys")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package_here:x", "there is no module 'no_such_package_here'"),
        ("os.no_such:x", "there is no module 'os.no_such'"),
        ("os.path:joyn", r"no attribute 'joyn'.*did you mean .*'join'"),
    ],
)
def test_a_wrong_reference_says_which_part_is_wrong(reference: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        import_object(reference)


def test_a_module_that_lacks_its_own_dependency_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more_for_test.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match="pip install no_such_package_here"):
        import_object("needs_more_for_test:x")


def test_what_is_registered_in_scratch_is_forgotten_and_lazy_entries_stay_lazy() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register_lazy("pi", "math:pi")
    with registry.scratch():
        registry.register("mine")(object())
        assert registry.get("pi") == math.pi
    assert registry.names() == ["pi"]
    assert registry.get("pi") == math.pi


BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", r"broken_syntax\.py:2: SyntaxError"),
    "division": ("x = 1\n\ny = x / 0\n", r"broken_division\.py:3: ZeroDivisionError"),
    "library": ("import json\n\njson.loads('{')\n", r"broken_library\.py:3: JSONDecodeError"),
    "exit": ("import sys\nsys.exit(3)\n", r"broken_exit\.py:2: SystemExit"),
    "name": ("from json import nothing\n", r"broken_name\.py:1: ImportError"),
    "indent": ("if True:\nx = 1\n", r"broken_indent\.py:2: IndentationError"),
    "nul": ("x = '\0'\n", "importing 'broken_nul' failed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_fails_names_its_own_file_and_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, told = BROKEN[name]
    (tmp_path / f"broken_{name}.py").write_text(text)
    (tmp_path / f"uses_{name}.py").write_text(f"import broken_{name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=told):
        import_object(f"broken_{name}:thing")
    with pytest.raises(InputError, match=told if "py" in told else "failed"):
        import_object(f"uses_{name}:thing")  # the line where it went wrong, not the import


@pytest.mark.parametrize("reference", [":x", ".here:x", "..there:x", "a..b:x", "json:", "\0:x"])
def test_odd_references_are_typed(reference: str) -> None:
    with pytest.raises(SlimkitError):
        import_object(reference)
