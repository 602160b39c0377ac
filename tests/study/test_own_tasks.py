"""Tasks of a user's own, apart from their runs."""

import pytest
import torch

from natgrad.checks.errors import UserError
from natgrad.study.own_task import _batches_of


class Once:
    """Data that can be read only once."""

    def __init__(self):
        self._batches = iter([(torch.ones(2, 1), torch.ones(2)), (torch.zeros(2, 1), torch.zeros(2))])

    def __iter__(self):
        return self._batches


def test_data_that_can_be_read_only_once_are_refused_when_they_end():
    batches = _batches_of(Once())(0, 2)
    assert [float(next(batches)[1][0]) for _ in range(2)] == [1.0, 0.0]
    with pytest.raises(UserError, match="can be read only once, as a generator can"):
        next(batches)
