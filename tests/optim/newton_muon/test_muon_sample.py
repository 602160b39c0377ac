"""The sample of rows that NewtonMuon's second moments are taken from."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import natgrad
from muon_steps import D, second_moment
from natgrad.capture.layers import Rows
from natgrad.optim.muon.moments import FEWEST, InputMoments
from oracles import close, f64, randn


def moments_of(inputs, rows_per_input=4, seed=0):
    return InputMoments(8192, rows_per_input, seed)._moments(inputs)


class TestSample:
    @pytest.mark.parametrize("first", ["examples", "positions"])
    def test_positions_count_alike(self, first):
        """A sequence may be the first or the second axis. Each position has inputs of its own here."""
        n, t = (64, 512) if first == "positions" else (512, 64)
        where = torch.arange(n if first == "positions" else t)
        of = F.one_hot(where % D, D).to(f64) * (1.0 + where[:, None])
        x = (of[:, None] if first == "positions" else of).expand(n, t, D)
        A, own = second_moment(x.flatten(0, 1)), moments_of(Rows(x))
        assert own.count == n * t
        assert (own.A - A).norm() < 0.1 * A.norm()

    @pytest.mark.parametrize("period", [2, 4, 64, 256])
    def test_patterns_in_the_rows(self, period):
        """Such as pairs, or points of a grid."""
        x = randn(period, D).repeat(40 * FEWEST // period, 1).unsqueeze(1)
        A, own = second_moment(x.squeeze(1)), moments_of(Rows(x))
        assert (own.A - A).norm() < 0.1 * A.norm()

    @given(rows=st.integers(1, 3 * FEWEST), positions=st.integers(1, 4), seed=st.integers(0, 99))
    def test_it_counts_as_much_as_all_rows(self, rows, positions, seed):
        own = moments_of(Rows(randn(rows, positions, 2)), seed=seed)
        assert own.count.item() == pytest.approx(rows * positions)

    def test_of_few_rows_it_is_all_of_them(self):
        x = randn(FEWEST // 4, 4, D)
        close(moments_of(Rows(x)).A, second_moment(x.flatten(0, 1)), 1e-12)

    def test_all_rows_if_asked(self):
        x = randn(2 * FEWEST, 1, D)
        close(moments_of(Rows(x), None).A, second_moment(x.flatten(0, 1)), 1e-12)

    def test_images_are_drawn_as_a_whole(self):
        conv = nn.Conv2d(2, 3, 3).double()
        x = randn(400, 2, 10, 10)
        found = {}
        for rows in (4, None):
            opt = natgrad.NewtonMuon(nn.Sequential(conv, nn.ReLU(), nn.Conv2d(3, 3, 3).double()), rows_per_input=rows)
            opt.model(x).square().mean().backward()
            opt.step()
            found[rows] = next(m for unit, m in opt._matrices.inputs.moments.items() if unit.weight == "0.weight")
        assert found[4].count == found[None].count == 400 * 64
        assert 0 < (found[4].A - found[None].A).norm() < 0.15 * found[None].A.norm()
