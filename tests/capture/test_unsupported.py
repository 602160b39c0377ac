"""Parameters and uses that are not supported raise an error that names them; frozen and unused ones do not."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import natgrad
from oracles import Power, close, f64, randn
from traced import LABELS, C, D, Modules, N, Scaled, brute_force, linear, parameter, torch_state_is_clean


class Attended(nn.Module):
    """Features that are weighted by a softmax."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(D))

    def forward(self, h):
        return h * self.weight.softmax(0)


UNSUPPORTED = {"Power": lambda: Power(D), "Attended": Attended}


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
