"""The structures of KFAC's step, each against its definition."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import natgrad
from kfac_steps import LABELS, C, D, N, X, model_of, step
from natgrad.curvature.bases import turned
from natgrad.linalg import factor, precision
from natgrad.optim.preconditioner import orthogonal
from natgrad.optim.preconditioner.orthogonal import newton_schulz
from oracles import close, f64, randn

FIXED = {"lr": 0.3, "momentum": 0.0}
STRUCTURES = ["kfac", "ekfac", "input", "diagonal", "identity"]


def change(model, **options):
    """What one step adds to each parameter, and the gradients that it had."""
    model = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
    step(model, opt)
    assert opt.diagnostics["accepted"], opt.diagnostics
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}, {
        n: p.grad for n, p in model.named_parameters()
    }


def inputs(model):
    """What goes into each linear layer."""
    found, h = {}, X
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            found[name] = h.detach()
        h = layer(h)
    return found


class TestInput:
    @pytest.mark.parametrize("bias_update", ["exact", "simple"])
    def test_centered_it_is_the_gradient_whitened_by_the_covariance(self, bias_update):
        model, eps = model_of(D, 4, C), 0.05
        came, g = change(model, structure="input", damping=eps, bias_update=bias_update, **FIXED)
        for name, h in inputs(model).items():
            m, cov = h.mean(0), (h - h.mean(0)).mT @ (h - h.mean(0)) / N
            gW, gb = g[f"{name}.weight"], g[f"{name}.bias"]
            W = (gW - torch.outer(gb, m)) @ torch.linalg.inv(cov + eps * torch.eye(len(m), dtype=f64))
            close(came[f"{name}.weight"], -0.3 * W)
            close(came[f"{name}.bias"], -0.3 * (gb - W @ m if bias_update == "exact" else gb))

    def test_not_centered_it_is_that_of_the_homogeneous_inputs(self):
        model, eps = model_of(D, 4, C), 0.05
        came, g = change(model, structure="input", damping=eps, centered=False, **FIXED)
        for name, h in inputs(model).items():
            x = torch.cat([h, torch.ones(N, 1, dtype=f64)], 1)
            V = torch.cat([g[f"{name}.weight"], g[f"{name}.bias"].unsqueeze(1)], 1)
            V = V @ torch.linalg.inv(x.mT @ x / N + eps * torch.eye(x.shape[1], dtype=f64))
            close(came[f"{name}.weight"], -0.3 * V[:, :-1])
            close(came[f"{name}.bias"], -0.3 * V[:, -1])

    def test_a_layer_without_bias_has_the_second_moment(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, C, bias=False)).to(f64)
        came, g = change(model, structure="input", damping=0.1, **FIXED)
        A = X.mT @ X / N + 0.1 * torch.eye(D, dtype=f64)
        close(came["0.weight"], -0.3 * g["0.weight"] @ torch.linalg.inv(A))

    def test_without_a_damping_it_is_a_share_of_each_layers_mean_eigenvalue(self):
        model = model_of(D, 4, C)
        came, _ = change(model, structure="input", **FIXED)
        for name, h in inputs(model).items():
            epsilon = 0.3 * float((h - h.mean(0)).square().mean())
            given, _ = change(model, structure="input", damping=epsilon, **FIXED)
            close(came[f"{name}.weight"], given[f"{name}.weight"])

    def test_it_is_the_step_of_natural_neural_networks(self):
        model, twin = model_of(D, 4, C), model_of(D, 4, C)
        opt = natgrad.KFAC(
            model, nn.CrossEntropyLoss(), lr=0.2, momentum=0.0, damping=0.03, structure="input", statistics_every=1,
            inverses_every=1, decay=0.9,
        )  # fmt: skip
        prong = natgrad.PRONG(twin, lr=0.2, epsilon=0.03, every=1, decay=0.9)
        for _ in range(4):
            step(model, opt)
            prong.zero_grad()
            nn.functional.cross_entropy(twin(X), LABELS).backward()
            prong.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p, q)

    def test_parameters_of_no_such_layer_take_plain_steps(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Linear(4, C)).to(f64)
        came, g = change(model, structure="input", damping=0.1, **FIXED)
        close(came["1.weight"], -0.3 * g["1.weight"])
        close(came["1.bias"], -0.3 * g["1.bias"])


class TestOrthogonalized:
    @pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3), (2, 5, 4)])
    def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_vectors(self, shape):
        V = randn(*shape)
        O = newton_schulz(V)
        U, _, Wh = torch.linalg.svd(V, full_matrices=False)
        inside = U.mT @ O @ Wh.mT
        s = inside.diagonal(dim1=-2, dim2=-1)
        assert ((s > 0.5) & (s < 1.3)).all()
        close(inside - torch.diag_embed(s), torch.zeros_like(inside))

    def test_of_float32_it_is_in_half_the_precision(self):
        V = randn(192, 192)
        torch.testing.assert_close(newton_schulz(V.float()).double(), newton_schulz(V), atol=0.05, rtol=0)

    def test_small_matrices_stay_in_float32_on_a_cpu_however_many_there_are(self):
        V = randn(200, 12, 12)
        torch.testing.assert_close(newton_schulz(V.float()).double(), newton_schulz(V), atol=1e-3, rtol=0)

    def test_a_matrix_of_zeros_stays(self):
        assert torch.equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))

    @pytest.mark.parametrize("centered", [True, False])
    def test_the_step_is_the_orthogonal_factor_of_the_whitened_gradient(self, centered):
        model, options = model_of(D, 4, C), {"structure": "input", "damping": 0.05, "centered": centered}
        plain, g = change(model, **options, **FIXED)
        came, _ = change(model, **options, **FIXED, orthogonalize=True)
        for name, h in inputs(model).items():
            O = 0.2 * max(plain[f"{name}.weight"].shape) ** 0.5 * newton_schulz(plain[f"{name}.weight"] / -0.3)
            close(came[f"{name}.weight"], -0.3 * O)
            adam = g[f"{name}.bias"] / (g[f"{name}.bias"].abs() + 1e-8)
            close(came[f"{name}.bias"], -0.3 * (adam - O @ h.mean(0) if centered else adam))

    @pytest.mark.parametrize("given", ["medium", "high", "highest", None])
    @pytest.mark.parametrize("mean", [0.0, 3.0])
    @pytest.mark.parametrize("centered", [True, False])
    def test_inputs_of_few_directions_are_whitened_in_float32_where_bfloat16_is_fast(
        self, centered, mean, given, monkeypatch
    ):
        """Rounding errors would be enlarged to the size of the rest."""
        monkeypatch.setattr(precision, "_multiplies_in_bfloat16", lambda: True)
        monkeypatch.setattr(precision, "WORTH_CASTING", 1)
        monkeypatch.setattr(orthogonal, "bfloat16_is_fast", lambda device: False)
        few = randn(64, 3) @ randn(3, 12, seed=1) + 0.03 * randn(64, 12, seed=2) + mean
        options = {"structure": "input", "orthogonalize": True, "damping": 1e-4, "lr": 0.1, "momentum": 0.0}
        torch.manual_seed(0)
        model = nn.Linear(12, 8).to(f64)
        changes = []
        for dtype in (f64, torch.float32):
            came = copy.deepcopy(model).to(dtype)
            opt = natgrad.KFAC(came, nn.MSELoss(), centered=centered, matmul_precision=given, **options)
            step(came, opt, few.to(dtype), randn(64, 8, seed=3).to(dtype))
            changes.append((came.weight.detach().double() - model.weight.detach()).flatten())
        assert torch.cosine_similarity(*changes, dim=0) > 0.999

    def test_what_has_no_input_factor_takes_adams_step(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, C)).to(f64)
        options = {"structure": "input", "orthogonalize": True, "lr": 0.01, "momentum": 0.0}
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
        E, second, weight = model[0].weight.detach().clone(), 0.0, 0.0
        for i in range(4):
            step(model, opt, torch.arange(2 * N).add(i).remainder(7).view(N, 2))
            g = model[0].weight.grad
            second, weight = 0.95 * second + 0.05 * g.square(), 0.95 * weight + 0.05
            E -= 0.01 * g / ((second / weight).sqrt() + 1e-8)
            close(model[0].weight.detach(), E)

    def test_a_group_may_be_left_to_adam(self):
        model = model_of(D, 4, C)
        opt = natgrad.KFAC(
            model,
            nn.CrossEntropyLoss(),
            params=[{"params": ["0.weight", "0.bias"]}, {"params": ["2.weight", "2.bias"], "orthogonalize": False}],
            structure="input",
            orthogonalize=True,
            lr=0.01,
            momentum=0.0,
        )
        before = model[2].weight.detach().clone()
        step(model, opt)
        torch.testing.assert_close(
            (model[2].weight.detach() - before).abs(), torch.full_like(before, 0.01), atol=1e-5, rtol=0
        )

    def test_it_needs_the_input_structure(self):
        with pytest.raises(ValueError, match="orthogonalize=True needs structure='input'; got structure='kfac'"):
            natgrad.KFAC(model_of(D, C), nn.CrossEntropyLoss(), orthogonalize=True)


EKFAC = {"structure": "ekfac", "estimator": "exact", "damping": 0.02, **FIXED}


class TestEkfac:
    @pytest.mark.parametrize("centered", [True, False])
    def test_it_starts_as_kfac(self, centered):
        model = model_of(D, 4, C)
        came, _ = change(model, centered=centered, **EKFAC)
        kfac, _ = change(model, centered=centered, **EKFAC | {"structure": "kfac", "damping_style": "exact"})
        for n in came:
            close(came[n], kfac[n])

    @pytest.mark.parametrize("centered", [True, False])
    def test_new_statistics_give_the_second_moments_in_the_bases(self, centered):
        model = model_of(D, 4, C)
        options = EKFAC | {"lr": 0.0, "statistics_every": 1, "inverses_every": 1, "decay": 0.0}
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), centered=centered, **options)
        for _ in range(2):
            step(model, opt)
        F = natgrad.fisher(model, nn.CrossEntropyLoss(), (X, LABELS), structure="ekfac", centered=centered)
        close(opt.curvature().to_dense(), F.to_dense())

    def test_bases_follow_the_factors(self):
        model = model_of(D, 4, C)
        opt = natgrad.KFAC(
            model, nn.CrossEntropyLoss(), **EKFAC, statistics_every=1, inverses_every=1, bases_every=1
        )  # fmt: skip
        for _ in range(30):
            step(model, opt)
        for layer, basis in opt.recipe.preconditioner.running._bases.items():
            m = opt.recipe.preconditioner.running.total.moments[layer]
            inside = basis.U_A.mT @ m.C @ basis.U_A
            rest = inside - inside.diagonal().diag()
            assert rest.norm() < 0.05 * inside.norm()


def test_the_diagonal_divides_by_the_exact_diagonal():
    model = model_of(D, 4, C)
    came, g = change(model, structure="diagonal", estimator="exact", damping=0.02, **FIXED)
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), (X, LABELS), structure="diagonal")
    for n, d in F.diagonal().items():
        close(came[n], -0.3 * g[n] / (d + 0.02))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("options", [{}, {"lr": 0.05, "momentum": 0.9}], ids=["adaptive", "fixed"])
def test_every_structure_learns(structure, centered, options):
    model = model_of(D, 8, C)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), structure=structure, centered=centered, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        losses = [step(model, opt) for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [{"structure": s, **o} for s in STRUCTURES for o in ({}, {"lr": 0.05, "momentum": 0.9})]
    + [{"structure": "input", "orthogonalize": True, "lr": 0.01, "momentum": 0.9}],
    ids=str,
)
def test_each_resumes_bit_for_bit_in_the_middle_of_its_intervals(options):
    options = {**options, "statistics_every": 3, "inverses_every": 5, "adapt_every": 4}
    if options["structure"] == "ekfac":
        options["bases_every"] = 6
    model, twin = model_of(D, 4, C), model_of(D, 4, C, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
        for _ in range(7):
            step(model, opt)
        saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
        for _ in range(9):
            step(model, opt)
        resumed = natgrad.KFAC(twin, nn.CrossEntropyLoss(), **options)
        twin.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for _ in range(9):
            step(twin, resumed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_state_of_another_structure_is_refused():
    model = model_of(D, C)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    step(model, opt)
    other = natgrad.KFAC(model, nn.CrossEntropyLoss(), structure="diagonal")
    with pytest.raises(ValueError, match="the state is of structure='kfac', and this optimizer has 'diagonal'"):
        other.load_state_dict(opt.state_dict())


def test_less_precise_products_change_the_step_size_alone_and_little():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
    sizes = []
    for name in ("highest", "high", "medium", None):
        twin = copy.deepcopy(model)
        opt = natgrad.KFAC(twin, nn.CrossEntropyLoss(), matmul_precision=name)
        before = torch.backends.mkldnn.matmul.fp32_precision
        step(twin, opt, X.float())
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        sizes.append(opt.diagnostics["lr"])
    assert max(sizes) < 1.02 * min(sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_models_in_half_the_precision_have_factors_in_float32(dtype, structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C)).to(dtype)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), structure=structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        losses = [step(model, opt, X.to(dtype)) for _ in range(15)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
    if structure != "identity":
        assert opt.curvature().dtype == torch.float32


@settings(max_examples=30)
@given(d=st.integers(2, 8), rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_a_basis_that_is_turned_stays_where_the_factor_does(d, rank, seed):
    """Also where the factor is singular: its null vectors are no start for the others."""
    factors = randn(min(rank, d), d, seed=seed)
    F = factors.mT @ factors
    before = factor.eigen(F, "F")[1]
    after = turned(F, before, "F")
    assert isinstance(after, torch.Tensor)
    close(after.mT @ after, torch.eye(d, dtype=F.dtype))
    rotated = after.mT @ F @ after
    close(rotated, torch.diag(rotated.diagonal()), 1e-8 * float(F.trace()))
