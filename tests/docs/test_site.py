"""The built site: no warnings, nothing from another host, links and anchors lead somewhere, every name is in it."""

import os
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")
from test_api_docs import METHODS, PUBLIC

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


class Document(HTMLParser):
    """What a page loads, where it links to, and the anchors it has."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        its = dict(attrs)
        if "id" in its:
            self.anchors.add(its["id"])
        if tag == "a" and "href" in its:
            self.links.append(its["href"])
        if tag in LOADED and its.get(LOADED[tag]):
            self.loads.append(its[LOADED[tag]])


def test_the_site(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = {page: Document(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert len(pages) > 15
    for page, document in pages.items():
        if page.name != "404.html":  # its links are absolute, as it may be shown anywhere
            check_page(page, document, pages)
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        for outside in ("@import", "url(http", "url(//"):
            assert outside not in text, style
    names = set(inventory(site / "objects.inv"))
    assert set(PUBLIC) <= names
    own = {method for method in METHODS if method.rsplit(".", 1)[1] in vars(PUBLIC[method.rsplit(".", 1)[0]])}
    described = {method for method in own if has_own_docstring(method)}
    assert described <= names
    assert {"natgrad.KFAC.step", "natgrad.KFAC.loss", "natgrad.linalg.Operator.solve"} <= names


QUIET = {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}


def check_page(page, document, pages):
    for target in document.loads:
        if not target.startswith("data:"):
            parts = urlsplit(target)
            assert not parts.netloc, f"{page} loads {target}"
            assert (page.parent / unquote(parts.path)).exists(), f"{page} loads {target}"
    for target in document.links:
        parts = urlsplit(target)
        if not parts.scheme and not parts.netloc:
            other = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            other = other / "index.html" if other.is_dir() else other
            assert other.exists(), f"{page} links to {target}"
            if other in pages:
                assert unquote(parts.fragment) in pages[other].anchors, f"{page} links to {target}"


def has_own_docstring(method):
    owner, name = method.rsplit(".", 1)
    return bool(getattr(vars(PUBLIC[owner])[name], "__doc__", None))


def inventory(path):
    """The names that an inventory lists: after four lines of header, compressed lines that begin with a name."""
    data = path.read_bytes().split(b"\n", 4)[4]
    return [line.split(" ")[0] for line in zlib.decompress(data).decode().splitlines()]
