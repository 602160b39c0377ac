"""What theory says of the structures: where they coincide, which is closest, what random labels converge to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import natgrad
from cases_by_hand import CLASSES, MODELS, SEQUENTIAL, ByHand
from oracles import centering, close, f64, net, numel, randn

seeds = st.integers(0, 10_000)
centering_or_not = pytest.mark.parametrize("centered", [True, False])


def problem(model="mlp", n=8, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MODELS[model](3, 4, bias)
    x = randn(n, *[3] * (model in SEQUENTIAL), 3, seed=seed)
    shape = network(x).shape
    y = torch.randint(CLASSES, (n, *shape[2:]), generator=torch.Generator().manual_seed(seed))
    return network, nn.CrossEntropyLoss(), (x, y)


def dense(problem, structure, of="fisher", seed=None, **options):
    """A structure's matrix; with a seed, from the same random labels whatever the structure."""
    if seed is not None:
        options |= {"estimator": "mc", "generator": torch.Generator().manual_seed(seed)}
    return getattr(natgrad, of)(*problem, structure, **options).to_dense()


# Where structures coincide -----------------------------------------------------------------------------


@centering_or_not
@given(seed=seeds)
def test_one_case_and_one_column_factorize(centered, seed):
    one = problem(n=1, seed=seed)
    options = {"estimator": "empirical"}
    exact = dense(one, "block", **options)
    close(dense(one, "kfac", centered=centered, **options), exact, 1e-12)
    close(dense(one, "ekfac", centered=centered, **options), exact, 1e-10)


@centering_or_not
@given(seed=seeds)
def test_one_case_factorizes_with_all_its_columns(centered, seed):
    one = problem(n=1, seed=seed)
    close(dense(one, "kfac", centered=centered), dense(one, "block"), 1e-12)


@centering_or_not
@given(seed=seeds)
def test_a_linear_network_with_squared_error_factorizes(centered, seed):
    linear = net(3, 4, 2, activation=nn.Identity), nn.MSELoss(), (randn(9, 3, seed=seed), randn(9, 2, seed=seed))
    close(dense(linear, "kfac", centered=centered), dense(linear, "block"), 1e-11)


@centering_or_not
def test_independent_inputs_and_output_curvatures_factorize(centered):
    """Every input meets every class weight: `h` and `w (diag p − p pᵀ)` are independent where `p` is constant."""
    model = nn.Linear(3, CLASSES, dtype=f64)
    with torch.no_grad():
        model.weight.zero_()
    x, y = randn(5, 3).repeat_interleave(CLASSES, 0), torch.arange(CLASSES).repeat(5)
    independent = model, nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.3], dtype=f64)), (x, y)
    close(dense(independent, "kfac", centered=centered), dense(independent, "block"), 1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_elsewhere_they_differ(structure):
    exact = dense(problem(), "block")
    assert (dense(problem(), structure) - exact).norm() > 1e-2 * exact.norm()


@pytest.mark.parametrize("model", sorted(MODELS))
@settings(max_examples=8)
@given(seed=seeds, label_seed=st.one_of(st.none(), seeds))
def test_block_and_diagonal_are_parts_of_the_whole(model, seed, label_seed):
    its = problem(model, seed=seed)
    whole, hand = dense(its, "dense", seed=label_seed), ByHand.of(*its[:2], [its[2]])
    close(dense(its, "block", seed=label_seed), hand.part_in_blocks(whole), 1e-11)
    close(dense(its, "diagonal", seed=label_seed), torch.diag(whole.diagonal()), 1e-11)


# EKFAC is the closest ----------------------------------------------------------------------------------


@centering_or_not
@pytest.mark.parametrize("model", sorted(MODELS))
@settings(max_examples=8)
@given(seed=seeds, label_seed=st.one_of(st.none(), seeds), bias=st.booleans())
def test_ekfac_is_never_further_from_the_block_than_kfac(model, centered, seed, label_seed, bias):
    network, loss, (x, y) = problem(model, bias=bias, seed=seed)
    its = network, loss, [(x[:3], y[:3]), (x[3:], y[3:])]  # EKFAC takes two passes over them
    exact, hand = dense(its, "block", seed=label_seed), ByHand.of(*its)
    T_inv = torch.linalg.inv(hand.assemble(lambda layer: hand.coordinates(layer, centered=centered)))
    residual = [
        (T_inv.mT @ (exact - dense(its, structure, seed=label_seed, centered=centered)) @ T_inv).norm()
        for structure in ("ekfac", "kfac")
    ]
    assert residual[0] <= residual[1] * (1 + 1e-9) + 1e-12


# Random labels -----------------------------------------------------------------------------------------

WITH_LABELS = ["dense", "block", "kfac", "ekfac", "diagonal"]


@pytest.mark.parametrize("structure", WITH_LABELS)
def test_mc_converges_as_one_over_the_root_of_samples(structure):
    """The mean square error over seeds falls by 16 with 16 times the samples."""
    its = problem()
    exact, errors = dense(its, structure), []
    for samples in (4, 64):
        draws = [dense(its, structure, seed=s, samples=samples) for s in range(12)]
        errors.append(torch.stack([(d - exact).square().sum() for d in draws]).mean())
    assert 16 / 2.5 < errors[0] / errors[1] < 16 * 2.5


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("structure", ["dense", "block", "kfac", "diagonal"])
def test_mc_is_unbiased(structure, samples):
    """Linear in the columns' squares, so that the mean over seeds is the exact matrix, within four standard errors
    of its inner product with that matrix."""
    its = problem()
    exact = dense(its, structure)
    draws = torch.stack([(dense(its, structure, seed=s, samples=samples) * exact).sum() for s in range(40)])
    assert (draws.mean() - exact.square().sum()).abs() < 4 * draws.std() / len(draws) ** 0.5


# Damping in centered coordinates -----------------------------------------------------------------------


def shifted(model, data, shift):
    """The same function of inputs that are moved by `shift`."""
    moved = MODELS["mlp"](3, 4, True)
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.first.bias -= moved.first.weight @ shift
    return moved, (data[0] + shift, data[1])


def change_of_the_function(model, loss, data, structure, centered, style="centered"):
    """The damped natural gradient's change of the first layer's pre-activations."""
    grads = torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters()))
    gradient = {n: g for (n, _), g in zip(model.named_parameters(), grads, strict=True)}
    F = natgrad.fisher(model, loss, data, structure, centered=centered)
    step = F.solve(gradient, damping=0.1, damping_style=style)
    return data[0] @ step["first.weight"].mT + step["first.bias"]


@centering_or_not
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_shift_of_the_inputs_leaves_the_centered_step_alone(structure, centered):
    model, loss, data = problem()
    moved, moved_data = shifted(model, data, randn(3, seed=4) + 2)
    close(moved(moved_data[0]), model(data[0]), 1e-12)
    before = change_of_the_function(model, loss, data, structure, centered)
    after = change_of_the_function(moved, loss, moved_data, structure, centered)
    difference = (after - before).norm() / before.norm()
    assert difference < 1e-9 if centered else difference > 1e-2
    plain = change_of_the_function(moved, loss, moved_data, structure, centered, "exact")
    assert (plain - change_of_the_function(model, loss, data, structure, centered, "exact")).norm() > 1e-2


def test_centered_and_homogeneous_kfac_are_one_matrix_but_in_centered_damping():
    its, v = problem(), randn(numel(problem()[0]))
    apart, together = (natgrad.fisher(*its, "kfac", centered=c) for c in (True, False))
    close(apart.to_dense(), together.to_dense(), 1e-12)
    close(apart.solve(v, 0.1), together.solve(v, 0.1), 1e-11)
    difference = apart.solve(v, 0.1, damping_style="centered") - together.solve(v, 0.1, damping_style="centered")
    assert difference.norm() > 1e-3 * together.solve(v, 0.1).norm()


def test_the_determinant_of_the_centering_is_one():
    T = centering(randn(4, seed=1), 3)
    close(torch.linalg.det(T), torch.ones((), dtype=f64), 1e-12)
