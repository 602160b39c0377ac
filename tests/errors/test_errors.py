"""Every error of the tables is caused, and says in one or two sentences what came, what was expected and the mend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from causes import Said, causes

CAUSES = causes()


@pytest.fixture(scope="module")
def said() -> dict[str, Said]:
    """What a Python without the test run's type checker says of every cause."""
    command = [sys.executable, Path(__file__).with_name("causes.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return {action: Said(*its) for action, its in json.loads(done.stdout).items()}


def test_no_action_is_there_twice():
    assert len({cause.action for cause in CAUSES}) == len(CAUSES)


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.action)
def test_it_is_this_librarys_own_error_and_says_what_is_wrong(cause, said):
    error = said[cause.action]
    assert (error.kind, error.own) == (cause.kind.__name__, True), error
    assert "\n" not in error.message
    assert len(error.message) < 500
    place = 0
    for part in cause.says:
        assert part in error.message[place:], error.message
        place = error.message.index(part, place) + len(part)
