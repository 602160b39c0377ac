"""The package's layout: no import circles, no import against the flow, no long files; what ruff knows as our own."""

import fnmatch
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRAPH = runpy.run_path(str(ROOT / "docs" / "import_graph.py"))
FLOW = ["checks", "losses", "linalg", "capture", "curvature", "optim", "study"]
"""Each imports from those before it; `report` and `distributed` stand beside, `cli` is used by `study`, too."""
LONGEST = 400


def test_there_are_no_import_circles():
    assert GRAPH["circles"](GRAPH["graph"]()) == []


def test_imports_point_backward_along_the_flow():
    between = GRAPH["rooms"](GRAPH["graph"]())
    against = {(a, b) for i, a in enumerate(FLOW) for b in FLOW[i + 1 :] if between[a][b]}
    assert not against


def test_no_file_is_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in GRAPH["modules"]().items()}
    assert {name: n for name, n in lines.items() if n > LONGEST} == {}


def test_circles_are_found():
    circles = GRAPH["circles"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"d", "a"}, "d": {"c"}}) == [["a", "b"], ["c", "d"]]


def test_imports_are_read_from_the_text(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "import natgrad.linalg\nfrom natgrad.losses import base\nfrom natgrad.linalg.vec import vec\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from natgrad.optim import kfac\n"
        "try:\n    from natgrad.capture import tap\nexcept ImportError:\n    pass\n"
        "def f():\n    from natgrad.cli import demo\n"
    )
    known = GRAPH["modules"]()
    assert GRAPH["imports_of"](file, known) == {
        "natgrad.linalg",
        "natgrad.losses.base",
        "natgrad.linalg.vec",
        "natgrad.capture.tap",
    }


def test_ruff_knows_every_module_of_ours():
    """So that imports are sorted alike on every machine, whatever folders are there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.findall(r'"([^"]+)"', re.search(r"known-first-party = \[(.*?)\]", text, re.DOTALL)[1])
    files = [p for folder in ("tests", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py")]
    imported = {n for p in files for n in re.findall(r"^(?:from|import) (\w+)", p.read_text(encoding="utf-8"), re.M)}
    own = imported & {p.stem for p in files}
    unknown = {name for name in own if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert not unknown, "list them in known-first-party of pyproject.toml"
