"""Whose rows belong together is seen: exact blocks and diagonals are autograd's, K-FAC's factors their definition."""

import pytest
import torch
from torch import nn

import natgrad
from mixing import LENGTHS, MIXED, PLACED, SEPARATE, made
from oracles import close, dense_curvature, f64, homogeneous_kron, normalizer, output_hessian

CE = nn.CrossEntropyLoss()
ALL = {**{n: (make,) for n, make in (MIXED | SEPARATE).items()}}
ALL |= {f"{n}, T={t}": (make, t) for n, make in PLACED.items() for t in LENGTHS}
every_network = pytest.mark.parametrize("name", ALL)


def places(model):
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    return dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))


def close_by_block(F, dense, model):
    """Every block of a matrix is that part of the dense one; and together they have all parameters."""
    index = places(model)
    seen = []
    for block in F.layers.values():
        rows = torch.cat([index[n] for n in block.names])
        close(F.to_dense()[rows[:, None], rows], dense[rows[:, None], rows], 1e-10)
        seen += block.names
    assert sorted(seen) == sorted(index)


@every_network
def test_blocks_and_diagonal_are_autograds(name):
    model, x, y = made(*ALL[name])
    dense = dense_curvature(model, CE, [(x, y)])
    close_by_block(natgrad.fisher(model, CE, (x, y), "block"), dense, model)
    F = natgrad.fisher(model, CE, (x, y), "diagonal")
    close(F.to_dense(), dense.diagonal().diag(), 1e-10)


@every_network
def test_kfac_is_its_definition(name):
    """`A = E[x xᵀ]` over the rows of all uses, `B = Σ g gᵀ` over them and over the columns of every output row."""
    model, x, y = made(*ALL[name])
    K = natgrad.fisher(model, CE, (x, y), "kfac")
    factors = factors_by_hand(model, x, y)
    assert factors
    for layer, (A, B) in factors.items():
        block = K.blocks[layer]
        if K.layers[layer].names[0] != f"{layer}.weight" or len(K.layers[layer].names) < 2:
            expected = torch.kron(B, A)
        else:
            expected = homogeneous_kron(A, B)
        close(block.to_dense(), expected, 1e-10)


def factors_by_hand(model, x, y):
    """Of the linear maps that are no projections within attention."""
    calls, hooks = {}, []
    for n, module in model.named_modules():
        if type(module) is nn.Linear:
            keep = lambda m, args, a, n=n: calls.setdefault(n, []).append((args[0].detach(), a))  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    f = model(x)
    for hook in hooks:
        hook.remove()
    size, H, factors = f[0].numel(), output_hessian(CE, f, y), {}
    for n, uses in calls.items():
        bias = model.get_submodule(n).bias is not None
        h = torch.cat([h.flatten(0, -2) for h, _ in uses])
        h = torch.cat([h, h.new_ones(len(h), 1)], 1) if bias else h
        B = 0.0
        for i in range(len(f)):
            e, V = torch.linalg.eigh(H[i * size : (i + 1) * size, i * size : (i + 1) * size])
            for s in (V * e.clamp_min(0).sqrt()).T:
                g = torch.autograd.grad(f[i].flatten(), [a for _, a in uses], s, retain_graph=True, allow_unused=True)
                rows = torch.cat([t.flatten(0, -2) for t in g if t is not None])
                B = B + rows.T @ rows
        factors[n] = h.T @ h / len(h), B / normalizer(CE, f, y)
    return factors


@every_network
def test_ekfac_is_the_best_diagonal_in_its_basis(name):
    model, x, y = made(*ALL[name])
    dense = dense_curvature(model, CE, [(x, y)])
    K, E = (natgrad.fisher(model, CE, (x, y), s, centered=False) for s in ("kfac", "ekfac"))
    index = places(model)
    for block in E.layers.values():
        if block.function not in ("linear", "conv2d"):
            continue
        rows = torch.cat([index[n] for n in block.names])
        G = dense[rows[:, None], rows]
        its, kfac = (M.to_dense()[rows[:, None], rows] for M in (E, K))
        assert (its - G).norm() <= (kfac - G).norm() + 1e-10
        close(its.trace(), G.trace(), 1e-10)
        # It is orthogonal to its own residual, as the nearest point of a linear space is.
        assert abs(((its - G) * its).sum()) <= 1e-9 * G.norm() ** 2 + 1e-20


@pytest.mark.parametrize("name", MIXED)
def test_the_residual_is_that_of_the_true_block(name):
    model, x, y = made(*ALL[name])
    dense, K = dense_curvature(model, CE, [(x, y)]), natgrad.fisher(model, CE, (x, y), "kfac")
    report, index = natgrad.residual(model, CE, (x, y)), places(model)
    for layer, block in K.layers.items():
        rows = torch.cat([index[n] for n in block.names])
        G = dense[rows[:, None], rows]
        if G.norm() > 1e-12:
            close(torch.tensor(report[layer].block_norm, dtype=f64), G.norm(), 1e-8)
            close(torch.tensor(report[layer].norm, dtype=f64), (G - K.to_dense()[rows[:, None], rows]).norm(), 1e-7)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("structure", ["block", "diagonal", "kfac"])
def test_the_empirical_matrix_is_of_every_rows_own_term(name, structure):
    model, x, y = made(*ALL[name])
    rows = []
    for i in range(len(y)):
        gradient = torch.autograd.grad(
            nn.CrossEntropyLoss(reduction="sum")(model(x)[i : i + 1], y[i : i + 1]),
            list(model.parameters()),
            allow_unused=True,
        )
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradient, model.parameters(), strict=True)
                ]
            )
        )
    dense = torch.stack(rows).T @ torch.stack(rows) / len(y)
    F = natgrad.fisher(model, CE, (x, y), structure, estimator="empirical")
    if structure == "block":
        close_by_block(F, dense, model)
    elif structure == "diagonal":
        close(F.to_dense(), dense.diagonal().diag(), 1e-10)
    close(natgrad.fisher(model, CE, (x, y), "dense", estimator="empirical").to_dense(), dense, 1e-10)


@pytest.mark.parametrize("name", ["graph", "logits of a batch", "batch normalization"])
@pytest.mark.parametrize("structure", ["block", "diagonal", "kfac"])
def test_with_labels_drawn_it_is_right_on_average(name, structure):
    model, x, y = made(*ALL[name])
    exact = natgrad.fisher(model, CE, (x, y), structure).to_dense()
    drawn = natgrad.fisher(
        model, CE, (x, y), structure, estimator="mc", samples=1000, generator=torch.Generator().manual_seed(0)
    ).to_dense()
    assert (drawn - exact).norm() < 0.2 * exact.norm()


class TestCheck:
    """How often the passes of a probe are made, and what they leave behind."""

    def count(self, monkeypatch):
        from natgrad.capture import probe

        passes = []
        own = probe.Probe._pass
        monkeypatch.setattr(probe.Probe, "_pass", lambda self, v: passes.append(v) or own(self, v))
        return passes

    def test_once_for_each_shape(self, monkeypatch):
        passes = self.count(monkeypatch)
        model, x, y = made(*ALL["graph"])
        natgrad.fisher(model, CE, [(x, y)] * 5, "block")
        assert len(passes) == 2

    def test_again_after_ten_batches(self, monkeypatch):
        """A gate that opens makes rows depend on one another, in batches of a shape that is known."""
        passes = self.count(monkeypatch)

        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.calls = nn.Linear(3, 4), nn.Linear(4, 3), 0
                self.to(f64)

            def forward(self, x):
                h = self.one(x).tanh()
                return self.two(h + (self.calls >= 9) * h.mean(0))

        def forward(model, batch):
            output = model(batch[0])
            model.calls += 1
            return output, batch[1]

        batches = [(torch.randn(5, 3, dtype=f64), torch.arange(5) % 3) for _ in range(10)]
        model, blocks = Gated(), {}
        for structure in ("dense", "block"):
            model.calls = 0
            blocks[structure] = natgrad.fisher(model, CE, batches, structure, forward=forward)["one"].to_dense()
        close(blocks["block"], blocks["dense"], 1e-10)
        assert len(passes) == 2 + 2

    def test_of_lengths_that_vary_a_few_times(self, monkeypatch):
        passes = self.count(monkeypatch)
        model, _, _ = made(*ALL["positions first, 4"])
        batches = [(torch.randn(5, t, 3, dtype=f64), torch.arange(5) % 3) for t in range(6, 30)]
        natgrad.fisher(model, CE, batches, "diagonal")
        assert len(passes) == 2 * 4 + 2  # four lengths, and the tenth batch

    @pytest.mark.parametrize("first", ["examples", "positions"])
    def test_of_texts_whose_logits_are_flattened(self, first, monkeypatch):
        """Attention takes positions first and flattens them; the logits are flattened in either order."""
        passes = self.count(monkeypatch)
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(5, 4), layer, nn.Linear(4, 3)).to(f64)
        swapped = first == "positions"

        def forward(model, batch):
            x, y = batch
            pair = model(x), y
            logits, labels = (t.transpose(0, 1) for t in pair) if swapped else pair
            return logits.flatten(0, 1), labels.flatten()

        batches = [(torch.randint(5, (3, t)), torch.randint(3, (3, t))) for t in (2, 4, 5, 6, 7, 8, 9)]
        F = natgrad.fisher(model, CE, batches, "diagonal", forward=forward)
        made_of = len(passes)
        dense = natgrad.fisher(model, CE, batches, "dense", forward=forward).to_dense()
        close(torch.cat([v.flatten() for v in F.diagonal().values()]), dense.diagonal(), 1e-10)
        assert made_of <= 9 * 4
        opt = natgrad.KFAC(model, CE, statistics_every=1, lr=0.01, momentum=0.0, damping=1.0)
        passes.clear()
        for x, y in batches[:1] * 5:
            out, target = forward(model, (x, y))
            opt.zero_grad()
            opt.loss(out, target).backward()
            opt.step()
        assert len(passes) <= 9

    def test_other_modes_are_looked_at_again(self, monkeypatch):
        passes = self.count(monkeypatch)
        model, x, y = made(*ALL["batch normalization"])
        opt = natgrad.NaturalGradient(model, CE, damping=1.0, lr=0.1)
        for training in (True, False, True, False):
            model[1].train(training)
            loss = opt.loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert len(passes) == 2 * 2

    def test_torchs_random_numbers_stay_as_they_are(self):
        model, x, y = made(*ALL["graph"])
        state = torch.get_rng_state()
        natgrad.fisher(model, CE, (x, y), "block")
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["edges", "mixup of one pair", "positions first, 6", "siamese", "called twice"])
    def test_in_low_precision_too(self, name, dtype):
        model, x, y = made(*ALL[name])
        exact = natgrad.fisher(model, CE, (x, y), "diagonal").diagonal()
        low = natgrad.fisher(model.to(dtype), CE, (x.to(dtype), y), "diagonal", dtype=torch.float32).diagonal()
        for n, values in exact.items():
            assert (low[n].to(f64) - values).norm() < (0.15 if dtype == torch.bfloat16 else 0.02) * values.norm()

    def test_many_rows(self):
        """More than there are factors to tell them apart by."""
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(f64)
        x, y = torch.randn(700, 3, dtype=f64), torch.arange(700) % 3
        close_by_block(natgrad.fisher(model, CE, (x, y), "block"), dense_curvature(model, CE, [(x, y)]), model)

    def test_more_passes_than_are_taken_name_the_cure(self, monkeypatch):
        monkeypatch.setattr("natgrad.capture.reading.MOST_PASSES", 11)
        model, x, y = made(*ALL["graph"])
        with pytest.raises(ValueError, match=r"see one another.*layer 'one'.*11.*estimator='mc'"):
            natgrad.fisher(model, CE, (x, y), "block")
        natgrad.fisher(model, CE, (x, y), "block", estimator="mc")


class TestOptimizers:
    def step(self, opt, model, x, y):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()

    @pytest.mark.parametrize("name", [*MIXED, "positions first, 6", "siamese", "embedding of arange, T=6"])
    @pytest.mark.parametrize("structure", ["kfac", "diagonal"])
    def test_KFACs_exact_curvature_is_the_matrix(self, name, structure):
        model, x, y = made(*ALL[name])
        expected = natgrad.fisher(model, CE, (x, y), structure).to_dense()
        opt = natgrad.KFAC(model, CE, structure=structure, estimator="exact", statistics_share=1.0)
        self.step(opt, model, x, y)
        close(opt.curvature().to_dense(), expected, 1e-9)
        assert opt.diagnostics["rows_taken_apart"] == []

    @pytest.mark.parametrize("name", ["graph", "batch normalization", "logits of a batch", "flattened"])
    def test_the_natural_gradient_is_that_of_the_dense_matrix(self, name):
        model, x, y = made(*ALL[name])
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        gradient = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
        gradient = torch.cat([g.flatten() for g in gradient])
        F = dense_curvature(model, CE, [(x, y)]) + 0.1 * torch.eye(len(before), dtype=f64)
        for solver in ("dual", "primal"):
            model.load_state_dict(made(*ALL[name])[0].state_dict())
            opt = natgrad.NaturalGradient(model, CE, lr=1.0, damping=0.1, solver=solver)
            self.step(opt, model, x, y)
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            close(before - after, torch.linalg.solve(F, gradient), 1e-8)

    @pytest.mark.parametrize("structure", ["ekfac", "diagonal"])
    def test_rows_that_are_taken_apart_are_named(self, structure):
        model, x, y = made(*ALL["graph"])
        opt = natgrad.KFAC(model, CE, structure=structure)
        self.step(opt, model, x, y)
        assert opt.diagnostics["rows_taken_apart"] == ["one", "two"]

    @pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
    @pytest.mark.parametrize("name", ["edges", "batch normalization", "logits of a batch", "pooled graphs"])
    def test_it_trains(self, name, structure):
        model, x, y = made(*ALL[name])
        opt = natgrad.KFAC(model, CE, structure=structure)
        first = CE(model(x), y).item()
        for _ in range(30):
            self.step(opt, model, x, y)
        assert CE(model(x), y).item() < 0.7 * first
