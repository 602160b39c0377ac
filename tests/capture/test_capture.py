"""What is recorded of a forward: A ⊗ B from inputs and gradients captured by hand; nothing is left behind."""

import copy
import gc
import io
import pickle
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.overrides import _get_current_function_mode, _len_torch_function_stack

import natgrad
import natgrad.optim.tracking.watch as watch_module
from natgrad.capture.recorder import Recorder
from natgrad.curvature.products import tangent
from oracles import Power, close, f64, homogeneous_kron, net, normalizer, output_hessian, randn

N, T, D, C = 5, 3, 4, 3
LABELS = torch.tensor([0, 2, 1, 1, 0])


def linear(d_in, d_out, bias=True):
    return nn.Linear(d_in, d_out, bias=bias, dtype=f64)


def parameter(*shape, seed=0):
    return nn.Parameter(randn(*shape, seed=seed) / 2)


class Traced(nn.Module):
    """A network whose `run` returns its output and, for each layer, `(weight, bias, transposed, [(h, a), ...])`."""

    def forward(self, x):
        return self.run(x)[0]


class Modules(Traced):
    def __init__(self, bias=True):
        super().__init__()
        self.one, self.two = linear(D, 6, bias), linear(6, C, bias)

    def run(self, x):
        a = self.one(x)
        h = a.tanh()
        f = self.two(h)
        names = [(n + ".weight", n + ".bias" if self.one.bias is not None else None) for n in ("one", "two")]
        return f, [(*names[0], False, [(x, a)]), (*names[1], False, [(h, f)])]


class Functional(Traced):
    """Two layers of any function of `(h, W, b)`."""

    def __init__(self, affine, transposed=False, bias=True):
        super().__init__()
        self.affine, self.transposed = affine, transposed
        for name, d_in, d_out in (("1", D, 6), ("2", 6, C)):
            self.register_parameter("W" + name, parameter(*((d_in, d_out) if transposed else (d_out, d_in)), seed=d_in))
            self.register_parameter("b" + name, parameter(d_out, seed=d_in + 1) if bias else None)

    def run(self, x):
        a = self.affine(x, self.W1, self.b1)
        h = a.tanh()
        f = self.affine(h, self.W2, self.b2)
        biases = ("b1", "b2") if self.b1 is not None else (None, None)
        return f, [("W1", biases[0], self.transposed, [(x, a)]), ("W2", biases[1], self.transposed, [(h, f)])]


class CalledTwice(Traced):
    def __init__(self):
        super().__init__()
        self.loop, self.last = linear(D, D), linear(D, C)

    def run(self, x):
        a = self.loop(x)
        h = a.tanh()
        a2 = self.loop(h)
        h2 = a2.tanh()
        f = self.last(h2)
        return f, [
            ("loop.weight", "loop.bias", False, [(x, a), (h, a2)]),
            ("last.weight", "last.bias", False, [(h2, f)]),
        ]


class Tied(Traced):
    """One weight in two modules, each with its own bias: three blocks."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = linear(D, D), linear(D, D), linear(D, C)
        self.two.weight = self.one.weight

    def run(self, x):
        a = self.one(x)
        h = a.tanh()
        a2 = self.two(h)
        h2 = a2.tanh()
        f = self.last(h2)
        return f, [
            ("one.weight", None, False, [(x, a), (h, a2)]),
            (None, "one.bias", False, [(x, a)]),
            (None, "two.bias", False, [(h, a2)]),
            ("last.weight", "last.bias", False, [(h2, f)]),
        ]


class TiedWithBias(Traced):
    def __init__(self):
        super().__init__()
        self.one, self.two = linear(D, D), linear(D, D)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def run(self, x):
        a = self.one(x)
        h = a.tanh()
        f = self.two(h)
        return f, [("one.weight", "one.bias", False, [(x, a), (h, f)])]


class Positions(Modules):
    """Inputs (N, T, d) through both layers, then the mean over positions."""

    def run(self, x):
        f, layers = super().run(x)
        return f.mean(1), layers


class OutputPositions(Modules):
    """One label for each position: outputs (N, C, T)."""

    def run(self, x):
        f, layers = super().run(x)
        return f.mT, layers


class InnerPositions(Traced):
    """Only the first layer is shared over positions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = linear(D, 6), linear(6, C)

    def run(self, x):
        a = self.one(x)
        h = a.tanh().sum(1)
        f = self.two(h)
        return f, [("one.weight", "one.bias", False, [(x, a)]), ("two.weight", "two.bias", False, [(h, f)])]


def product_then_sum(h, W, b):
    a = h @ W.T
    return a if b is None else a + b


def flat_and_sequences():
    """Inputs and targets by the form of the model's data."""
    x, sequences = randn(N, D) + 1, randn(N, T, D) + 1
    return {
        "flat": (x, LABELS),
        "pooled": (sequences, LABELS),
        "maps": (sequences, (LABELS[:, None] + torch.arange(T)) % C),
    }


MODELS = {
    "nn.Linear": (Modules, "flat"),
    "nn.Linear without bias": (lambda: Modules(bias=False), "flat"),
    "F.linear": (lambda: Functional(F.linear), "flat"),
    "F.linear without bias": (lambda: Functional(F.linear, bias=False), "flat"),
    "torch.addmm": (lambda: Functional(lambda h, W, b: torch.addmm(b, h, W), transposed=True), "flat"),
    "torch.addmm of W.t()": (lambda: Functional(lambda h, W, b: torch.addmm(b, h, W.t())), "flat"),
    "h @ W.T + b": (lambda: Functional(product_then_sum), "flat"),
    "h @ W.T": (lambda: Functional(product_then_sum, bias=False), "flat"),
    "b + h @ W": (lambda: Functional(lambda h, W, b: b + h @ W, transposed=True), "flat"),
    "torch.add, mm, transpose": (
        lambda: Functional(lambda h, W, b: torch.add(torch.mm(h, torch.transpose(W, 0, 1)), b)),
        "flat",
    ),
    "matmul of W.mT": (lambda: Functional(lambda h, W, b: torch.matmul(h, W.mT).add(b)), "flat"),
    "called twice": (CalledTwice, "flat"),
    "tied": (Tied, "flat"),
    "tied with bias": (TiedWithBias, "flat"),
    "positions": (Positions, "pooled"),
    "positions without bias": (lambda: Positions(bias=False), "pooled"),
    "inner positions": (InnerPositions, "pooled"),
    "output positions": (OutputPositions, "maps"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    torch.manual_seed(0)
    model, data = MODELS[name]
    return model(), *flat_and_sequences()[data]


def brute_force(model, loss, x, y, sharing="expand"):
    """`A ⊗ B` of every layer, example by example and column by column, in the order of the parameters."""
    f, layers = model.run(x)
    size = f[0].numel()
    roots = []
    for i, H in enumerate(output_hessian(loss, f, y).split(size)):
        values, vectors = torch.linalg.eigh(H[:, i * size : (i + 1) * size])
        roots.append(vectors * values.clamp_min(0).sqrt())
    mass = normalizer(loss, f, y) if loss.reduction == "mean" else 1.0
    slots, start = {}, 0
    for n, p in model.named_parameters():
        slots[n] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    M = torch.zeros(start, start, dtype=f64)
    for weight, bias, transposed, uses in layers:
        h = torch.stack([h.detach().reshape(N, -1, h.shape[-1]) for h, _ in uses], 1).flatten(1, 2)
        h = with_a_target(h, loss, y) if sharing == "expand" else h.mean(1)
        A = sum(torch.outer(v, v) for v in h) / len(h)
        B = torch.zeros(uses[0][1].shape[-1], uses[0][1].shape[-1], dtype=f64)
        for i, S in enumerate(roots):
            for s in S.T:
                g = torch.autograd.grad(f[i].flatten(), [a for _, a in uses], s, retain_graph=True)
                rows = torch.cat([gu[i].reshape(-1, gu.shape[-1]) for gu in g])
                rows = rows if sharing == "expand" else rows.sum(0, keepdim=True)
                B += sum(torch.outer(r, r) for r in rows) / mass
        slot = [] if weight is None else [(slots[weight].T if transposed else slots[weight]).flatten()]
        slot += [] if bias is None else [slots[bias]]
        if weight is None:
            block = B
        elif bias is None:
            block = torch.kron(B, A)
        else:
            x1 = torch.cat([h, torch.ones(len(h), 1, dtype=f64)], 1)
            block = homogeneous_kron(x1.T @ x1 / len(h), B)
        index = torch.cat(slot)
        M[index[:, None], index] = block
    return M


def with_a_target(h, loss, y):
    """The inputs `(N, t, d)` as cases, without positions whose target is ignored."""
    ignore = getattr(loss, "ignore_index", None)
    if ignore is None or y.is_floating_point():
        return h.flatten(0, 1)
    kept = (y != ignore).reshape(len(y), -1)
    kept = kept.repeat(1, h.shape[1] // kept.shape[1])
    return h[kept]


def torch_state_is_clean(model):
    """No function mode is active and no module has a hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        _get_current_function_mode() is None
        and _len_torch_function_stack() == 0
        and not any(getattr(m, kind) for m in model.modules() for kind in hooks)
    )


@pytest.fixture(autouse=True)
def _no_function_mode_survives_a_test():
    """Also ends those that do, so that one failure stays one."""
    yield
    left = _len_torch_function_stack()
    for _ in range(left):
        torch._C._pop_torch_function_stack()
    assert left == 0


class TestKroneckerFactors:
    @every_model
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_kfac_is_A_kron_B_of_the_captured_cases(self, name, sharing):
        model, x, y = make(name)
        loss = nn.CrossEntropyLoss()
        if name.startswith("tied with"):
            loss, y = nn.MSELoss(), randn(N, D, seed=1)
        matrix = natgrad.fisher(model, loss, (x, y), "kfac", sharing=sharing)
        close(matrix.to_dense(), brute_force(model, loss, x, y, sharing), 1e-10)
        assert torch_state_is_clean(model)

    @pytest.mark.parametrize("name", ["nn.Linear", "h @ W.T + b", "tied", "positions", "output positions"])
    @pytest.mark.parametrize(
        "loss",
        [
            nn.CrossEntropyLoss(reduction="sum"),
            nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.3], dtype=f64), ignore_index=1, label_smoothing=0.1),
        ],
        ids=["sum", "options"],
    )
    def test_also_for_sums_weights_and_ignored_targets(self, name, loss):
        model, x, y = make(name)
        for centered in (True, False):
            matrix = natgrad.fisher(model, loss, (x, y), centered=centered)
            close(matrix.to_dense(), brute_force(model, loss, x, y), 1e-10)

    def test_a_model_that_is_one_layer(self):
        model, x, y = linear(D, C), randn(N, D), LABELS
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y))
        p = model(x).detach().softmax(1)
        B = torch.stack([torch.diag(q) - torch.outer(q, q) for q in p]).mean(0)
        x1 = torch.cat([x, torch.ones(N, 1, dtype=f64)], 1)
        close(matrix.to_dense(), homogeneous_kron(x1.T @ x1 / N, B), 1e-11)

    def test_a_branch_that_is_not_part_of_the_output_has_no_curvature(self):
        class Branch(Modules):
            def __init__(self):
                super().__init__()
                self.aside = linear(D, 2)

            def run(self, x):
                self.aside(x)
                return super().run(x)

        model, x, y = Branch(), randn(N, D), LABELS
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
        close(matrix, brute_force(model, nn.CrossEntropyLoss(), x, y), 1e-10)

    @pytest.mark.parametrize("order", ["sum first", "product first", "sum is aside"])
    def test_a_pre_activation_that_is_used_before_its_bias_is_added(self, order):
        # With one case, K-FAC's blocks are exact. The weight's is that of W h, the bias's that of W h + b.

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b = parameter(C, D), parameter(C, seed=1)

            def forward(self, x):
                a = x @ self.W.T
                early = a.tanh()
                f = a + self.b
                return {"sum first": f * a.tanh(), "product first": early * f, "sum is aside": a}[order]

        model, loss, data = Twice(), nn.MSELoss(), (randn(1, D), randn(1, C))
        matrix, dense = (natgrad.fisher(model, loss, data, s).to_dense() for s in ("kfac", "dense"))
        for block in (slice(0, C * D), slice(C * D, None)):
            close(matrix[block, block], dense[block, block], 1e-12)
        assert (matrix[: C * D, C * D :] == 0).all()

    @pytest.mark.parametrize("structure", ["dense", "implicit"])
    def test_an_input_without_an_example_axis_is_refused_where_cases_are_formed(self, structure):
        # The loss takes the entries of a 1-d output for examples, while the layer has seen one case.
        model, loss, data = linear(D, C), nn.MSELoss(), (randn(D), randn(C))
        with pytest.raises(ValueError, match=r"'weight' has shape \(4,\).*3 examples.*unsqueeze\(0\)"):
            natgrad.fisher(model, loss, data, "kfac")
        J = torch.cat([torch.kron(torch.eye(C, dtype=f64), data[0]), torch.eye(C, dtype=f64)], 1)
        close(natgrad.fisher(model, loss, data, structure).to_dense(), 2 * J.T @ J / C)

    @pytest.mark.parametrize(
        ("W", "b", "call"),
        [
            ((C, D), (1,), F.linear),
            ((D, C), (1, C), lambda h, W, b: torch.addmm(b, h, W)),
            ((D, C), (N, C), lambda h, W, b: torch.addmm(b, h, W)),
        ],
        ids=["F.linear's bias is broadcast", "row bias", "bias by case"],
    )
    def test_a_bias_of_another_shape_is_refused_by_name(self, W, b, call):
        class Broadcast(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b = parameter(*W), parameter(*b, seed=1)

            def forward(self, x):
                return call(x, self.W, self.b)

        with pytest.raises(NotImplementedError, match="'b'"):
            natgrad.fisher(Broadcast(), nn.CrossEntropyLoss(), (randn(N, D), LABELS))

    def test_a_weight_used_both_ways_round_has_one_block(self):
        class Autoencoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.W = parameter(2, D)

            def forward(self, x):
                return (x @ self.W.T).tanh() @ self.W

        F = natgrad.fisher(Autoencoder(), nn.MSELoss(), (randn(N, D), randn(N, D)))
        assert list(F.blocks) == ["W"]


class InPlace(nn.Module):
    """A network that overwrites the input of a layer after its use."""

    def __init__(self, which):
        super().__init__()
        self.which, self.one, self.two = which, linear(D, D), linear(D, C)

    def forward(self, x):
        x = x.clone()
        h = self.one(x).tanh()
        f = self.two(h)
        (x if self.which == "one" else h).mul_(2)
        return f


class TestInPlace:
    def nets(self, inplace):
        """The same network twice, with a new tensor from each activation and without."""

        class Calls(Functional):
            def run(self, x):
                a = self.affine(x, self.W1, self.b1)
                return self.affine(F.relu(a, inplace=self.inplace), self.W2, self.b2), []

        def one(changes):
            torch.manual_seed(0)
            if inplace == "nn.ReLU":
                layers = linear(D, 6), nn.ReLU(inplace=changes), linear(6, 6), nn.ReLU(inplace=changes), linear(6, C)
                return nn.Sequential(*layers)
            model = Calls({"F.linear": F.linear, "h @ W.T + b": product_then_sum}[inplace])
            model.inplace = changes
            return model

        return one(False), one(True)

    @pytest.mark.parametrize("inplace", ["nn.ReLU", "F.linear", "h @ W.T + b"])
    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_an_activation_in_place_changes_nothing(self, inplace, structure):
        expected, came = (
            natgrad.fisher(m, nn.CrossEntropyLoss(), (randn(N, D), LABELS), structure).to_dense()
            for m in self.nets(inplace)
        )
        assert expected.norm() > 0
        close(came, expected, 1e-13)

    @pytest.mark.parametrize("inplace", ["nn.ReLU", "F.linear", "h @ W.T + b"])
    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_an_activation_in_place_changes_nothing_with_positions(self, inplace, structure):
        # Here linear returns a view, which an in-place function gives another node in the graph.
        expected, came = (
            natgrad.fisher(m, nn.MSELoss(), (randn(N, T, D), randn(N, T, C)), structure).to_dense()
            for m in self.nets(inplace)
        )
        assert expected.norm() > 0
        close(came, expected, 1e-13)

    def test_a_change_before_the_bias_is_added_makes_it_a_shift_of_its_own(self):
        class Early(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b = parameter(C, D), parameter(C, seed=1)

            def forward(self, x):
                return (x @ self.W.T).relu_() + self.b

        model, data = Early(), (randn(N, D), LABELS)
        blocks = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "block").blocks
        dense = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "dense")
        assert set(blocks) == {"W", "b"}
        for name, block in blocks.items():
            close(block.to_dense(), dense.blocks[name].to_dense(), 1e-12)

    def test_an_activation_in_place_does_not_change_the_optimizers_steps(self):
        nets = self.nets("nn.ReLU")
        for model in nets:
            opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), generator=torch.Generator().manual_seed(0))
            for _ in range(6):
                step(opt, model)
        for a, b in zip(*(m.parameters() for m in nets), strict=True):
            close(a, b, 1e-10)

    @pytest.mark.parametrize("which", ["one", "two"])
    def test_a_change_of_an_input_after_its_use_names_the_parameter(self, which):
        model = InPlace(which)
        with pytest.raises(RuntimeError, match=rf"input of '{which}\.weight' was changed in place"):
            natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS))
        assert torch_state_is_clean(model)


class Stumbling(nn.Module):
    """A network that raises `error` between its layers, where it has one."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.one, self.two = error, linear(D, D), linear(D, C)

    def forward(self, x):
        h = self.one(x).tanh()
        if self.error is not None:
            raise self.error
        return self.two(h)


class Scaled(nn.Module):
    """A linear layer, and something else that has parameters."""

    def __init__(self, other):
        super().__init__()
        self.one, self.other, self.two = linear(D, D), other, linear(D, C)

    def forward(self, x):
        h = self.one(x).tanh()
        if isinstance(self.other, nn.Embedding):
            h = h + self.other(LABELS)
        elif isinstance(self.other, nn.Conv2d):
            h = self.other(h.view(-1, 1, 2, 2)).flatten(1)
        elif self.other is not None:
            h = self.other(h)
        return self.two(h)


class Attended(nn.Module):
    """Features that are weighted by a softmax."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(D))

    def forward(self, h):
        return h * self.weight.softmax(0)


UNSUPPORTED = {"Power": lambda: Power(D), "Attended": Attended}


class TestAfterwards:
    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_no_mode_and_no_hook_stay(self, structure):
        model = Modules()
        natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS), structure).to_dense()
        assert torch_state_is_clean(model)

    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    @pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt("half-way")], ids=repr)
    def test_no_mode_and_no_hook_stay_after_an_exception_in_the_forward(self, structure, error):
        model = Stumbling(error)
        with pytest.raises(type(error), match="half-way"):
            natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS), structure) @ torch.zeros(35, dtype=f64)
        assert torch_state_is_clean(model)

    def test_no_mode_and_no_hook_stay_after_a_parameter_was_refused(self):
        model = Scaled(Power(D))
        with pytest.raises(NotImplementedError):
            natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS))
        assert torch_state_is_clean(model)

    def test_a_function_mode_of_the_user_stays_active(self):
        class Count(torch.overrides.TorchFunctionMode):
            calls = 0

            def __torch_function__(self, func, types, args=(), kwargs=None):
                self.calls += func is F.linear
                return func(*args, **(kwargs or {}))

        with Count() as mode:
            natgrad.fisher(Modules(), nn.CrossEntropyLoss(), (randn(N, D), LABELS))
            assert _get_current_function_mode() is mode
        assert mode.calls >= 2


class MyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W):
        ctx.save_for_backward(h, W)
        return h @ W.T

    @staticmethod
    def backward(ctx, g):
        h, W = ctx.saved_tensors
        return g @ W, g.T @ h


class TestCoverage:
    data = (randn(N, D), LABELS)

    @pytest.mark.parametrize("kind", UNSUPPORTED)
    def test_a_parameter_of_an_unsupported_kind_is_named(self, kind):
        with pytest.raises(NotImplementedError, match=r"'other\.(weight|exponent)' \(used by .*params="):
            natgrad.fisher(Scaled(UNSUPPORTED[kind]()), nn.CrossEntropyLoss(), self.data)

    @pytest.mark.parametrize("kind", UNSUPPORTED)
    def test_frozen_or_left_out_it_is_let_be(self, kind):
        model = Scaled(UNSUPPORTED[kind]())
        left_out = natgrad.fisher(model, nn.CrossEntropyLoss(), self.data, params=lambda n: "other" not in n)
        model.other.requires_grad_(False)
        frozen = natgrad.fisher(model, nn.CrossEntropyLoss(), self.data)
        assert not any("other" in n for n in frozen @ {n: p for n, p in model.named_parameters() if p.requires_grad})
        close(frozen.to_dense(), left_out.to_dense(), 1e-12)
        assert all(p.grad is None for p in model.parameters())

    def test_a_frozen_weight_leaves_its_bias(self):
        model = Modules()
        model.one.weight.requires_grad_(False)
        x, y = self.data
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y))
        model.requires_grad_(True)
        whole = brute_force(model, nn.CrossEntropyLoss(), x, y)
        keep = torch.arange(len(whole)) >= model.one.weight.numel()
        close(matrix.to_dense(), whole[keep][:, keep], 1e-10)

    def test_an_unused_parameter_is_named(self):
        model = Scaled(None)
        model.spare = parameter(3)
        with pytest.raises(NotImplementedError, match=r"'spare' was not used.*requires_grad_\(False\).*params="):
            natgrad.fisher(model, nn.CrossEntropyLoss(), self.data)

    @pytest.mark.parametrize(
        "use",
        [
            lambda h, W: h @ (2 * W.exp()).T,
            lambda h, W: F.linear(h, W) + W.sum(),
            lambda h, W: W @ h.T,
            lambda h, W: torch.einsum("ni,oi->on", h, W).T,
            lambda h, W: F.linear(h, W) + torch.stack([W, W]).sum(),
            lambda h, W: F.linear(h, W) + W.chunk(2)[0].sum(),
            lambda h, W: F.linear(h, W) + W.max(0)[0].sum(),
            lambda h, W: F.linear(h, W) + MyProduct.apply(h, W),
        ],
        ids=["exp", "sum", "from the left", "einsum", "stack", "chunk", "max", "autograd.Function"],
    )
    def test_another_use_of_a_weight_is_refused_by_name(self, use):
        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.W = parameter(N, N)

            def forward(self, x):
                return use(x, self.W)

        with pytest.raises(NotImplementedError, match="'W'"):
            natgrad.fisher(Other(), nn.MSELoss(), (randn(N, N), randn(N, N)))

    def test_a_use_that_the_output_does_not_depend_on_is_let_be(self):
        class Watched(Modules):
            def run(self, x):
                self.norm = self.one.weight.norm() + MyProduct.apply(x, self.one.weight).sum()
                return super().run(x)

        model, (x, y) = Watched(), self.data
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
        close(matrix, brute_force(model, nn.CrossEntropyLoss(), x, y), 1e-10)

    @pytest.mark.parametrize("fixed", ["W", "b"])
    def test_a_parameter_within_the_weight_or_bias_of_another_is_refused_by_name(self, fixed):
        class Within(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b, self.scale = parameter(C, D), parameter(C, seed=1), nn.Parameter(torch.ones(1).to(f64))

            def forward(self, x):
                W, b = (p if n == fixed else self.scale * p for n, p in (("W", self.W), ("b", self.b)))
                return F.linear(x, W, b)

        with pytest.raises(NotImplementedError, match="'scale'") as error:
            natgrad.fisher(Within(), nn.CrossEntropyLoss(), self.data)
        assert f"'{fixed}'" not in str(error.value)

    def test_a_checkpoint_changes_nothing_or_is_refused_by_name(self):
        class Checkpointed(Modules):
            reentrant = None

            def run(self, x):
                if self.reentrant is None:
                    return super().run(x)
                x = x.clone().requires_grad_()
                h = torch.utils.checkpoint.checkpoint(self.one, x, use_reentrant=self.reentrant)
                return super().run(h)

        class Plain(Checkpointed):
            def run(self, x):
                return Modules.run(self, self.one(x))

        def matrix(kind, reentrant=None):
            torch.manual_seed(0)
            model = kind()
            model.one, model.reentrant = linear(D, D), reentrant
            model.two = linear(D, C)
            return natgrad.fisher(model, nn.CrossEntropyLoss(), self.data).to_dense()

        close(matrix(Checkpointed, False), matrix(Plain), 1e-13)
        with pytest.raises(NotImplementedError, match=r"'one\.weight' \(used by linear in a checkpoint.*=False"):
            matrix(Checkpointed, True)

    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_inference_mode_is_refused(self, structure):
        model = Modules()
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\).*expected.*no_grad\(\)"):
            natgrad.fisher(model, nn.CrossEntropyLoss(), self.data, structure).to_dense()
        assert torch_state_is_clean(model)

    def test_in_eval_mode_dropout_is_off(self):
        model = nn.Sequential(linear(D, 6), nn.Tanh(), nn.Dropout(0.5), linear(6, C)).eval()
        plain = nn.Sequential(model[0], nn.Tanh(), model[3])
        a, b = (natgrad.fisher(m, nn.CrossEntropyLoss(), self.data).to_dense() for m in (model, plain))
        assert torch.equal(a, b)
        assert not model.training

    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_under_no_grad_it_is_the_same(self, structure):
        model = Modules()
        expected = natgrad.fisher(model, nn.CrossEntropyLoss(), self.data, structure).to_dense()
        with torch.no_grad():
            came = natgrad.fisher(model, nn.CrossEntropyLoss(), self.data, structure).to_dense()
            assert not torch.is_grad_enabled()
        assert torch.equal(came, expected)


def by_linear_and_by_hand(order):
    """One layer called in three ways; the calls in an order."""
    calls = {
        "linear": lambda h, W, b: F.linear(h, W, b),
        "product": lambda h, W, b: h @ W.T + b,
        "linear, add": lambda h, W, b: F.linear(h, W) + b,
    }

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.b, self.last = parameter(D, D), parameter(D, seed=1), linear(D, C)

        def forward(self, x):
            for name in order:
                x = calls[name](x, self.W, self.b).tanh()
            return self.last(x)

    return Mixed()


@pytest.mark.parametrize("order", list(permutations(["linear", "product", "linear, add"])), ids=", then ".join)
def test_recorded_uses_leave_the_tangent_as_it_is(order):
    model, x = by_linear_and_by_hand(order), randn(N, D)
    direction = {n: randn(*p.shape, seed=3) for n, p in model.named_parameters()}
    with Recorder(dict(model.named_parameters())) as recorder:
        recorder.check(model(x))
    expected, came = (tangent(model, lambda m: m(x), direction, uses) for uses in ((), recorder.uses))
    for a, b in zip(came, expected, strict=True):
        close(a, b, 1e-13)


def step(opt, model, x=None):
    loss = opt.loss(model(randn(N, D) if x is None else x), LABELS)
    opt.zero_grad()
    loss.backward()
    opt.step()


FIXED = {"lr": 0.01, "momentum": 0.9, "damping": 0.1}


class TestOptimizer:
    @pytest.fixture
    def recorders(self, monkeypatch):
        """Every recorder that the optimizers make, in order."""
        made = []

        class Listed(Recorder):
            def __init__(self, parameters):
                super().__init__(parameters)
                made.append(self)

        monkeypatch.setattr(watch_module, "Recorder", Listed)
        return made

    def no_mode(self):
        return _get_current_function_mode() is None and _len_torch_function_stack() == 0

    def test_a_forward_in_training_mode_is_recorded(self, recorders):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(opt, model)
        assert [len(r.uses) for r in recorders] == [2]
        assert self.no_mode()

    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_nothing_is_recorded_in_eval_mode_or_without_gradients(self, recorders, options):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
        model.eval()
        model(randn(N, D))
        model.train()
        with torch.no_grad():
            model(randn(N, D))
        with torch.inference_mode():
            model(randn(N, D))
        assert recorders == []
        with pytest.raises(RuntimeError, match="training mode with gradients enabled"):
            opt.loss(randn(N, C), LABELS)

    def test_with_fixed_numbers_only_the_steps_with_statistics_are_recorded(self, recorders):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), statistics_every=3, **FIXED)
        counts = []
        for _ in range(7):
            step(opt, model)
            counts.append(len(recorders))
        assert counts == [1, 1, 1, 2, 2, 2, 3]

    def test_the_steps_own_forwards_are_not_recorded(self, recorders):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), adapt_every=1)
        for _ in range(4):
            step(opt, model)
        assert len(recorders) == 4

    @pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt("half-way")], ids=repr)
    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_a_forward_that_raises_leaves_no_mode_and_the_next_step_works(self, options, error):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), statistics_every=1, **options)
        for _ in range(2):
            model.error = error
            with pytest.raises(type(error), match="half-way"):
                model(randn(N, D))
            model.error = None
            if isinstance(error, KeyboardInterrupt):  # torch calls no hook then: the next forward ends the mode
                model.eval()(randn(N, D))
                model.train()
            assert self.no_mode()
            with pytest.raises(RuntimeError, match=r"opt\.loss follows a forward"):
                opt.loss(randn(N, C), LABELS)
            before = model.one.weight.detach().clone()
            step(opt, model)
            assert opt.diagnostics["accepted"]
            assert not torch.equal(model.one.weight, before)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_hook_of_the_user_that_raises_leaves_no_mode(self, when):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())

        def fail(*_):
            raise RuntimeError("my hook")

        handle = (model.register_forward_pre_hook if when == "before" else model.register_forward_hook)(fail)
        with pytest.raises(RuntimeError, match="my hook"):
            model(randn(N, D))
        assert self.no_mode()
        handle.remove()
        step(opt, model)

    def test_a_refused_parameter_leaves_no_mode(self):
        model = Scaled(Power(D))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        with pytest.raises(NotImplementedError, match=r"'other\.exponent'"):
            step(opt, model)
        assert self.no_mode()

    @pytest.mark.parametrize("style", ["factored", "exact"])
    def test_a_bias_with_a_block_of_its_own(self, style):
        model = Tied()
        F = natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS))
        bias = F.blocks["one.bias"].to_dense() + 0.1 * torch.eye(D, dtype=f64)
        close(F.inverse(0.1, damping_style=style).blocks["one.bias"].to_dense(), torch.linalg.inv(bias))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), damping_style=style)
        step(opt, model)
        assert opt.diagnostics["accepted"]

    def test_a_model_that_calls_itself_leaves_no_mode(self):
        class Recursive(Stumbling):
            def forward(self, x, depth=1):
                return super().forward(x if depth == 0 else x + self(x, depth - 1).mean(1, keepdim=True))

        model = Recursive()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        model(randn(N, D))
        assert self.no_mode()
        step(opt, model)

    @pytest.mark.parametrize("after_a_step", [False, True])
    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),
            lambda m: torch.load(saved(m), weights_only=False),
            lambda m: loaded(Stumbling(), torch.load(saved(m.state_dict()))),
        ],
        ids=["deepcopy", "pickle", "torch.save", "state_dict"],
    )
    def test_a_copy_of_the_model_is_equal_and_records_nothing(self, recorders, copied, after_a_step):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        if after_a_step:
            step(opt, model)
        already = len(recorders)
        twin = copied(model)
        assert torch.equal(twin(randn(N, D)), twin.train()(randn(N, D)))
        assert len(recorders) == already
        with pytest.raises(RuntimeError, match=r"opt\.loss follows a forward"):
            opt.loss(twin(randn(N, D)), LABELS)
        close(twin(randn(N, D)), model(randn(N, D)), 0)
        step(opt, model)
        assert opt.diagnostics["accepted"]
        assert not torch.equal(twin.one.weight, model.one.weight)

    def test_a_copy_takes_an_optimizer_of_its_own(self, recorders):
        model = Stumbling()
        _first = natgrad.KFAC(model, nn.CrossEntropyLoss())
        twin = copy.deepcopy(model)
        step(natgrad.KFAC(twin, nn.CrossEntropyLoss()), twin)
        assert len(recorders) == 1

    def test_without_the_optimizer_the_model_has_no_hooks(self):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(opt, model)
        del opt
        gc.collect()
        assert torch_state_is_clean(model)

    def test_fisher_on_a_model_with_an_optimizer(self):
        model = net(D, 6, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        data = (randn(N, D), LABELS)
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), data).to_dense()
        assert self.no_mode()
        close(matrix, natgrad.fisher(copy.deepcopy(model), nn.CrossEntropyLoss(), data).to_dense(), 1e-13)
        step(opt, model)


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


def loaded(model, state):
    model.load_state_dict(state)
    return model
