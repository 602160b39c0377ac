"""No file of the package imports one that imports it, at the top or within a function; for types alone it may."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import natgrad

ROOT = Path(natgrad.__file__).parent


def files_of(root: Path) -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What is imported from where, `TYPE_CHECKING` aside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports are not followed"
            yield from ((child.module or "", alias.name) for alias in child.names)
        yield from imports(child)


def graph(root: Path) -> dict[str, set[str]]:
    """The modules that each imports; of a package, its `__init__` if no module of it is meant."""
    files = files_of(root)
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for module, thing in imports(ast.parse(path.read_text(encoding="utf-8"))):
            target = f"{module}.{thing}" if f"{module}.{thing}" in files else module
            if target in files:
                found[name].add(target)
    return found


def circle(root: Path) -> list[str]:
    """The modules of one, if there is one."""
    try:
        TopologicalSorter(graph(root)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_circle() -> None:
    assert len(graph(ROOT)) > 100
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from package.b import thing", True),
        ("from package import b", True),
        ("import package.b", True),
        ("def f():\n    from package.b import thing", True),
        ("class C:\n    def f(self):\n        if self:\n            from package import b", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.b import thing", False),
        ("import b", False),
    ],
)
def test_a_circle_would_be_found(tmp_path: Path, text: str, found: bool) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(text)
    (package / "b.py").write_text("from package.c import thing")
    (package / "c.py").write_text("from package import a")
    assert bool(circle(package)) is found
