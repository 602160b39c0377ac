"""What is said of a spectrum."""

import pytest
import torch

from natgrad.linalg import Dense
from natgrad.report.spectrum import spectrum_advice, spectrum_figures
from oracles import f64, spd


def density(e):
    return Dense(torch.diag(torch.as_tensor(e, dtype=f64))).spectral_density()


@pytest.mark.parametrize(
    ("e", "kinds"),
    [
        ([1.0] * 20, ["good"]),
        ([9.0] * 4 + [0.1] * 16, ["fair", "do"]),
        ([100.0] + [0.01] * 19, ["bad", "do"]),
        ([0.0] * 5, []),
    ],
)
def test_spread_or_concentrated(e, kinds):
    said = spectrum_advice(density(e))
    assert [a.kind for a in said] == kinds
    if kinds[:1] == ["bad"]:
        assert "90% of the curvature (the trace) is in 1 of 20 directions" in said[0].text
        assert "95% of all are below a thousandth" in said[0].text
        assert "step size above 0.02" in said[0].text
        assert "a tenth of the mean eigenvalue, 0.5." in said[1].text


def test_figures_are_those_of_the_eigenvalues():
    M = Dense(spd(12, 0))
    e = torch.linalg.eigvalsh(M.matrix).flip(0)
    found = spectrum_figures(M.spectral_density())
    assert found["largest"] == pytest.approx(float(e[0]))
    assert found["mean"] == pytest.approx(float(e.mean()))
    most = found["most"]
    assert e[:most].sum() >= 0.9 * e.sum() > e[: most - 1].sum()
