"""What is asked of the words of every error in the sources, caused by a test or not."""

import ast
import re
from pathlib import Path

import pytest

import natgrad

SOURCES = Path(natgrad.__file__).parent
MEND = re.compile(
    r"expected|\b(use|pass|give|leave|look|make|call|take|keep|freeze|skip|load|mend|correct|check|compute|choose|define|change|install|run|move|"
    r"convert|replace|write|did you mean|say which|say damping|too|return|scale|save|choose|let)\b",
    re.IGNORECASE,
)
HOLE = "…"


def words_of(node: ast.expr) -> str:
    """The text of a message as it stands in the source, with a sign for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp):
        return words_of(node.left) + words_of(node.right)
    return HOLE


def errors() -> list[tuple[str, str]]:
    """Where an error with a message of its own is made, and the message."""
    found = []
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if re.fullmatch(r"[A-Z]\w*Error", node.func.id) and node.func.id != "AssertionError":
                words = words_of(node.args[0])
                if words.strip(HOLE + " :'"):  # not those that hand another's message on
                    found.append((f"{file.relative_to(SOURCES)}: {words}", words))
    return found


def handed_on(words: str) -> bool:
    """Whether it ends in another error's message, which has a mend of its own."""
    return words.endswith((f": {HOLE}", f"; {HOLE}"))


ERRORS = errors()


def test_there_are_errors():
    assert len(ERRORS) > 150


@pytest.mark.parametrize("words", [w for _, w in ERRORS], ids=[place for place, _ in ERRORS])
def test_a_message_is_one_or_two_sentences_with_a_mend(words):
    assert MEND.search(words) or handed_on(words), words
    assert len(re.findall(r"[.?!] (?=[A-Z])", words)) <= 1, words
    assert "\n" not in words
