"""Intervals, paired ratios, steps to an error and spreads, against scipy and by hand."""

import math

import numpy as np
import pytest

from natgrad.study.statistics import final, mean_interval, paired, reach, spread, student_cdf, student_quantile
from natgrad.study.summary import ratio_words

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 30, 101])
def test_students_t_is_scipys(df):
    for t in (0.0, 0.1, 0.7, 2.0, 12.0):
        assert student_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-13)
    for p in (0.5, 0.6, 0.9, 0.975, 0.995):
        assert student_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_interval_of_a_mean_is_scipys():
    values = [0.3, -1.2, 2.5, 0.9, 0.1]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-9)


@pytest.mark.parametrize("values", [[2.0], [1.0, 3.0]])
def test_fewer_than_three_values_have_no_interval(values):
    found = mean_interval(values)
    assert found.mean == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.tells


def test_an_interval_of_many_decades_is_not_shown():
    """Neither as words nor as a line: three seeds may differ by as much as ten powers of ten."""
    wide = paired("t", "a", "b", {0: 1e-8, 1: 1.0, 2: 1e8}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert wide.ratio.high / wide.ratio.low > 1e20
    assert ratio_words(wide.ratio) == ("1", "too wide to tell")
    narrow = paired("t", "a", "b", {0: 0.9, 1: 1.0, 2: 1.1}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert " to " in ratio_words(narrow.ratio)[1]
    assert ratio_words(None) == ("–", "–")


def test_paired_ratio_is_of_logarithms_on_the_same_seed():
    ours, its = {0: 2.0, 1: 8.0, 2: 3.0}, {2: 3.0, 1: 2.0, 0: 1.0}
    found = paired("t", "a", "b", ours, its)
    logs = np.log([2.0, 4.0, 1.0])
    low, high = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert found.ratio.mean == pytest.approx(2.0)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)
    assert found.difference.mean == pytest.approx((1 + 6 + 0) / 3)
    assert (found.pairs, found.lost, found.better) == (3, 0, 0)


def test_one_pair_has_a_ratio_and_no_interval():
    one = paired("t", "a", "b", {0: 2.0}, {0: 1.0})
    assert one.ratio.mean == pytest.approx(2.0)
    assert math.isnan(one.ratio.low)
    assert math.isnan(one.ratio.high)


def test_a_run_without_an_end_is_no_pair_but_counts():
    found = paired("t", "a", "b", {0: 1.0, 1: math.inf, 2: 3.0}, {0: 2.0, 1: 1.0, 2: 6.0, 3: 1.0})
    assert (found.pairs, found.lost, found.better) == (2, 1, 2)
    assert found.ratio.mean == pytest.approx(0.5)


def test_figures_that_are_not_positive_have_differences_only():
    found = paired("t", "a", "b", {0: -1.0, 1: 2.0}, {0: 1.0, 1: 1.0})
    assert found.ratio is None
    assert found.difference.mean == pytest.approx(-0.5)
    assert paired("t", "a", "b", {0: math.inf}, {0: 1.0}).difference is None


def run(*values, status="finished", pace=0.5):
    curve = [{"step": 10 * i, "seconds": pace * i, "loss": v} for i, v in enumerate(values)]
    return {"figure": "loss", "status": status, "curve": curve}


def test_final_is_infinite_for_a_run_without_an_end():
    assert final(run(3.0, 1.0)) == 1.0
    assert final(run(3.0, None, status="diverged")) == math.inf
    assert final(run(status="raised")) == math.inf
    assert final(run(3.0, status="raised")) == math.inf


def test_reach_is_for_good():
    assert reach(run(5.0, 1.0, 4.0, 2.0, 1.5), 2.0) == (30, 1.5)
    assert reach(run(5.0, 4.0), 2.0) is None
    assert reach(run(1.0, 0.5), 2.0) == (0, 0.0)
    assert reach(run(1.0, None), 2.0) is None


def test_spread_goes_as_far_as_the_shortest_run_and_is_straight_on_a_log_scale():
    s = spread([run(4.0, 1.0, 0.5), run(4.0, 4.0), run(16.0, 16.0, 1.0)], "step")
    assert list(s.x) == [0, 10]
    assert list(s.median) == pytest.approx([4.0, 4.0])
    assert list(s.low) == pytest.approx([4.0, 1.0])
    assert list(s.high) == pytest.approx([16.0, 16.0])
    slow = spread([run(4.0, 1.0), run(4.0, 1.0, pace=1.0)], "seconds")
    assert list(slow.x) == [0.0, 0.5]
    assert list(slow.median) == pytest.approx([4.0, 1.5])  # of 1 and of 2, half-way from 4 to 1 on a log scale
    assert len(spread([run(None)], "step").x) == 0
