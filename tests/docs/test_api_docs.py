"""The reference: every public name has a docstring that says what, with what, and how, and a place on the site."""

import doctest
import importlib.util
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest

import natgrad
from natgrad import integrations, linalg, losses, pde
from natgrad.linalg.coverage import Coverage
from natgrad.report.residual import Condition, LayerResidual, ResidualReport
from natgrad.uses.predictive import Prediction

griffe = pytest.importorskip("griffe")
ROOT = Path(__file__).parents[2]
HANDED_OUT = [ResidualReport, LayerResidual, Condition, Coverage, Prediction]
"""What users hold without having typed its name."""


def public():
    """Public objects by the first of their names."""
    found = {}
    for module in (natgrad, linalg, losses, pde, integrations):
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.ismodule(thing) and not any(thing is other for other in found.values()):
                found[f"{module.__name__}.{name}"] = thing
    found["natgrad.linalg.vec.vec"] = found.pop("natgrad.linalg.vec")  # a module has that name, too
    return found | {f"{kind.__module__}.{kind.__name__}": kind for kind in HANDED_OUT}


PUBLIC = public()
CALLABLE = [name for name, thing in PUBLIC.items() if callable(thing)]
FUNCTIONS = (FunctionType, property, classmethod, staticmethod)
METHODS = [
    f"{name}.{method}"
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing)
    for kind in thing.__mro__
    if kind.__module__.startswith("natgrad")
    for method, what in vars(kind).items()
    if not method.startswith("_") and isinstance(what, FUNCTIONS)
]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")}


@pytest.fixture(scope="module")
def package():
    """As mkdocs.yml has it read for the site."""
    extensions = griffe.load_extensions(str(ROOT / "docs" / "docstrings.py"))
    return griffe.load("natgrad", search_paths=[ROOT / "src"], extensions=extensions, docstring_parser="google")


@pytest.fixture
def sections(package, caplog):
    """A name's docstring by kinds of sections; what does not parse fails the test."""

    def of(name):
        described = package[name.removeprefix("natgrad.")]
        described = described.final_target if described.is_alias else described
        found = {section.kind.value: section.value for section in described.docstring.parse("google")}
        assert caplog.messages == []
        fields = [n for n, m in described.members.items() if m.docstring] if described.is_class else []
        return found, fields

    return of


@pytest.mark.parametrize("name", CALLABLE)
def test_it_is_described(name, sections):
    found, _ = sections(name)
    assert len(found["text"]) > 20


@pytest.mark.parametrize("name", CALLABLE)
def test_it_has_an_example(name, sections):
    found, _ = sections(name)
    assert any(">>> " in text for _, text in found["examples"])


@pytest.mark.parametrize("name", CALLABLE)
def test_its_parameters_are_described_and_no_others(name, sections):
    found, fields = sections(name)
    described = {parameter.name: parameter.description for parameter in found.get("parameters", [])}
    assert set(described) | set(fields) >= set(inspect.signature(PUBLIC[name]).parameters)
    assert set(described) <= set(inspect.signature(PUBLIC[name]).parameters)
    assert all(described.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described(name):
    owner, method = name.rsplit(".", 1)
    assert len(inspect.getdoc(getattr(PUBLIC[owner], method)) or "") > 10


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_place_on_the_site(name):
    assert [page for page, text in PAGES.items() if re.search(rf"^::: {re.escape(name)}$", text, re.MULTILINE)]


def test_there_is_something_to_describe():
    assert {"natgrad.KFAC", "natgrad.linalg.Kronecker", "natgrad.losses.Likelihood"} <= set(CALLABLE)
    assert {"natgrad.KFAC.step", "natgrad.linalg.Operator.solve"} <= set(METHODS)


def test_how_docstrings_are_read():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Not by testmod, which leaves out what another import of the same file has made.
    examples = doctest.DocTestParser().get_doctest(module.rewritten.__doc__, vars(module), "rewritten", None, 0)
    result = doctest.DocTestRunner().run(examples)
    assert result.attempted
    assert not result.failed


def test_constants_are_described(package):
    assert package["losses.base.ESTIMATORS"].docstring
