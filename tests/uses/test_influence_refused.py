"""What influence scores refuse, and say: data, queries and factors that do not fit."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import natgrad
from oracles import close, f64, net, randn
from scored import problem, tagger


@pytest.mark.parametrize("query", [True, False])
def test_training_targets_that_are_no_numbers_are_named(query):
    model, x, y = net(4, 6, 3), randn(10, 4), randn(10, 3, seed=1)
    y[7, 1] = torch.nan
    with pytest.raises(ValueError, match=r"the scores of 1 training examples are not finite.* first is example 7"):
        natgrad.influence(model, nn.MSELoss(), (x, y), (x[:2], y[:2]) if query else None)


def test_a_measure_of_no_query_is_refused():
    model, loss, train, _ = problem()
    with pytest.raises(ValueError, match="measure= is for queries, and there are none; give query="):
        natgrad.influence(model, loss, train, measure=lambda f, y: f[:, 0])


def test_a_query_without_a_gradient_is_named():
    model, data = tagger()
    y = data[1][:3].clone()
    y[1] = -100
    with pytest.raises(ValueError, match="query 1 has no gradient"):
        natgrad.influence(model, nn.CrossEntropyLoss(), data, (data[0][:3], y))
    with pytest.raises(ValueError, match="query 0 has no gradient"):
        natgrad.influence(model, nn.CrossEntropyLoss(), data, data, measure=lambda f, y: torch.zeros(len(f), dtype=f64))


def test_an_indefinite_matrix_is_said():
    model, loss, train, query = problem()
    H = -1 * natgrad.hessian(model, loss, train, "dense")
    with pytest.raises(ValueError, match="singular or indefinite"):
        natgrad.influence(model, loss, train, query, factors=H, damping=1e-3)


def test_factors_that_do_not_fit_are_said():
    model, loss, train, query = problem()
    F = natgrad.fisher(model, loss, train)
    with pytest.raises(ValueError, match=r"factors are torch.float32 on cpu.*factors.to\('cpu', torch.float64\)"):
        natgrad.influence(model, loss, train, query, factors=F.to(torch.float32))
    with pytest.raises(TypeError, match="factors is a dict; expected a matrix"):
        inspect.unwrap(natgrad.influence)(model, loss, train, query, factors={})
    for structure in ("dense", "implicit"):
        H = natgrad.hessian(model, loss, train, structure)
        with pytest.raises((ValueError, RuntimeError), match=r"indefinite|not positive definite"):
            natgrad.influence(model, loss, train, query, factors=H, damping=1e-6)


def test_factors_of_other_weights_are_refused(tmp_path):
    model, loss, train, query = problem()
    for structure in ("kfac", "dense"):
        F = natgrad.fisher(model, loss, train, structure)
        F.save(tmp_path / "factors.safetensors")
        other = net(4, 6, 3)  # of the same shapes
        for factors in (F, natgrad.load(tmp_path / "factors.safetensors"), F.to("cpu")):
            with pytest.raises(ValueError, match=r"computed at other weights of the model: '0.weight' has changed"):
                natgrad.influence(other, loss, train, query, factors=factors)
        assert natgrad.influence(other, loss, train, query, factors=1.0 * F).shape == (5, 20)
    H = natgrad.hessian(model, loss, train, "dense")
    with pytest.raises(ValueError, match="computed at other weights"):
        natgrad.influence(other, loss, train, query, factors=H)


class Shuffled:
    """Batches in another order at each pass."""

    def __init__(self, x, y):
        self.batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, len(x), 5)]

    def __iter__(self):
        self.batches = self.batches[1:] + self.batches[:1]
        return iter(self.batches)


class Mixed:
    """A batch sampler that says nothing of its order."""

    def __iter__(self):
        return iter(torch.randperm(20).view(5, 4).tolist())

    def __len__(self):
        return 5


def test_data_in_a_random_order_are_refused():
    model, loss, train, query = problem()
    data = TensorDataset(*train)
    drawn, mixed = BatchSampler(RandomSampler(data), 4, False), Mixed()
    for many in (
        DataLoader(data, 4, shuffle=True),
        DataLoader(data, batch_sampler=drawn),
        DataLoader(data, batch_sampler=mixed),
        Shuffled(*train),
    ):
        with pytest.raises(ValueError, match=r"(first batch of train|train is a DataLoader that shuffles)"):
            natgrad.influence(model, loss, many, query)
        with pytest.raises(ValueError, match=r"(first batch of query|query is a DataLoader that shuffles)"):
            natgrad.influence(model, loss, train, many)
    found = natgrad.influence(model, loss, DataLoader(TensorDataset(*train), 7), query)
    close(found, natgrad.influence(model, loss, train, query))


def test_a_model_in_training_mode_is_warned_of():
    _, loss, train, query = problem()
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.warns(RuntimeWarning, match="'1' \\(Dropout\\) is in training mode"):
        natgrad.influence(model, loss, train, query)
