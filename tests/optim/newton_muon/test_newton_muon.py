"""NewtonMuon's step against its formula, torch's Muon and torch's AdamW."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import natgrad
from muon_steps import (
    EXACT,
    C,
    D,
    H,
    N,
    X,
    backward,
    damped_inverse,
    hidden_steps,
    perceptron,
    same,
    second_moment,
    stay_alike,
    step,
    weights,
    whitening,
)
from natgrad.optim.muon import whitening as whitening_file
from natgrad.optim.muon.moments import InputMoments
from natgrad.optim.muon.output import OutputSide
from natgrad.optim.muon.whitening import InputSide
from natgrad.optim.preconditioner.orthogonal import newton_schulz
from oracles import close, f64, randn


class TestRidge:
    def test_it_follows_the_scale_of_each_input(self):
        """Of independent inputs, the small ones are whitened as the large ones: a ridge in units of the mean eigenvalue
        alone would leave them as they are."""
        scales = torch.tensor([1.0, 1 / 30, 1 / 100], dtype=f64)
        (P,) = whitening_file.damped_inverses([scales.square().diag()], 0.2)
        columns = P.diagonal() * scales  # of gradients, which are as large as their inputs
        assert columns.max() / columns.min() < 10
        close(whitening_file.damped_inverses([scales.square()], 0.2)[0], P.diagonal())

    def test_inputs_that_are_never_active(self):
        A = second_moment(randn(N, D)).float()
        A[0] = A[:, 0] = 0
        (P,) = whitening_file.damped_inverses([A], 0.2)
        assert torch.isfinite(P).all()
        assert torch.linalg.eigvalsh(P).min() > 0

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_the_scale_of_all_inputs_does_not_matter(self, scale):
        A = second_moment(randn(N, D))
        close(whitening_file.damped_inverses([scale * A], 0.2)[0], whitening_file.damped_inverses([A], 0.2)[0])


class TestFormula:
    def test_hidden_matrices(self):
        """`W ← (1 − α η) W − α 0.2 √max(d_out, d_in) orth(∇ (A / ā + ρ D^½)⁻¹)`, with momentum over two steps."""
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.01, momentum=0.6, ridge=0.3, **EXACT)
        buffers = {}
        for n, h, g, before in hidden_steps(model, opt, 3):
            buffers[n] = 0.6 * buffers.get(n, 0.0) + 0.4 * g
            v = 0.6 * buffers[n] + 0.4 * g  # Nesterov's
            d = 0.2 * math.sqrt(H) * newton_schulz(v @ whitening(h, 0.3))
            close(model.get_parameter(n).detach(), (1 - 0.1 * 0.01) * before - 0.1 * d)

    def test_both_sides(self):
        """`orth((B / b̄ + ρ I)⁻¹ M (A / ā + ρ D^½)⁻¹)`, with `B` the average of `∇ A⁻¹ ∇ᵀ` over the gradients."""
        model = perceptron()
        opt = natgrad.NewtonMuon(
            model, lr=0.1, weight_decay=0.0, momentum=0.6, nesterov=False, ridge=0.3, sides="both", refresh_every=1,
            decay=0.5,
        )  # fmt: skip
        A, B, buffers = {}, {}, {}
        for n, h, g, before in hidden_steps(model, opt, 4):
            buffers[n] = 0.6 * buffers.get(n, 0.0) + 0.4 * g
            A[n] = 0.5 * A.get(n, 0.0) + h.mT @ h
            white = damped_inverse(A[n], 0.3)
            B[n] = 0.5 * B.get(n, 0.0) + g @ white @ g.mT / g.square().sum()
            inverse = torch.linalg.inv(B[n] / B[n].diagonal().mean() + 0.3 * torch.eye(len(g), dtype=f64))
            d = 0.2 * math.sqrt(H) * newton_schulz(inverse @ buffers[n] @ white)
            close(model.get_parameter(n).detach(), before - 0.1 * d)

    def test_of_many_rows_the_output_side_is_a_diagonal(self):
        model, twin = perceptron(), perceptron()
        opts = [natgrad.NewtonMuon(m, sides="both", max_dim=d, **EXACT) for m, d in ((model, 5), (twin, 99))]
        for m, opt in zip((model, twin), opts, strict=True):
            step(m, opt)
        assert [s.ndim for s in opts[0]._matrices.outputs.sums.values()] == [1, 1]
        for unit, diagonal in opts[0]._matrices.outputs.sums.items():
            if unit.weight == "0.weight":  # whose input side is the same, of fewer columns
                close(diagonal, opts[1]._matrices.outputs.sums[unit].diagonal())
        assert not same(model, twin)

    @given(seed=st.integers(0, 1000), gradients=st.integers(1, 4))
    def test_the_output_side_knows_no_basis(self, seed, gradients):
        """Rotated gradients are whitened to the rotated result, on whatever basis of the outputs they are given."""
        U = torch.linalg.qr(randn(H, H, seed=seed)).Q
        sides, unit = [OutputSide(0.2, 0.8, 99) for _ in range(2)], object()
        inputs = InputSide(0.2, 0.8)
        for i in range(gradients):
            G = randn(H, D, seed=seed + 1 + i)
            sides[0].take_in({unit: G}, inputs)
            sides[1].take_in({unit: U @ G}, inputs)
        close(sides[1].whitened(unit, U @ G), U @ sides[0].whitened(unit, G))

    def test_all_else_is_adamws_to_the_last_bit_of_its_formula(self):
        model, twin = perceptron(), perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, rest_lr=0.01, weight_decay=0.3, steps={"*": "adamw"})
        adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.3, betas=(0.9, 0.95))
        stay_alike(model, opt, twin, adamw, 10, 1e-12)

    def test_all_else_may_have_a_weight_decay_of_its_own(self):
        model, twin = perceptron(), perceptron()
        opt = natgrad.NewtonMuon(
            model, lr=0.1, rest_lr=0.01, weight_decay=0.3, rest_weight_decay=0.0, steps={"*": "adamw"}
        )
        stay_alike(model, opt, twin, torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.9, 0.95)), 10, 1e-12)

    def test_hidden_matrices_keep_theirs(self):
        model, twin = perceptron(), perceptron()
        own = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.3, rest_weight_decay=0.0)
        none = natgrad.NewtonMuon(twin, lr=0.1, weight_decay=0.0)
        before = weights(model)
        for m, o in ((model, own), (twin, none)):
            step(m, o)
        for n, w in weights(model).items():
            shrunk = own.routing()[n].step == "whitened"
            close(w, weights(twin)[n] - (0.1 * 0.3 * before[n] if shrunk else 0.0), 1e-12)

    @pytest.mark.parametrize("nesterov", [True, False])
    def test_without_whitening_it_is_torchs_muon(self, nesterov, monkeypatch):
        """But for the iteration, which torch always does in bfloat16."""
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda v, *_: newton_schulz(v))
        model, twin = (nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 12, bias=False)) for _ in "ab")
        twin.load_state_dict(model.state_dict())
        alike = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
        opt = natgrad.NewtonMuon(model, steps={"*": "orthogonal"}, **alike)
        muon = torch.optim.Muon(twin.parameters(), adjust_lr_fn="match_rms_adamw", **alike)
        for _ in range(10):
            x, y = torch.randn(99, 8), torch.randn(99, 12)
            for m, o in ((model, opt), (twin, muon)):
                o.zero_grad()
                F.mse_loss(m(x), y).backward()
                o.step()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, atol=1e-3, rtol=0)

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Conv2d(3, 5, 3, stride=2, padding=1), (6, 3, 7, 7)),
            (nn.Conv2d(4, 6, 3, groups=2), (6, 4, 6, 6)),
            (nn.ConvTranspose2d(3, 5, 3, stride=2), (6, 3, 4, 4)),
            (nn.Conv1d(3, 5, 4), (6, 3, 9)),
        ],
        ids=["strided", "groups", "transposed", "1d"],
    )
    def test_kernels_are_whitened_as_matrices_over_patches(self, layer, shape):
        """Against the layer as a matrix that maps patches, read off its own action on a basis of kernels."""
        layer = layer.to(f64)
        model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2, dtype=f64))
        x = randn(*shape)
        y = torch.arange(len(x)) % 2
        model(x)
        before = layer.weight.detach().clone()
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.0, momentum=0.0, ridge=0.3, **EXACT)
        step(model, opt, x, y)
        moved = (before - layer.weight.detach()) / 0.1
        units = [(slice(0, layer.out_channels), 1)]
        if layer.groups == 2:
            units = [(slice(0, 3), 0), (slice(3, 6), 1)]
        for rows, group in units:
            as_matrix, patches = unfolded(layer, x, group)
            g = as_matrix(layer.weight.grad)[rows]
            d = newton_schulz(g @ whitening(patches, 0.3)) * 0.2 * math.sqrt(max(g.shape))
            close(as_matrix(moved)[rows], d, 1e-8)

    def test_the_layout_of_a_weight_does_not_matter(self):
        """`x @ W` with `W` of shape (d_in, d_out), as Hugging Face's Conv1D, moves as `x @ W.T`."""

        class Conv1D(nn.Module):
            def __init__(self, weight, bias):
                super().__init__()
                self.weight, self.bias = nn.Parameter(weight.detach().T.clone()), nn.Parameter(bias.detach().clone())

            def forward(self, x):
                return torch.addmm(self.bias, x, self.weight)

        model = perceptron()
        twin = copy.deepcopy(model)
        twin[2] = Conv1D(twin[2].weight, twin[2].bias)
        opts = [natgrad.NewtonMuon(m, lr=0.1) for m in (model, twin)]
        for i in range(5):
            for m, opt in zip((model, twin), opts, strict=True):
                step(m, opt, randn(N, D, seed=i))
        close(twin[2].weight.detach().T, model[2].weight.detach(), 1e-10)

    def test_rows_that_are_used_apart_are_matrices_of_their_own(self):
        class Packed(nn.Module):
            def __init__(self, packed):
                super().__init__()
                self.weight = nn.Parameter(packed)
                self.head = nn.Linear(H, C, dtype=f64)
                nn.init.ones_(self.head.weight)

            def forward(self, x):
                a, b = self.weight.chunk(2)
                return self.head(F.linear(x[:, :D], a).tanh() + F.linear(x[:, D:], b).tanh())

        W = randn(2 * H, D, seed=3)
        x = torch.cat([X, 3 * randn(N, D, seed=1)], 1)
        model = Packed(W.clone())
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.0, momentum=0.0, ridge=0.3, **EXACT)
        step(model, opt, x)
        g = model.weight.grad.chunk(2)
        d = [newton_schulz(g[i] @ whitening(x[:, i * D : (i + 1) * D], 0.3)) for i in (0, 1)]
        close((W - model.weight.detach()) / 0.1, 0.2 * math.sqrt(H) * torch.cat(d))

    def test_averages_of_the_second_moments_weigh_by_their_rows(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.0, refresh_every=1, decay=0.5)
        batches = [randn(n, D, seed=n) for n in (12, 24, 8)]
        for x in batches:
            step(model, opt, x, torch.arange(len(x)) % C)
        shares = [0.5**age * len(x) for age, x in zip((2, 1, 0), batches, strict=True)]
        expected = sum(s * second_moment(x) for s, x in zip(shares, batches, strict=True)) / sum(shares)
        close(next(m.A for unit, m in opt._matrices.inputs.moments.items() if unit.weight == "0.weight"), expected)

    def test_inputs_that_several_layers_share_are_summed_and_inverted_once(self):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

            def forward(self, x):
                return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

        model = nn.Sequential(Attention(), nn.Linear(D, C))
        opt = natgrad.NewtonMuon(model, lr=0.01)
        for _ in range(3):
            opt.zero_grad()
            model(torch.randn(5, 7, D)).square().sum().backward()
            opt.step()
        held = {unit.weight: m for unit, m in opt._matrices.inputs.moments.items()}
        assert held["0.q.weight"] is held["0.k.weight"] is held["0.v.weight"]
        assert held["0.q.weight"] is not held["0.out.weight"]

    @pytest.mark.parametrize(
        ("settings", "used"),
        [
            ({"sides": "none"}, [set()]),
            ({"sides": "none", "steps": {"2.weight": "whitened"}}, [{"2.weight"}] * 3),
            ({"sides": "input"}, [{"0.weight", "2.weight", "4.weight"}] + [{"0.weight", "2.weight"}] * 2),
            ({"sides": "input", "steps": {"*.weight": "orthogonal"}}, [set()]),
        ],
    )
    def test_only_the_inputs_of_whitened_matrices_are_summed(self, settings, used, monkeypatch):
        """Those that may be whitened, as long as it is not known which are. If none are, no more forwards are read."""
        model, seen = perceptron(), []

        def of(moments, uses):
            seen.append({use.weight for use in uses})
            return whole(moments, uses)

        whole = InputMoments.of
        monkeypatch.setattr(InputMoments, "of", of)
        opt = natgrad.NewtonMuon(model, refresh_every=1, **settings)
        for _ in range(3):
            step(model, opt)
        assert seen == used

    @given(seed=st.integers(0, 1000), tokens=st.integers(3, 40), sides=st.sampled_from(["input", "both"]))
    def test_inputs_in_another_order_and_of_other_signs_give_the_same_step(self, seed, tokens, sides):
        generator = torch.Generator().manual_seed(seed)
        signs = 1.0 - 2.0 * torch.randint(2, (D, 1), generator=generator)
        T = (signs * torch.eye(D)[torch.randperm(D, generator=generator)]).to(f64)
        x = randn(tokens, D, seed=seed + 1)
        y = torch.arange(tokens) % C
        model = perceptron(seed)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin[0].weight.copy_(model[0].weight @ T.T)
        opts = [natgrad.NewtonMuon(m, lr=0.05, sides=sides) for m in (model, twin)]
        for _ in range(3):
            step(model, opts[0], x, y)
            step(twin, opts[1], x @ T.T, y)
        close(twin[0].weight.detach(), model[0].weight.detach() @ T.T, 1e-7)

    def test_the_scale_of_the_loss_and_of_the_inputs_does_not_matter(self):
        model, twin = perceptron(), perceptron()
        with torch.no_grad():
            twin[0].weight /= 100.0
        opts = [natgrad.NewtonMuon(m, lr=0.05, weight_decay=0.0) for m in (model, twin)]
        before = model[0].weight.detach().clone()
        step(model, opts[0])
        opts[1].zero_grad()
        backward(twin, 100 * X, scale=1e-3)
        opts[1].step()
        close(twin[0].weight.detach() - before / 100, model[0].weight.detach() - before, 1e-8)

    def test_tiny_gradients_are_not_lost(self):
        model, twin = perceptron(dtype=torch.float32), perceptron(dtype=torch.float32)
        opts = [natgrad.NewtonMuon(m, lr=0.05, steps={"*.bias": "adamw"}) for m in (model, twin)]
        for m, opt, scale in ((model, opts[0], 1.0), (twin, opts[1], 1e-25)):
            backward(m, X.float(), scale=scale)
            opt.step()
        torch.testing.assert_close(model[2].weight, twin[2].weight, atol=2e-3, rtol=0)


def unfolded(layer, x, group):
    """How a kernel is a matrix over patches, and the patches of a group's inputs."""
    k = layer.kernel_size
    if isinstance(layer, nn.ConvTranspose2d):
        stuffed = x.new_zeros(*x.shape[:2], *(2 * (s - 1) + 1 for s in x.shape[2:]))
        stuffed[..., ::2, ::2] = x
        patches = F.unfold(F.pad(stuffed, (k[1] - 1, k[1] - 1, k[0] - 1, k[0] - 1)), k)
        return lambda t: t.flip(2, 3).transpose(0, 1).flatten(1), patches.mT.flatten(0, 1)
    if isinstance(layer, nn.Conv1d):
        return lambda t: t.flatten(1), x.unfold(2, k[0], 1).transpose(1, 2).flatten(2).flatten(0, 1)
    width = layer.in_channels // layer.groups
    first = group * width if layer.groups > 1 else 0
    patches = F.unfold(x[:, first : first + width], k, padding=layer.padding, stride=layer.stride)
    return lambda t: t.flatten(1), patches.mT.flatten(0, 1)
