"""The second moments of these tests are of all rows."""

import pytest

from natgrad.optim.muon import whitening as whitening_file


@pytest.fixture(autouse=True)
def all_rows(monkeypatch):
    """Second moments are of all rows of a batch."""
    monkeypatch.setattr(whitening_file, "ROWS", 10**9)
