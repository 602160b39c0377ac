"""The back end for laplace-torch: its posteriors equal those of laplace-torch's own back end."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from oracles import close, f64, randn

laplace = pytest.importorskip("laplace")
from laplace.curvature import CurvlinopsGGN  # noqa: E402

from examples.laplace_torch_backend import NatgradGGN  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOL = {"full": 1e-6, "kron": 1e-12, "diag": 1e-12}  # laplace-torch forms the whole matrix by a float32 identity


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", TOL)
def test_posteriors_are_those_of_its_own_back_end(likelihood, subset, structure):
    x = randn(60, 4)
    y = x[:, :3].argmax(1) if likelihood == "classification" else randn(60, 3, seed=1)
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False), nn.Tanh(), nn.Linear(3, 3)
    model, found = nn.Sequential(*layers).to(f64), []
    for backend in (NatgradGGN, CurvlinopsGGN):
        posterior = laplace.Laplace(model, likelihood, subset, structure, backend=backend)
        posterior.fit(DataLoader(TensorDataset(x, y), 25))
        predicted = posterior(x[:5], link_approx="probit")
        found.append(
            (posterior.log_marginal_likelihood(), *(predicted if likelihood == "regression" else (predicted,)))
        )
    for mine, its in zip(*found, strict=True):
        close(mine.detach(), its.detach(), TOL[structure])


def test_a_layer_that_laplace_torch_has_no_form_for():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).to(f64)
    with pytest.raises(NotImplementedError, match=r"no form for the block of .*1.weight"):
        NatgradGGN(model, "regression").kron(randn(6, 4), randn(6, 3), 6)
