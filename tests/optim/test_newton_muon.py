"""NewtonMuon's step against its formula, torch's Muon and torch's AdamW; and all that a training loop may do to it."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import natgrad
from natgrad.optim.muon import whitening as whitening_file
from natgrad.optim.preconditioner.orthogonal import newton_schulz
from oracles import close, f64, net, randn

N, D, H, C = 24, 4, 6, 3
X, LABELS = randn(N, D), torch.arange(N) % C
EXACT = {"refresh_every": 1, "decay": 0.0}
"""The second moment of the last batch alone."""


@pytest.fixture(autouse=True)
def all_rows(monkeypatch):
    """Second moments are of all rows of a batch."""
    monkeypatch.setattr(whitening_file, "ROWS", 10**9)


def perceptron(seed=0, dtype=f64):
    torch.manual_seed(seed)
    return net(D, H, H, C).to(dtype)


def backward(model, x=X, y=LABELS, scale=1.0):
    loss = F.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss.detach()


def step(model, opt, x=X, y=LABELS):
    opt.zero_grad()
    loss = backward(model, x, y)
    opt.step()
    return loss.item()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(model, twin):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def second_moment(h):
    return h.mT @ h / len(h)


def whitening(h, ridge):
    return damped_inverse(second_moment(h.double()), ridge)


def damped_inverse(A, ridge):
    A = A / A.diagonal().mean()
    return torch.linalg.inv(A + ridge * A.diagonal().clamp_min(1e-4).sqrt().diag())


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
        for i in range(3):
            x = randn(N, D, seed=i)
            before = weights(model)
            hidden = {"0.weight": x, "2.weight": model[:2](x).detach()}
            step(model, opt, x)
            for n, h in hidden.items():
                g = model.get_parameter(n).grad
                buffers[n] = 0.6 * buffers.get(n, 0.0) + 0.4 * g
                v = 0.6 * buffers[n] + 0.4 * g  # Nesterov's
                d = 0.2 * math.sqrt(H) * newton_schulz(v @ whitening(h, 0.3))
                close(model.get_parameter(n).detach(), (1 - 0.1 * 0.01) * before[n] - 0.1 * d)

    def test_both_sides(self):
        """`orth((B / b̄ + ρ I)^(-1/2) M (A / ā + ρ D^½)⁻¹)`, with `B` the average of `∇ A⁻¹ ∇ᵀ` over the gradients."""
        model = perceptron()
        opt = natgrad.NewtonMuon(
            model, lr=0.1, weight_decay=0.0, momentum=0.6, nesterov=False, ridge=0.3, sides="both", refresh_every=1,
            decay=0.5,
        )  # fmt: skip
        A, B, buffers = {}, {}, {}
        for i in range(4):
            x = randn(N, D, seed=i)
            before = weights(model)
            hidden = {"0.weight": x, "2.weight": model[:2](x).detach()}
            step(model, opt, x)
            for n, h in hidden.items():
                g = model.get_parameter(n).grad
                buffers[n] = 0.6 * buffers.get(n, 0.0) + 0.4 * g
                A[n] = 0.5 * A.get(n, 0.0) + h.mT @ h
                white = damped_inverse(A[n], 0.3)
                B[n] = 0.5 * B.get(n, 0.0) + g @ white @ g.mT / g.square().sum()
                e, Q = torch.linalg.eigh(B[n] / B[n].diagonal().mean())
                root = Q @ torch.diag((e + 0.3) ** -0.5) @ Q.mT
                d = 0.2 * math.sqrt(H) * newton_schulz(root @ buffers[n] @ white)
                close(model.get_parameter(n).detach(), before[n] - 0.1 * d)

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

    def test_all_else_is_adamws_to_the_last_bit_of_its_formula(self):
        model, twin = perceptron(), perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, rest_lr=0.01, weight_decay=0.3, steps={"*": "adamw"})
        adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.3, betas=(0.9, 0.95))
        for i in range(10):
            x = randn(N, D, seed=i)
            step(model, opt, x)
            step(twin, adamw, x)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                close(p.detach(), q.detach(), 1e-12)

    @pytest.mark.parametrize("nesterov", [True, False])
    def test_without_whitening_it_is_torchs_muon(self, nesterov, monkeypatch):
        """But for the iteration, which torch always does in bfloat16."""
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", lambda v, *_: newton_schulz(v))
        model, twin = (nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 12, bias=False)) for _ in "ab")
        twin.load_state_dict(model.state_dict())
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.1, nesterov=nesterov, steps={"*": "orthogonal"})
        muon = torch.optim.Muon(
            twin.parameters(), lr=0.1, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
        )
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


class TestAsTorchsOptimizers:
    def test_schedulers_change_both_rates(self):
        model, twin = perceptron(), perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, rest_lr=0.02)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5**i)
        by_hand = natgrad.NewtonMuon(twin, lr=0.1, rest_lr=0.02)
        for i in range(4):
            by_hand.param_groups[0]["lr"] = 0.1 * 0.5**i
            step(model, opt)
            step(twin, by_hand)
            scheduler.step()
        assert same(model, twin)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.LinearLR(o, 1, 0)],
                [3],
            ),
        ],
    )
    def test_torchs_schedulers(self, schedule):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        scheduler = schedule(opt)
        losses = []
        for _ in range(8):
            losses.append(step(model, opt))
            scheduler.step()
        assert losses[-1] < losses[0]

    def test_groups_have_settings_of_their_own(self):
        model = perceptron()
        groups = [
            {"params": ["0.weight", "0.bias"], "lr": 0.0},
            {"params": ["2.weight"], "weight_decay": 0.0, "momentum": 0.5},
            {"params": lambda n: n.startswith("4."), "lr": 0.1, "rest_lr": 0.05},
        ]
        opt = natgrad.NewtonMuon(model, lr=0.1, params=groups)
        before = weights(model)
        step(model, opt)
        after = weights(model)
        assert all(torch.equal(before[n], after[n]) == n.startswith("0.") for n in ("0.weight", "0.bias", "4.bias"))
        close((before["4.bias"] - after["4.bias"]).abs(), torch.full((C,), 0.05, dtype=f64), 1e-2)
        assert torch.equal(before["2.bias"], after["2.bias"])  # in no group

    def test_what_is_refused(self):
        model = perceptron()
        for options, message in (
            ({"lr": -1.0}, r"lr=-1\.0 is not usable: expected a number >= 0"),
            ({"rest_lr": math.nan}, "rest_lr=nan is not usable"),
            ({"lr": 0.0, "rest_lr": 0.1}, "rest_lr=0.1 is not usable beside lr=0"),
            ({"momentum": 1.0}, r"momentum=1\.0 is not usable: expected a number in \[0, 1\)"),
            ({"betas": (0.9, 1.0)}, r"betas=1\.0 is not usable"),
            ({"sides": "output"}, r"sides='output' is unknown: expected one of 'none' \(.*'input' \(.*'both'"),
            ({"ridge": 0.0}, r"ridge=0\.0 is not usable"),
            ({"refresh_every": 0}, "refresh_every=0 is not usable"),
            ({"decay": 1.0}, r"decay=1\.0 is not usable"),
            ({"average": 1.0}, r"average=1\.0 is not usable"),
            ({"params": ["nose"]}, "params names 'nose', which is not a trainable parameter"),
            ({"params": [{"params": ["0.weight"], "momentun": 0.5}]}, "a group has 'momentun'; expected settings"),
        ):
            with pytest.raises(ValueError, match=message):
                natgrad.NewtonMuon(model, **options)

    def test_a_refused_group_leaves_the_optimizer_as_it_was(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, params=["0.weight"])
        with pytest.raises(ValueError, match="momentum=-1"):
            opt.add_param_group({"params": ["2.weight"], "momentum": -1.0})
        assert len(opt.param_groups) == 1
        step(model, opt)

    def test_accumulation_is_the_step_of_the_whole_batch(self):
        model, twin = perceptron(), perceptron()
        opt, whole = (natgrad.NewtonMuon(m, lr=0.05) for m in (model, twin))
        for i in range(12):
            x = randn(N, D, seed=i)
            opt.zero_grad()
            for part in (slice(0, 8), slice(8, N)):
                F.cross_entropy(model(x[part]), LABELS[part], reduction="sum").div(N).backward()
            opt.step()
            step(twin, whole, x)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                close(p.detach(), q.detach(), 1e-8)

    def test_a_closure(self):
        model, twin = perceptron(), perceptron()
        opt, other = (natgrad.NewtonMuon(m, lr=0.05) for m in (model, twin))

        def closure():
            opt.zero_grad()
            return backward(model)

        assert opt.step(closure).item() == step(twin, other)
        assert same(model, twin)

    def test_clipping_matters_to_adamws_steps_alone(self):
        model, twin = perceptron(), perceptron()
        opts = [natgrad.NewtonMuon(m, lr=0.05, momentum=0.0) for m in (model, twin)]
        for m, opt, clip in ((model, opts[0], 1e9), (twin, opts[1], 1e-3)):
            backward(m)
            nn.utils.clip_grad_norm_(m.parameters(), clip)
            opt.step()
        close(model[2].weight.detach(), twin[2].weight.detach(), 1e-8)

    def test_with_a_grad_scaler_the_steps_are_those_without(self):
        model, twin = perceptron(), perceptron()
        opt, bare = (natgrad.NewtonMuon(m, lr=0.05) for m in (model, twin))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for _ in range(8):
            opt.zero_grad()
            scaler.scale(F.cross_entropy(model(X), LABELS)).backward()
            scaler.step(opt)
            scaler.update()
            step(twin, bare)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-6)

    def test_a_step_that_a_grad_scaler_skips(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        losses = []
        for i in range(12):
            opt.zero_grad()
            loss = F.cross_entropy(model(X), LABELS)
            losses.append(loss.item())
            scaler.scale(loss).backward()
            before = weights(model)
            if i == 3:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(opt)
            scaler.update()
            assert all(torch.equal(before[n], p) for n, p in model.named_parameters()) == (i == 3)
        assert losses[-1] < losses[0]
        assert opt.diagnostics["step"] == 10

    def test_it_cannot_be_copied(self):
        with pytest.raises(TypeError, match="NewtonMuon optimizer cannot be copied or pickled"):
            copy.deepcopy(natgrad.NewtonMuon(perceptron()))

    def test_cautious_decay_leaves_what_the_step_moves_away_from_zero(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.1, weight_decay=0.5, cautious=True)
        twin = perceptron()
        plain = natgrad.NewtonMuon(twin, lr=0.1, weight_decay=0.0)
        before = weights(model)
        step(model, opt)
        step(twin, plain)
        for n in ("0.weight", "4.weight"):
            moved = model.get_parameter(n).detach() - twin.get_parameter(n).detach()
            rate = 0.1 if n == "0.weight" else 0.1 * opt.param_groups[0]["rest"]
            toward = (twin.get_parameter(n).detach() - before[n]) * before[n] < 0
            close(moved, torch.where(toward, -rate * 0.5 * before[n], 0.0))


class TestResuming:
    @pytest.mark.parametrize("dtype", [torch.float32, f64, torch.bfloat16])
    @pytest.mark.parametrize("at", [1, 5, 13])
    def test_bit_for_bit_through_a_file(self, dtype, at):
        options = {"lr": 0.05, "average": 0.9, "refresh_every": 4, "sides": "both"}
        model, twin = perceptron(dtype=dtype), perceptron(seed=1, dtype=dtype)
        opt, resumed = (natgrad.NewtonMuon(m, **options) for m in (model, twin))
        for i in range(at):
            step(model, opt, randn(N, D, seed=i).to(dtype))
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
        file.seek(0)
        values, state = torch.load(file, weights_only=True)
        twin.load_state_dict(values)
        resumed.load_state_dict(state)
        assert resumed.routing() == opt.routing()
        for i in range(at, at + 12):
            step(model, opt, randn(N, D, seed=i).to(dtype))
            step(twin, resumed, randn(N, D, seed=i).to(dtype))
            assert same(model, twin), i
        with opt.averaged(), resumed.averaged():
            assert same(model, twin)

    def test_a_state_before_the_first_step(self):
        model, twin = perceptron(), perceptron()
        opt, resumed = natgrad.NewtonMuon(model), natgrad.NewtonMuon(twin)
        resumed.load_state_dict(opt.state_dict())
        step(model, opt)
        step(twin, resumed)
        assert same(model, twin)

    def test_nothing_is_changed_where_a_state_is_refused(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        for _ in range(3):
            step(model, opt)
        good = opt.state_dict()

        def wrong(change):
            state = copy.deepcopy(good)
            change(state)
            return state

        wide = natgrad.NewtonMuon(other := net(D, H + 1, H, C), lr=0.05)
        step(other, wide)
        for state, message in (
            (torch.optim.AdamW(model.parameters()).state_dict(), "no 'newton_muon'"),
            (wrong(lambda s: s["newton_muon"].pop("moments")), "has no 'moments'"),
            (wrong(lambda s: s["param_groups"][0]["params"].pop()), r"groups of \[5\] parameters"),
            (wrong(lambda s: s["newton_muon"]["routes"].update(x={"step": "adamw", "why": ""})), "'x'"),
            (wide.state_dict(), r"'momentum_buffer' of '0\.weight' has shape \(7, 4\)"),
            (natgrad.KFAC(model, nn.CrossEntropyLoss()).state_dict(), "no 'newton_muon'"),
        ):
            before = copy.deepcopy(opt.state_dict())
            with pytest.raises(ValueError, match=message):
                opt.load_state_dict(state)
            after = opt.state_dict()
            assert str(before) == str(after)

    def test_rates_that_a_scheduler_has_set_are_resumed(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, rest_lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        step(model, opt)
        scheduler.step()
        other = natgrad.NewtonMuon(perceptron(), lr=1.0)
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0]["lr"] == 0.025
        assert other.param_groups[0]["rest"] == pytest.approx(0.4)


class Branches(nn.Module):
    """One of two hidden layers at a time."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, C)
        self.which = "a"

    def forward(self, x):
        return self.head(getattr(self, self.which)(self.first(x).tanh()).tanh())


class TestWhatHappensInTraining:
    def test_a_layer_that_is_not_used_stays_and_is_whitened_once_it_is(self):
        model = Branches().to(f64)
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=2)
        b = model.b.weight.detach().clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model.b.weight, b)
        assert "b.weight" not in {unit.weight for unit in opt._matrices.inputs.moments}
        model.which = "b"
        for _ in range(4):
            step(model, opt)
        assert opt.routing()["b.weight"].step == "whitened"
        assert "b.weight" in {unit.weight for unit in opt._matrices.inputs.moments}
        assert not torch.equal(model.b.weight, b)

    def test_frozen_layers_stay_and_may_be_trained_later(self):
        model = perceptron()
        model[0].requires_grad_(False)
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=2)
        before = model[0].weight.detach().clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model[0].weight, before)
        model[0].requires_grad_(True)
        for _ in range(3):
            step(model, opt)
        assert not torch.equal(model[0].weight, before)
        assert opt.routing()["0.weight"].step == "whitened"
        model[2].requires_grad_(False)
        opt.zero_grad()
        frozen = model[2].weight.detach().clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model[2].weight, frozen)

    def test_a_group_is_added(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, params=lambda n: not n.startswith("0."))
        for _ in range(3):
            step(model, opt)
        opt.add_param_group({"params": ["0.weight", "0.bias"], "lr": 0.01})
        before = model[0].weight.detach().clone()
        step(model, opt)
        assert opt.routing()["0.weight"].step == "whitened"
        assert not torch.equal(model[0].weight, before)

    def test_forwards_in_evaluation_or_without_gradients_do_not_count(self):
        model, twin = perceptron(), perceptron()
        opt, other = (natgrad.NewtonMuon(m, lr=0.05, refresh_every=1) for m in (model, twin))
        for i in range(5):
            opt.zero_grad()
            loss = F.cross_entropy(model(X), LABELS)
            model.eval()
            model(1e6 * randn(N, D, seed=i))
            model.train()
            with torch.no_grad():
                model(1e6 * X)
            loss.backward()
            opt.step()
            step(twin, other)
        assert same(model, twin)

    def test_a_gradient_that_is_not_finite_changes_nothing_and_warns(self):
        model = nn.Sequential(nn.Linear(D, H, dtype=f64), nn.BatchNorm1d(H, dtype=f64), nn.Linear(H, C, dtype=f64))
        opt = natgrad.NewtonMuon(model, lr=0.05)
        step(model, opt)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        x = X.clone()
        x[0, 0] = math.nan
        with pytest.warns(RuntimeWarning, match="NewtonMuon rejected step 1: the gradient is not finite"):
            step(model, opt, x)
        assert str(before[1]) == str(opt.state_dict()["state"])
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())
        assert not opt.diagnostics["accepted"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                assert math.isfinite(step(model, opt))

    def test_inputs_that_are_not_finite_leave_the_averages_as_they_are(self):
        class Guarded(nn.Module):
            """Its gradient is finite where its input is not."""

            def __init__(self):
                super().__init__()
                self.hidden, self.head = nn.Linear(D, H, dtype=f64), nn.Linear(H, C, dtype=f64)
                self.gate = False

            def forward(self, x):
                out = self.head(self.hidden(x).tanh())
                if self.gate:
                    spoiled = self.hidden(torch.full_like(x, math.inf))
                    out = out + torch.zeros_like(out).where(torch.tensor(True), spoiled[:, :C])
                return out

        model = Guarded()
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=1)
        step(model, opt)
        A = opt._matrices.inputs.moments.copy()
        model.gate = True
        opt.zero_grad()
        backward(model)
        for p in model.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        with pytest.warns(RuntimeWarning, match=r"the inputs of 'hidden\.weight' were not finite at step 1"):
            opt.step()
        assert all(opt._matrices.inputs.moments[unit] is m for unit, m in A.items())
        model.gate = False
        for _ in range(3):
            assert math.isfinite(step(model, opt))

    def test_inputs_that_are_all_zero(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        for _ in range(3):
            step(model, opt, torch.zeros_like(X))
        assert all(torch.isfinite(p).all() for p in model.parameters())

    def test_a_forward_that_raises(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        with pytest.raises(RuntimeError):
            model(X[:, 1:])
        twin = perceptron()
        other = natgrad.NewtonMuon(twin, lr=0.05)
        for _ in range(3):
            assert step(model, opt) == step(twin, other)

    def test_an_empty_batch(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=1)
        step(model, opt)
        before = weights(model)
        opt.zero_grad()
        F.cross_entropy(model(X[:0]), LABELS[:0], reduction="sum").backward()
        opt.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert before.keys() == weights(model).keys()

    def test_a_step_without_gradients(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05)
        step(model, opt)
        before = weights(model)
        opt.zero_grad()
        opt.step()
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

    def test_without_a_forward_it_says_what_is_missing(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=r"step\(\) came before any forward of the model in training mode"):
            opt.step()

    def test_sparse_gradients_are_refused_by_name(self):
        model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        opt = natgrad.NewtonMuon(model)
        model(torch.arange(5)).sum().backward()
        with pytest.raises(ValueError, match=r"the gradient of '0\.weight' is sparse"):
            opt.step()

    def test_another_parameter_in_the_models_place(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, refresh_every=1)
        step(model, opt)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        with pytest.raises(RuntimeError, match=r"the model's '0\.weight' is another tensor"):
            step(model, opt)

    def test_a_copy_of_the_model_takes_no_part(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, refresh_every=1)
        step(model, opt)
        twin = copy.deepcopy(model)
        opt.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        twin(1e6 * X)
        loss.backward()
        opt.step()
        A = next(m.A for unit, m in opt._matrices.inputs.moments.items() if unit.weight == "0.weight")
        close(A, second_moment(X))

    def test_averages(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, lr=0.05, average=0.5)
        average = model[0].weight.detach().clone()
        for t in range(1, 15):
            step(model, opt)
            average = torch.lerp(average, model[0].weight.detach(), max(0.5, 10 / (9 + t)))
        last = model[0].weight.detach().clone()
        with opt.averaged():
            close(model[0].weight.detach(), average)
        assert torch.equal(model[0].weight, last)
        with (
            pytest.raises(RuntimeError, match=r"NewtonMuon\(..., average=0.98\)"),
            natgrad.NewtonMuon(model).averaged(),
        ):
            pass


class TestPrecision:
    def test_half_precision_parameters_have_their_averages_in_float32(self):
        model = perceptron(dtype=torch.bfloat16)
        opt = natgrad.NewtonMuon(model, lr=0.05)
        losses = [step(model, opt, X.bfloat16()) for _ in range(100)]
        assert losses[-1] < 0.7 * losses[0]
        assert {t.dtype for its in opt.state.values() for t in its.values() if isinstance(t, torch.Tensor)} == {
            torch.float32
        }
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())

    def test_under_autocast(self):
        model = perceptron(dtype=torch.float32)
        opt = natgrad.NewtonMuon(model, lr=0.05)
        losses = []
        for _ in range(100):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(X.float()), LABELS)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert opt.routing()["2.weight"].step == "whitened"


class TestCompiled:
    """With what `torch.compile` returns, with the model that it was given, and with one compiled in place."""

    @pytest.mark.parametrize("how", ["wrapped", "inner", "in place"])
    def test_the_steps_are_those_of_the_plain_model(self, how):
        torch.compiler.reset()
        model, twin = perceptron(), perceptron()
        called = model
        if how == "in place":
            model.compile(backend="eager")
        else:
            called = torch.compile(model, backend="eager")
        opt = natgrad.NewtonMuon(called if how == "wrapped" else model, lr=0.05, refresh_every=3)
        other = natgrad.NewtonMuon(twin, lr=0.05, refresh_every=3)
        for i in range(8):
            x = randn(N, D, seed=i)
            step(called, opt, x)
            step(twin, other, x)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                close(p.detach(), q.detach(), 1e-9)
        steps = sorted(route.step for route in opt.routing().values())
        assert steps == ["adamw"] * 4 + ["whitened"] * 2
