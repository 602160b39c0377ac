"""What is handed out: what an import brings in, and the wheel and the source distribution, built and installed."""

import ast
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import natgrad

ROOT = Path(__file__).parents[2]
SOURCES = Path(natgrad.__file__).parent
NEEDED = {"torch", "numpy", "safetensors", "jaxtyping", "typer", "rich", "matplotlib", "jinja2", "natgrad"}
OPTIONAL = {  # where an error says how to install it, or which nobody imports without having it
    "mlxtend": {"study/images.py"},
    "pytorch_optimizer": {"study/optimizers.py"},
    "tomli": {"study/reading.py"},  # declared for Python 3.10 alone
    "scipy": {"linalg/external.py", "linalg/spectral.py", "uses/jacobian.py"},
    "lightning": {"integrations/lightning.py"},
    "transformers": {"integrations/transformers.py"},
}


def python(*arguments: str | Path, python: str | Path = sys.executable, **options) -> str:
    done = subprocess.run([python, *arguments], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_import_warns_of_nothing_and_leaves_the_heavy_packages_alone() -> None:
    loaded = set(python("-W", "error", "-c", "import natgrad, sys; print(*sys.modules)").split())
    assert "natgrad.optim.kfac" in loaded
    assert not loaded & {"matplotlib", "transformers", "typer", "rich", "jinja2", "mlxtend", "sklearn", "pandas"}
    assert not loaded & {"sympy", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"}


def test_nothing_is_imported_that_is_not_declared() -> None:
    for file in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {n.partition(".")[0] for n in names} - NEEDED - sys.stdlib_module_names:
                assert str(file.relative_to(SOURCES)) in OPTIONAL[name]


def test_python_m_says_the_version() -> None:
    assert python("-m", "natgrad", "--version") == f"natgrad {natgrad.__version__}\n"


def test_the_versions_agree() -> None:
    assert f'version = "{natgrad.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {natgrad.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {natgrad.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_versions_are_those_that_are_declared() -> None:
    declared = (ROOT / "pyproject.toml").read_text().lower()
    lines = (ROOT / "constraints-minimal.txt").read_text().lower().splitlines()
    for name, version in (line.split("==") for line in lines if not line.startswith("#")):
        released = version.removesuffix(".0")
        assert any(f'"{name}>={v}"' in declared for v in (version, released, released.removesuffix(".0"))), name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what is handed out, built from a copy of what git knows."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("release")
    listed = subprocess.run(["git", "-C", ROOT, "archive", "HEAD"], capture_output=True, check=True).stdout
    (folder / "all.tar").write_bytes(listed)
    with tarfile.open(folder / "all.tar") as archive:
        archive.extractall(folder / "source", filter="data")
    # As of a release: the wheel is built from the source distribution.
    python("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


@pytest.mark.slow
class TestBuilt:
    def test_the_wheel_has_what_is_used_and_no_tests(self, built: Path) -> None:
        (wheel,) = built.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        for wanted in ("natgrad/py.typed", "natgrad/cli/page.html.jinja", "natgrad/cli/demo.html.jinja"):
            assert wanted in names
        assert any(n.endswith("licenses/LICENSE") for n in names)
        assert {n.partition("/")[0].partition("-")[0] for n in names} == {"natgrad"}
        templates = {f.name for f in SOURCES.rglob("*.jinja")}
        assert templates == {Path(n).name for n in names if n.endswith(".jinja")}

    def test_the_source_distribution_has_the_licence_and_the_changes(self, built: Path) -> None:
        (source,) = built.glob("*.tar.gz")
        with tarfile.open(source) as archive:
            names = {n.partition("/")[2] for n in archive.getnames()}
        assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "src/natgrad/py.typed"} <= names

    def test_it_installs_and_works_for_a_typed_program(self, built: Path, tmp_path: Path) -> None:
        pytest.importorskip("mypy")
        (wheel,) = built.glob("*.whl")
        python("-m", "venv", "--without-pip", tmp_path / "venv")
        own = tmp_path / "venv/bin/python"
        site = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=own).strip())
        zipfile.ZipFile(wheel).extractall(site)
        # The dependencies are those of this environment; what is in the new one comes first.
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        where = python("-c", "import natgrad; print(natgrad.__file__)", python=own, env=clean, cwd=tmp_path)
        assert where.startswith(str(site))
        consumer = Path(__file__).with_name("consumer.py")
        assert "True" in python("-W", "ignore", consumer, python=own, env=clean, cwd=tmp_path)
        # torch's own backward() is untyped.
        strict = ("--strict", "--allow-untyped-calls", "--config-file=", "--python-executable", own)
        assert "Success" in python("-m", "mypy", *strict, consumer, cwd=tmp_path, env=clean)
