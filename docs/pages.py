"""What the site has beside `docs/*.md`: README, changelog and scripts as pages, and MathJax's own files.

Pages are written for GitHub. Links to files outside of `docs/` are pointed at the pages made of those files.
"""

import importlib.util
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
MATHJAX = ["tex-chtml.js", "output/chtml/fonts/woff-v2/*.woff"]
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")
FENCE = re.compile(r"^```python\n(?=>>>)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for script in sorted((ROOT / "examples").rglob("*.py")):
        code = script.read_text(encoding="utf-8")
        content = f"# {script.name}\n\n````python\n{code}````\n"
        files.append(File.generated(config, made_of(script.relative_to(ROOT).as_posix()), content=content))
    spec = importlib.util.find_spec("mathjax")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("MathJax's files are in the package django-static-mathjax: pip install '.[docs]'")
    mathjax = Path(spec.origin).parent / "static" / "mathjax" / "es5"
    for pattern in MATHJAX:
        for path in sorted(mathjax.glob(pattern)):
            name = f"mathjax/{path.relative_to(mathjax).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = {made: name for name, made in FROM_ROOT.items()}.get(here, f"docs/{here}")

    def pointed(link: re.Match[str]) -> str:
        target = made_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2])))
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{link[3]}"

    return FENCE.sub("```pycon\n", LINK.sub(pointed, markdown))


def made_of(path: str) -> str:
    """The file of the site that is made of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    return FROM_ROOT.get(path, path)
