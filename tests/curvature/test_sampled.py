"""Matrix-free Monte Carlo and empirical matrices against the dense matrices of the same labels."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, net, randn


class Tokens(nn.Module):
    """Logits at every position, `(N, classes, T)`."""

    def __init__(self):
        super().__init__()
        self.inner = net(4, 5, 3)

    def forward(self, x):
        return self.inner(x).mT


def problems():
    torch.manual_seed(0)
    x, y = randn(12, 4), torch.arange(12) % 3
    weight = torch.tensor([1.0, 2, 0.5], dtype=f64)
    tokens = randn(6, 5, 4), torch.arange(30).view(6, 5) % 3
    return {
        "cross-entropy": (net(4, 5, 3), nn.CrossEntropyLoss(), (x, y)),
        "weights, sum": (net(4, 5, 3), nn.CrossEntropyLoss(weight=weight, reduction="sum"), (x, y)),
        "squares": (net(4, 5, 3), nn.MSELoss(), (x, randn(12, 3, seed=1))),
        "logistic": (net(4, 5, 3), nn.BCEWithLogitsLoss(), (x, (randn(12, 3, seed=1) > 0).double())),
        "tokens": (Tokens(), nn.CrossEntropyLoss(), tokens),
    }


def batches(data):
    x, y = data
    return [(x[:5], y[:5]), (x[5:], y[5:])]


@pytest.mark.parametrize("problem", problems())
@pytest.mark.parametrize(("estimator", "samples"), [("mc", 1), ("mc", 4), ("empirical", 1)])
def test_products_are_those_of_the_dense_matrix_with_the_same_labels(problem, estimator, samples):
    model, loss, data = problems()[problem]

    def of(structure):
        generator = torch.Generator().manual_seed(3)
        return natgrad.fisher(
            model, loss, batches(data), structure, estimator=estimator, samples=samples, generator=generator
        )

    F, dense = of("implicit"), of("dense").to_dense()
    v = randn(2, F.space.size)
    close(F @ v, v @ dense, 1e-9)
    close(F @ v, v @ dense, 1e-9)  # the labels are the same at the second product
    close(F.solve(v, 0.1), torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=f64), v.mT).mT, 1e-8)
    close(F.top_eigenvalues(2).values, torch.linalg.eigvalsh(dense).flip(0)[:2], 1e-8)


def test_two_matrices_of_one_generator_have_labels_of_their_own():
    model, loss, data = problems()["cross-entropy"]
    generator = torch.Generator().manual_seed(0)
    one, two = (
        natgrad.fisher(model, loss, data, "implicit", estimator="mc", generator=generator).to_dense() for _ in range(2)
    )
    assert (one - two).norm() > 0.01 * one.norm()
    torch.manual_seed(5)
    one = natgrad.fisher(model, loss, data, "implicit", estimator="mc").to_dense()
    torch.manual_seed(5)
    close(natgrad.fisher(model, loss, data, "implicit", estimator="mc").to_dense(), one)


def test_data_in_another_order_are_refused():
    model, loss, data = problems()["cross-entropy"]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=4, shuffle=True)
    F = natgrad.fisher(model, loss, loader, "implicit", estimator="mc")
    with pytest.raises(ValueError, match="give the data in a fixed order"):
        F @ randn(8, F.space.size)
