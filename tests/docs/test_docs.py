"""The pages: their examples run, their links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/primers").glob("*.md")),
]
PEERS = {"coming-from.md": ("curvlinops", "nngeometry")}
"""What a page's examples compare with: `make peers` installs them."""
names = [str(page.relative_to(ROOT)) for page in PAGES]


def examples(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    return doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), 0)


@pytest.mark.parametrize("page", [page for page in PAGES if ">>>" in page.read_text(encoding="utf-8")], ids=str)
def test_the_examples(page):
    for peer in PEERS.get(page.name, ()):
        pytest.importorskip(peer)
    with torch.random.fork_rng():
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples(page)).failed == 0


def test_pages_have_examples():
    assert sum(len(examples(page).examples) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_every_page_is_linked():
    linked = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in PAGES:
        assert page.parent == ROOT or page.name in linked, page.name


def test_every_primer_has_an_example():
    primers = [page for page in PAGES if page.parent.name == "primers"]
    assert len(primers) == 6
    assert all(examples(page).examples for page in primers)
