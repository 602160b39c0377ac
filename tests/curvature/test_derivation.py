"""docs/derivation.md: every numbered identity has a function and a test, and those that no other file tests."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import natgrad
from natgrad.linalg import CenteredKronecker, ExactBlock, Kronecker, vec
from natgrad.losses import output_curvature
from oracles import close, f64, jacobian, net, randn, spd

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \((\d+)\) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)

sizes, seeds = st.integers(1, 4), st.integers(0, 10_000)


# The page ----------------------------------------------------------------------------------------------


def test_identities_are_numbered_in_order_and_each_has_its_row():
    tags = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", PAGE)]
    assert tags == list(range(1, len(tags) + 1))
    assert [int(n) for n, _, _ in ROWS] == tags
    assert len(tags) == PAGE.count("```math")
    assert len(tags) > 40


def test_identities_that_the_text_refers_to_exist():
    text = re.sub(r"```math.*?```", "", PAGE, flags=re.DOTALL)
    assert {int(n) for n in re.findall(r"\((\d{1,2})\)", text)} <= set(range(1, len(ROWS) + 1))


def names(cell):
    """The names in backticks, of a cell that holds nothing else."""
    found = re.findall(r"`([^`]+)`", cell)
    assert found
    assert re.sub(r"`[^`]+`", "", cell).strip(" ,") == ""
    return found


@pytest.mark.parametrize("name", sorted({n for _, functions, _ in ROWS for n in names(functions)}))
def test_a_named_function_exists(name):
    assert name.startswith("natgrad.")
    assert resolve(name) is not None


def resolve(name):
    """What a dotted name is: an attribute where there is one, else a module."""
    path, *rest = name.split(".")
    found = importlib.import_module(path)
    for part in rest:
        path += f".{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


@pytest.mark.parametrize("name", sorted({n for _, _, tests in ROWS for n in names(tests)}))
def test_a_named_test_exists(name):
    file, *path = name.split("::")
    assert path[-1].startswith("test_")
    body = tree(ROOT / file).body
    for part in path:
        node = next((n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part), None)
        assert node is not None, f"{file} has no {part!r}"
        body = node.body
    assert isinstance(node, ast.FunctionDef)


@cache
def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


# One layer ---------------------------------------------------------------------------------------------


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_the_jacobian_of_an_affine_map(d_in, d_out, seed):
    """`∂a/∂θ = [hᵀ 1] ⊗ I`, for `θ = (vec W; b)`."""
    h, W, b = randn(d_in, seed=seed), randn(d_out, d_in, seed=seed), randn(d_out, seed=seed)
    of_W, of_b = torch.autograd.functional.jacobian(lambda W, b: W @ h + b, (W, b))
    x = torch.cat([h, torch.ones(1, dtype=f64)])
    close(torch.cat([vec(of_W), of_b], 1), torch.kron(x.unsqueeze(0), torch.eye(d_out, dtype=f64)), 1e-12)


def classification(n=6):
    return net(3, 4, 3), nn.CrossEntropyLoss(), (randn(n, 3), torch.arange(n) % 3)


def test_columns_are_the_jacobian_applied_to_a_factor():
    """`x_i ⊗ g_ik = J_iᵀ s_ik`, over `√N`."""
    model, loss, (x, y) = classification()
    output = model(x).detach()
    factor = torch.stack(list(output_curvature(loss).exact_columns(output, y)), 1)  # (n, k, classes)
    blocks = natgrad.fisher(model, loss, (x, y), "block").blocks
    for layer in ("0", "2"):
        J, _ = jacobian(model, x, [f"{layer}.weight", f"{layer}.bias"])
        columns = torch.einsum("nkc,ncp->pnk", factor, J.view(*output.shape, -1)).flatten(1)
        close(blocks[layer].columns(), columns / len(x) ** 0.5, 1e-12)


def test_the_gradient_is_the_mean_of_the_empirical_columns():
    model, loss, (x, y) = classification()
    blocks = natgrad.fisher(model, loss, (x, y), "block", estimator="empirical").blocks
    gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for layer, (W, b) in zip(("0", "2"), (gradients[:2], gradients[2:]), strict=True):
        close(blocks[layer].columns().sum(1) / len(x) ** 0.5, torch.cat([W.flatten(), b]), 1e-12)


# The exact block ---------------------------------------------------------------------------------------


def exact_block(n, k, d_in, d_out, seed):
    h, g = randn(n, d_in, seed=seed), randn(n, k, d_out, seed=seed + 1)
    return h, g, ExactBlock(h.unsqueeze(1), g.unsqueeze(2), bias=True, scale=1 / n)


@given(n=sizes, k=sizes, d_in=sizes, d_out=sizes, seed=seeds)
def test_the_four_parts_of_the_exact_block(n, k, d_in, d_out, seed):
    h, g, G = exact_block(n, k, d_in, d_out, seed)
    Y = [g_i.mT @ g_i for g_i in g]

    def mean(inputs):
        return torch.stack([torch.kron(P, Q) for P, Q in zip(inputs, Y, strict=True)]).mean(0)

    close(G.WW.to_dense("vec"), mean([torch.outer(h_i, h_i) for h_i in h]), 1e-12)
    close(G.Wb.to_dense("vec"), mean([h_i.unsqueeze(1) for h_i in h]), 1e-12)
    close(G.bW.to_dense("vec"), mean([h_i.unsqueeze(0) for h_i in h]), 1e-12)
    close(G.bb.to_dense("vec"), torch.stack(Y).mean(0), 1e-12)
    x = torch.cat([h, torch.ones(n, 1, dtype=f64)], 1)
    close(G.to_dense("vec"), mean([torch.outer(x_i, x_i) for x_i in x]), 1e-12)


@given(n=sizes, k=sizes, d_in=sizes, d_out=sizes, seed=seeds)
def test_the_gram_matrix_of_the_exact_block(n, k, d_in, d_out, seed):
    """`(x_i·x_j)(g_ik·g_jq)/N`, of columns whose outer products sum to the block."""
    h, g, G = exact_block(n, k, d_in, d_out, seed)
    x = torch.cat([h, torch.ones(n, 1, dtype=f64)], 1)
    S = torch.stack([torch.kron(x[i], g[i, q]) for i in range(n) for q in range(k)], 1) / n**0.5
    close(G.gram(), S.mT @ S, 1e-12)
    close(G.to_dense("vec"), S @ S.mT, 1e-12)


def test_the_bias_has_no_residual():
    model, loss, data = classification()
    exact = natgrad.fisher(model, loss, data, "block").blocks
    for layer, kfac in natgrad.fisher(model, loss, data, "kfac").blocks.items():
        B = exact[layer].bb.to_dense()
        R = exact[layer].to_dense() - kfac.to_dense()
        close(kfac.to_dense()[-len(B) :, -len(B) :], B, 1e-12)
        assert R[: -len(B), : -len(B)].norm() > 1e-3


# Centered coordinates ----------------------------------------------------------------------------------


def affine(n, d_in, d_out, seed):
    """Cases of one layer: inputs with their mean and covariance, weight and bias."""
    h = randn(n, d_in, seed=seed) + randn(d_in, seed=seed + 1)
    m = h.mean(0)
    return h, m, (h - m).mT @ (h - m) / n, randn(d_out, d_in, seed=seed + 2), randn(d_out, seed=seed + 3)


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_the_bias_in_centered_coordinates_is_the_mean_pre_activation(d_in, d_out, seed):
    """With `b' = b + W m = E[a]`, weight and bias add up: `tr(B W C Wᵀ) + b'ᵀ B b'`."""
    h, m, C, W, b = affine(30, d_in, d_out, seed)
    B = spd(d_out, seed)
    mean = (h @ W.mT + b).mean(0)
    close(b + W @ m, mean, 1e-12)
    quadratic = CenteredKronecker(covariance=C, mean=m, output=B).quadratic((W, b))
    close(quadratic, (B @ W @ C @ W.mT).trace() + mean @ B @ mean, 1e-12)


def whitening(C, epsilon=0.1):
    """`(C + εI)^(−1/2)`."""
    return Kronecker(C, torch.ones(1, 1, dtype=f64)).power(-0.5, epsilon).to_dense()


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_descent_in_whitened_coordinates_is_the_centered_step_with_B_the_identity(d_in, d_out, seed):
    h, m, C, W, b = affine(30, d_in, d_out, seed)
    U, y = whitening(C), randn(30, d_out, seed=seed + 4)

    def gradients(f, *parameters):
        leaves = [p.clone().requires_grad_() for p in parameters]
        return torch.autograd.grad((f(*leaves).tanh() - y).square().sum(1).mean(), leaves)

    grad_W, grad_b = gradients(lambda W, b: h @ W.mT + b, W, b)
    V, c = W @ torch.linalg.inv(U), b + W @ m
    grad_V, grad_c = gradients(lambda V, c: (h - m) @ U @ V.mT + c, V, c)
    close(grad_V, (grad_W - torch.outer(grad_b, m)) @ U, 1e-10)
    close(grad_c, grad_b, 1e-10)

    damped = C + 0.1 * torch.eye(d_in, dtype=f64)
    plain = CenteredKronecker(covariance=damped, mean=m, output=torch.eye(d_out, dtype=f64))
    step_W, step_b = plain.solve((grad_W, grad_b))
    moved_W = (V - 0.3 * grad_V) @ U
    close(moved_W, W - 0.3 * step_W, 1e-10)
    close(c - 0.3 * grad_c - moved_W @ m, b - 0.3 * step_b, 1e-10)


@given(d_in=sizes, d_out=sizes, seed=seeds)
def test_renewed_whitening_leaves_the_function(d_in, d_out, seed):
    h, m, C, V, c = affine(30, d_in, d_out, seed)
    later, m_later, C_later, *_ = affine(30, d_in, d_out, seed + 10)
    U, U_later = whitening(C), whitening(C_later)
    V_later, c_later = V @ U @ torch.linalg.inv(U_later), c + V @ U @ (m_later - m)
    for inputs in (h, later):
        close((inputs - m_later) @ U_later @ V_later.mT + c_later, (inputs - m) @ U @ V.mT + c, 1e-10)
