"""No module of the package imports, over others, itself: at its top or inside a function.

``grimp``, which import-linter stands on, reads every import statement; imports for type checkers
do not run and do not count. That a module's packages are imported before it does not count either.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter({name: sorted(read) for name, read in sorted(imports.items())}).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def imports_of(package: str) -> dict[str, set[str]]:
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    return {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}


def test_no_imports_run_in_a_circle_within_the_package() -> None:
    circle = circle_of(imports_of("slimkit"))
    assert not circle, " → ".join(circle)


def test_a_circle_through_a_function_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "round_about"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "top.py").write_text("import round_about.middle\n")
    (package / "middle.py").write_text("from round_about import low\n")
    (package / "low.py").write_text("def late():\n    from round_about.top import anything\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = {name.rpartition(".")[2] for name in circle_of(imports_of("round_about"))}
    assert names == {"top", "middle", "low"}
    (package / "low.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from round_about.top import anything\n"
    )
    assert not circle_of(imports_of("round_about"))
