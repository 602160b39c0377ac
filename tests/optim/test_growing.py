"""Batches that grow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import natgrad


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 200), st.integers(1, 30), st.integers(1, 3))
def test_sizes_grow_from_first_to_last_and_no_index_comes_twice(first, more, rest, steps, passes):
    last, n = first + more, first + more + rest
    batches = natgrad.GrowingBatches(range(n), first, last, steps)
    sizes = []
    for _ in range(passes):
        count, own = len(batches), list(batches)
        assert len(own) == count
        drawn = [i for batch in own for i in batch]
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(n))
        sizes += map(len, own)
    assert sizes[0] == first
    assert sizes == sorted(sizes)
    assert max(sizes) <= last
    assert all(size == last for size in sizes[steps:])


def test_in_a_loader_and_resumed():
    data = TensorDataset(torch.arange(300))

    def made():
        return natgrad.GrowingBatches(data, 5, 50, 12, torch.Generator().manual_seed(1))

    def passes(batches, count):
        return [x.tolist() for _ in range(count) for (x,) in DataLoader(data, batch_sampler=batches)]

    whole, batches = passes(made(), 4), made()
    first = passes(batches, 2)
    resumed = made()
    resumed.load_state_dict(batches.state_dict())
    assert first + passes(resumed, 2) == whole


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((range(10), 5, 4, 3), ValueError, "first=5, last=4 and 10 examples are not in ascending order"),
        ((range(10), 5, 11, 3), ValueError, "no larger than the data"),
        ((range(10), 0, 4, 3), ValueError, "first=0 is not usable"),
        ((range(10), 1, 4, 0), ValueError, "steps=0 is not usable"),
    ],
)
def test_mistakes(arguments, error, words):
    with pytest.raises(error, match=words):
        natgrad.GrowingBatches(*arguments)
