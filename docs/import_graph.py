"""The tree of the package with lines per file, and the graph of its imports: `python docs/import_graph.py [PICTURE]`.

Imports for types alone and those inside of functions are left out: they can close no circle at import.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
PACKAGE = "natgrad"
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Files by their modules' names."""
    found = {}
    for path in sorted((SOURCES / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: Iterable[str]) -> set[str]:
    """The package's own modules that a file imports when it is imported."""
    known = set(known)
    found = set()
    for node in _executed(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports the module, and not the package's other names.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known
            if not names <= known and node.module in known:
                found.add(node.module)
    return found


def _executed(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import: not those in functions, nor under `if TYPE_CHECKING`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _executed(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name in ("body", "orelse", "finalbody"):
                yield from _executed(getattr(node, name, []))


def graph() -> Graph:
    """What every module imports."""
    files = modules()
    return {name: imports_of(path, files) - {name} for name, path in files.items()}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, directly or by way of others (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        open_.append(name)
        for other in graph.get(name, ()):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in open_:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            at = open_.index(name)
            part, open_[at:] = sorted(open_[at:]), []
            if len(part) > 1:
                found.append(part)

    for name in graph:
        if name not in order:
            visit(name)
    return found


def room(module: str) -> str:
    """The folder of the package that a module is in; the package itself for what lies at its top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SOURCES / PACKAGE / parts[1]).is_dir() else PACKAGE


def rooms(graph: Mapping[str, set[str]]) -> dict[str, Counter[str]]:
    """How many imports there are from each room to each other one."""
    found: dict[str, Counter[str]] = {}
    for name, others in graph.items():
        own = found.setdefault(room(name), Counter())
        own.update(room(o) for o in others if room(o) != room(name))
    return found


def layers(between: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Each room's distance from those that import nothing: every arrow leads to a lower number, unless rooms are in a
    circle, which have one number."""
    level: dict[str, int] = {}
    together = {name: frozenset(part) for part in circles({k: set(v) for k, v in between.items()}) for name in part}

    def of(name: str, above: frozenset[str] = frozenset()) -> int:
        if name not in level:
            group = together.get(name, frozenset({name}))
            below = {o for n in group for o in between.get(n, ())} - group - above
            level.update(dict.fromkeys(group, max((1 + of(o, above | group) for o in below), default=0)))
        return level[name]

    for name in between:
        of(name)
    return level


def tree() -> Iterator[str]:
    """The package's files with their lines."""
    for path in sorted((SOURCES / PACKAGE).rglob("*.py")):
        where = path.relative_to(SOURCES / PACKAGE)
        yield f"{len(path.read_text(encoding='utf-8').splitlines()):5d}  {'  ' * (len(where.parts) - 1)}{where}"


def draw(between: Mapping[str, Counter[str]], path: Path) -> None:
    """Rooms by their distance from the ones that import nothing, and an arrow for each import between two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    level = layers(between)
    rows: dict[int, list[str]] = {}
    for name in sorted(between):
        rows.setdefault(level[name], []).append(name)
    places = {}
    for at, row in rows.items():
        for i, name in enumerate(row):  # every other row a little to the side, so that long arrows pass between
            places[name] = ((i + 1) / (len(row) + 1) + 0.06 * (at % 2 - 0.5), at)
    figure = Figure(figsize=(9.6, 0.95 * (len(rows) + 1)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, others in between.items():
        for other in others:
            down = level[other] < level[name]
            bend = "arc3,rad=0.12" if level[name] - level[other] > 1 else "arc3"
            style = {"arrowstyle": "-|>", "color": "#0072B2" if down else "#D55E00", "alpha": 0.45}
            style |= {"shrinkA": 16, "shrinkB": 16, "connectionstyle": bend}
            axes.annotate("", places[other], places[name], arrowprops=style)
    for name, (x, y) in places.items():
        axes.text(x, y, name, ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": "#767676"})
    axes.set(xlim=(0, 1), ylim=(-0.5, len(rows) - 0.5))
    axes.set_axis_off()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    found = graph()
    print("\n".join(tree()))
    print(f"{len(found)} files; circles: {circles(found) or 'none'}")
    between = rooms(found)
    for name, at in sorted(layers(between).items(), key=lambda pair: pair[1]):
        print(f"{at}  {name} imports {', '.join(f'{o} ({n})' for o, n in sorted(between[name].items())) or 'nothing'}")
    if len(sys.argv) > 1:
        draw(between, Path(sys.argv[1]))
