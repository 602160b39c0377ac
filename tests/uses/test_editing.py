"""Pruning, merging, consolidation and projection, against least squares and dense eigenvectors."""

import copy
import inspect

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import CenteredKronecker, Dense, Kronecker, Rows
from oracles import close, f64, net, randn, spd

LOSS = nn.MSELoss(reduction="sum")


def regression(seed=0, n=60, d=6):
    x = randn(n, d, seed=seed) @ spd(d, seed=1)
    return x, x @ randn(d, 1, seed=9) + 0.3 * randn(n, 1, seed=seed + 1)


def fitted(x, y):
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=f64)
    model.weight.data = torch.linalg.lstsq(x, y).solution.mT.contiguous()
    return model


def loss_of(model, x, y):
    return float(LOSS(model(x), y).detach())


# Pruning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac"])  # all exact for one output
def test_pruning_solves_least_squares_on_the_weights_that_stay(structure, rounds):
    x, y = regression()
    model = fitted(x, y)
    before = loss_of(model, x, y)
    F = natgrad.fisher(model, LOSS, (x, y), structure)
    pruned = natgrad.prune(model, F, sparsity=0.5, damping=1e-10, rounds=rounds)
    kept = pruned.masks["weight"][0]
    assert kept.sum() == 3
    close(model.weight[0, kept].detach(), torch.linalg.lstsq(x[:, kept], y).solution[:, 0], 1e-6)
    assert not model.weight[0, ~kept].any()
    assert loss_of(model, x, y) - before == pytest.approx(pruned.increase, rel=1e-6)


def test_the_weight_taken_out_is_the_one_that_is_missed_least():
    x, y = regression(seed=4)
    model = fitted(x, y)
    others = [[j for j in range(6) if j != i] for i in range(6)]
    rises = [float((x[:, rest] @ torch.linalg.lstsq(x[:, rest], y).solution - y).square().sum()) for rest in others]
    F = natgrad.fisher(model, LOSS, (x, y), "dense")
    pruned = natgrad.prune(model, F, sparsity=1 / 6, damping=1e-10)
    assert not pruned.masks["weight"][0, int(torch.tensor(rises).argmin())]


def test_a_network_loses_less_than_by_magnitude():
    torch.manual_seed(0)
    model, x = net(5, 12, 1), randn(200, 5)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    opt = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    F = natgrad.fisher(model, nn.MSELoss(), (x, y), "dense")
    natgrad.prune(model, F, sparsity=0.3)
    ours = closure().item()
    model.load_state_dict(weights)
    every = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[layer.weight.abs() <= every.sort().values[round(0.3 * len(every)) - 1]] = 0
    assert ours < 0.2 * closure().item()


def test_masks_are_kept_in_further_training():
    x, y = regression()
    model = fitted(x, y)
    pruned = natgrad.prune(model, natgrad.fisher(model, LOSS, (x, y)), 0.5)
    model.weight.data += 1
    pruned.apply(model)
    assert (model.weight != 0).sum() == 3


def test_parameters_to_prune_are_chosen():
    torch.manual_seed(0)
    model, data = net(4, 5, 3), (randn(30, 4), torch.arange(30) % 3)
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, centered=False)
    pruned = natgrad.prune(model, F, 0.4, params=["2.weight"])
    assert list(pruned.masks) == ["2.weight"]
    assert (model[0].weight != 0).all()
    assert (model[2].weight == 0).sum() == 6


# Merging --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac", "implicit"])
def test_merged_linear_models_are_the_model_of_all_data(structure):
    (x1, y1), (x2, y2) = regression(0, 40), regression(5, 80)
    a, b = fitted(x1, y1), fitted(x2, y2)
    F_a, F_b = (natgrad.fisher(m, nn.MSELoss(), d, structure) for m, d in ((a, (x1, y1)), (b, (x2, y2))))
    merged = natgrad.merge([a, b], [F_a, F_b], weights=[40, 80], damping=0.0)
    close(merged.weight.detach(), fitted(torch.cat([x1, x2]), torch.cat([y1, y2])).weight.detach(), 1e-6)
    close(a.weight.detach(), fitted(x1, y1).weight.detach())


def test_large_damping_is_the_mean_of_the_weights():
    torch.manual_seed(0)
    data = randn(20, 4), torch.arange(20) % 3
    models = [nn.Sequential(net(4, 5, 3), nn.BatchNorm1d(3, affine=True)).double().eval() for _ in range(3)]
    matrices = [natgrad.fisher(m, nn.CrossEntropyLoss(), data, params=lambda n: n.startswith("0")) for m in models]
    merged = natgrad.merge(models, matrices, damping=1e8)
    for n, p in merged.named_parameters():
        close(p.detach(), torch.stack([dict(m.named_parameters())[n].detach() for m in models]).mean(0), 1e-6)


def test_what_cannot_be_merged_is_said():
    torch.manual_seed(0)
    data = randn(20, 4), torch.arange(20) % 3
    a, b = net(4, 5, 3), net(4, 6, 3)
    F = natgrad.fisher(a, nn.CrossEntropyLoss(), data)
    with pytest.raises(ValueError, match="2 models and 1 matrices"):
        natgrad.merge([a, a], [F])
    with pytest.raises(ValueError, match=r"matrices\[1\] is of another model: '0.weight' has shape \(5, 4\) there"):
        natgrad.merge([a, b], [F, F])
    with pytest.raises(ValueError, match="a weight=0 is not usable"):
        natgrad.merge([a, a], [F, F], weights=[1, 0])
    with pytest.raises(TypeError, match="F is a dict; expected a matrix"):
        inspect.unwrap(natgrad.ewc)(a, {})
    with pytest.raises(TypeError, match="expected a fixed matrix: use structure='kfac'"):
        natgrad.ewc(a, natgrad.fisher(a, nn.CrossEntropyLoss(), data, "implicit"))
    with pytest.raises(ValueError, match=r"F is torch.float64 on cpu, and '0.weight' is torch.float32"):
        natgrad.prune(net(4, 5, 3).float(), F)
    with pytest.raises(ValueError, match=r"sparsity=1.5"):
        natgrad.prune(a, F, 1.5)


# Consolidation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "kfac", "ekfac"])
def test_the_penalty_and_its_gradient(structure):
    torch.manual_seed(0)
    model, data = net(4, 5, 3), (randn(20, 4), torch.arange(20) % 3)
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure)
    M = F.to_dense()
    penalty = natgrad.ewc(model, F, strength=3.0)
    assert penalty() == 0
    d = randn(F.space.size, seed=3)
    with torch.no_grad():
        for p, step in zip(model.parameters(), F.space.unflatten(d), strict=True):
            p += step
    value = penalty()
    value.backward()
    close(value.detach(), 1.5 * d @ M @ d, 1e-8)
    close(F.space.flatten(tuple(p.grad for p in model.parameters())), 3 * M @ d, 1e-8)


def test_consolidated_training_finds_the_model_of_both_data_sets():
    (x1, y1), (x2, y2) = regression(0, 40), regression(5, 80)
    model = fitted(x1, y1)
    penalty = natgrad.ewc(model, natgrad.fisher(model, LOSS, (x1, y1), "dense"))
    opt = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        opt.zero_grad()
        loss = LOSS(model(x2), y2) + penalty()
        loss.backward()
        return loss

    opt.step(closure)
    close(model.weight.detach(), fitted(torch.cat([x1, x2]), torch.cat([y1, y2])).weight.detach(), 1e-6)


# Projection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["smallest", "largest"])
@pytest.mark.parametrize("structure", ["dense", "kfac", "homogeneous", "ekfac", "diagonal", "block"])
def test_projections_are_those_of_the_dense_eigenvectors(structure, which):
    torch.manual_seed(0)
    model, data = net(4, 6, 3), (randn(60, 4), randn(60, 3))
    name = "kfac" if structure == "homogeneous" else structure
    F = natgrad.fisher(model, nn.MSELoss(), data, name, centered=structure == "kfac", estimator="mc", samples=3)
    e, U = torch.linalg.eigh(F.to_dense())
    v = randn(2, F.space.size)
    for keep in (0.1, 0.5, 1.0):
        count = round(keep * len(e))
        if structure == "block":
            count = len(e) - 8
        # only where there is a gap is the subspace one
        gaps = (e[1:] - e[:-1]) / e[-1]
        own = U[:, :count] if which == "smallest" else U[:, len(e) - count :]
        edge = count if which == "smallest" else len(e) - count
        if 0 < edge < len(e) and gaps[edge - 1] < 1e-9:
            continue
        close(F.project(v, count / len(e), which=which), v @ own @ own.mT, 1e-8)
    named = dict(zip(F.space.names, F.space.unflatten(v), strict=True))
    part = F.project(named, 0.5, which=which)
    close(F.space.flatten(tuple(part.values())), F.project(v, 0.5, which=which))
    close(F.project(F.project(v, 0.3), 0.3), F.project(v, 0.3), 1e-8)
    assert F.quadratic(F.project(v[0], 0.3)) < F.quadratic(v[0])


def test_parts_by_rows_and_one_layer_alone():
    pieces = [Kronecker(spd(3, 0), spd(2, 1)), Kronecker(spd(3, 2), spd(4, 3))]
    M = Rows(pieces)
    _, U = torch.linalg.eigh(M.to_dense())
    v = randn(M.space.size)
    close(M.project(v, 0.5), U[:, :9] @ (U[:, :9].mT @ v))
    Z = CenteredKronecker(covariance=spd(3, 0), mean=randn(3), output=spd(2, 1))
    _, U = torch.linalg.eigh(Z.to_dense())
    v = randn(Z.space.size)
    close(Z.project(v, 0.5), U[:, :4] @ (U[:, :4].mT @ v))


def test_what_cannot_be_projected_is_said():
    with pytest.raises(ValueError, match=r"keep=1.5 is not usable: expected a number in \[0, 1\]"):
        Dense(torch.eye(2)).project(torch.ones(2), 1.5)
    model, data = net(4, 5, 3), (randn(20, 4), torch.arange(20) % 3)
    with pytest.raises(TypeError, match="structure without a known eigenbasis"):
        natgrad.fisher(model, nn.CrossEntropyLoss(), data, "implicit").project(torch.ones(43, dtype=f64), 0.5)


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    torch.manual_seed(0)
    a, b = net(4, 5, 3).to(dtype), net(4, 5, 3).to(dtype)
    data = randn(20, 4).to(dtype), torch.arange(20) % 3
    F_a, F_b = (natgrad.fisher(m, nn.CrossEntropyLoss(), data) for m in (a, b))
    merged = natgrad.merge([a, b], [F_a, F_b])
    exact = natgrad.merge([copy.deepcopy(a).float(), copy.deepcopy(b).float()], [F_a, F_b])
    for p, q in zip(merged.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype))
    penalty = natgrad.ewc(a, F_a)
    with torch.no_grad():
        a[0].weight.add_(1)
    penalty().backward()
    assert a[0].weight.grad.dtype == dtype
    with pytest.warns(RuntimeWarning, match="F was computed at other weights: '0.weight' has changed"):
        pruned = natgrad.prune(a, F_a, 0.5)
    assert (a[0].weight == 0).sum() + (a[2].weight == 0).sum() == 18
    assert pruned.increase > 0


def test_a_penalty_that_would_reward_leaving_is_refused():
    torch.manual_seed(0)
    model, data = net(4, 5, 3), (randn(20, 4), torch.arange(20) % 3)
    H = natgrad.hessian(model, nn.CrossEntropyLoss(), data, "dense")
    e, U = torch.linalg.eigh(H.to_dense())
    assert e[0] < 0
    penalty = natgrad.ewc(model, H)
    with torch.no_grad():
        for p, step in zip(model.parameters(), H.space.unflatten(U[:, 0].contiguous()), strict=True):
            p += step
    with pytest.raises(ValueError, match="F is indefinite: its curvature is -"):
        penalty()


def test_matrices_of_the_other_model_are_warned_of():
    torch.manual_seed(0)
    data = randn(20, 4), torch.arange(20) % 3
    models = [net(4, 5, 3) for _ in range(2)]
    matrices = [natgrad.fisher(m, nn.CrossEntropyLoss(), data) for m in models]
    with pytest.warns(RuntimeWarning, match=r"matrices\[[01]\] was computed at other weights"):
        natgrad.merge(models, matrices[::-1])
