"""Training loops of all kinds, on a model with `natgrad.KFAC` and on its twin with the slow reference."""

import contextlib
import copy
import io
from itertools import pairwise

import torch
from torch import nn

import natgrad
from slow_kfac import SlowKfac

WIDTHS, EXAMPLES = (3, 4, 3, 2), 7
TOLERANCE = 1e-7


class Interrupted(Exception):
    """What a program raises on purpose."""


def model_of(biases, dropout):
    layers = []
    for i, (d_in, d_out) in enumerate(pairwise(WIDTHS)):
        layers += [nn.Linear(d_in, d_out, bias=biases[i]), nn.Tanh()]
        layers += [nn.Dropout(0.3)] if dropout and i == 0 else []
    return nn.Sequential(*layers[:-1]).double()


class Loop:
    """Two models that do the same, step by step. Each operation of a program is a method.

    What is in the gradients is noted here, by hand: of each loss whether its gradient has arrived, and with which
    factor.
    """

    def __init__(self, biases, dropout, loss, options, seed=0):
        torch.manual_seed(seed)
        self.model, self.loss, self.options = model_of(biases, dropout), loss, options
        self.twin = copy.deepcopy(self.model)
        self.opt, self.slow = self._optimizer(self.model), SlowKfac(self.twin, loss, options)
        self.open, self.losses, self.noted, self.kept = [], [], [], []
        self.count, self.steps, self.divided = 0, 0, False
        classes = isinstance(loss, nn.CrossEntropyLoss)
        self.x = torch.randn(40, WIDTHS[0], dtype=torch.float64) + 0.5
        self.y = torch.randint(WIDTHS[-1], (40,)) if classes else torch.randn(40, WIDTHS[-1], dtype=torch.float64)

    def _optimizer(self, model):
        own = {**self.options, "statistics_share": 1.0, "estimator": "exact", "adapt_every": 1}
        return natgrad.KFAC(model, self.loss, matmul_precision=None, **own)

    # Between steps -------------------------------------------------------------------------------------

    def forward(self, size, spoil=False):
        """A forward of a new mini-batch, which may have a NaN in it."""
        self.count += 1
        which = torch.arange(size + 2).add(3 * self.count) % 40
        x, y = self.x[which], self.y[which]
        if spoil:
            x[0, 0] = torch.nan
        outputs = []
        for model in (self.model, self.twin):
            torch.manual_seed(self.count)
            outputs.append(model(x.clone()))
        self.open.append((x, y, self.count, *outputs))

    def compute_loss(self, which, forget=True):
        """The loss of one of the outputs there are."""
        if not self.open:
            return
        x, y, seed, output, twins = self.open.pop(which % len(self.open))
        mine, its = self.opt.loss(output, y), self.loss(twins, y)
        assert torch.allclose(mine, its, rtol=1e-9, atol=1e-12, equal_nan=True)
        part = self.slow.part(x, y, seed, 0.0, its.item())
        self.losses.append((mine, its, part, output))

    def backward(self, factors, again=False):
        """Backward from a weighted sum of the losses there are."""
        chosen, self.losses = self.losses[: len(factors)], self.losses[len(factors) :]
        if not chosen:
            return
        for which in (0, 1):
            total = sum(f * losses[which] for f, losses in zip(factors, chosen, strict=False))
            total.backward(retain_graph=again)
            if again:
                total.backward()
        self.divided = False
        for f, (_, _, part, _) in zip(factors, chosen, strict=False):
            part.factor += f * (1 + again)
            if not any(part is noted for noted in self.noted):
                self.noted.append(part)

    def backward_zero_backward(self, how):
        """The gradients of a loss are zeroed, and come again."""
        if self.losses:
            self.losses = self.losses[:1]
            for loss in self.losses[0][:2]:
                loss.backward(retain_graph=True)
            self.zero(how)
            self.backward([1.0])

    def peek(self):
        """Gradients of a loss by `torch.autograd.grad`, for other ends than the step."""
        if self.losses:
            torch.autograd.grad(self.losses[0][0], self._trainable(self.model), retain_graph=True, allow_unused=True)

    def zero(self, how):
        """Gradients are zeroed, in one of the ways there are."""
        for model, zero in ((self.model, self.opt.zero_grad), (self.twin, self.twin.zero_grad)):
            if how == "opt":
                zero()
            elif how == "opt, in place":
                zero(set_to_none=False)
            elif how == "model":
                model.zero_grad()
            elif how == "model, in place":
                model.zero_grad(set_to_none=False)
            else:
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.mul_(0) if torch.isfinite(p.grad).all() else p.grad.zero_()
        self.noted.clear()
        self.divided = False

    def clip(self, norm):
        for model in (self.model, self.twin):
            grads = [p for p in model.parameters() if p.grad is not None]
            if grads:
                nn.utils.clip_grad_norm_(grads, norm)

    def evaluate(self):
        """The model in evaluation, and in training without gradients."""
        with torch.no_grad():
            self.model.eval()
            self.model(self.x)
            self.model.train()
            self.model(self.x[:3])

    def skip(self):
        """Outputs and losses that nothing becomes of."""
        self.open.clear()
        self.losses.clear()

    def freeze(self, which, frozen):
        """A parameter is frozen, or trainable again, between two iterations."""
        self.skip()
        self.zero("opt")
        name, p = list(self.model.named_parameters())[which % len(list(self.model.parameters()))]
        if frozen and all(p is q for q in self._trainable(self.model)):
            return
        for model in (self.model, self.twin):
            model.get_parameter(name).requires_grad_(not frozen)
            model.get_parameter(name).grad = None

    def raise_in_forward(self, which):
        linear = [m for m in self.model if isinstance(m, nn.Linear)][which % 3]

        def fail(h):
            raise Interrupted

        linear.forward = fail
        with contextlib.suppress(Interrupted):
            self.model(self.x[:5])
        del linear.forward

    def raise_in_backward(self):
        """A backward that ends with an error before it comes to any parameter."""
        if not self.losses:
            return

        def fail(gradient):
            raise Interrupted

        mine, *_, output = self.losses.pop(0)
        output.register_hook(fail)
        with contextlib.suppress(Interrupted):
            mine.backward()

    # Steps ---------------------------------------------------------------------------------------------

    def step(self, interrupted=None):
        """A step, which may be interrupted once and taken again; what it came from is gone then."""
        grads = any(p.grad is not None and p.requires_grad for p in self.twin.parameters())
        if not (self.noted and grads):
            if not grads:
                self._refused()
            return
        if interrupted is not None:
            self._interrupt(interrupted)
        self.opt.step()
        self._compare()

    def closure_step(self, size):
        """Everything in a closure, as `LBFGS` has it."""

        def closure():
            self.zero("opt")
            self.skip()
            self.forward(size)
            self.compute_loss(0)
            self.backward([1.0])
            return 0.0

        self.opt.step(closure)
        self._compare()

    def iterate(self, size, zero, late, spoil=False):
        """An ordinary iteration, with what losses there are. `late`: zeroed between loss and backward."""
        if not late:
            self.zero(zero)
        self.forward(size, spoil)
        self.compute_loss(0)
        if late:
            self.zero(zero)
        self.backward([1.0] * len(self.losses))
        self.step()

    def accumulate(self, sizes, by_hand):
        """Several mini-batches in a step, whose mean is made in the losses or by hand from the gradients."""
        self.skip()
        self.zero("opt")
        for size in sizes:
            self.forward(size)
            self.compute_loss(0)
            self.backward([1.0 if by_hand else 1 / len(sizes)])
        if by_hand:
            total = sum(map(self.slow.in_means, self.noted))
            for p in [*self.model.parameters(), *self.twin.parameters()]:
                if p.grad is not None:
                    p.grad.div_(total)
            self.divided = True
        self.step()

    def set_by_hand(self, size, factor):
        """Gradients by `torch.autograd.grad`, written to `grad` by hand."""
        self.skip()
        self.zero("opt")
        self.forward(size)
        self.compute_loss(0)
        for model, loss in zip((self.model, self.twin), self.losses[0], strict=False):
            own = self._trainable(model)
            for p, g in zip(own, torch.autograd.grad(factor * loss, own), strict=True):
                p.grad = g
        part = self.losses.pop(0)[2]
        part.factor = factor
        self.noted.append(part)
        self.step()

    def save_and_load(self):
        """To a file and back, for a copy of the model."""
        self.skip()
        self.zero("opt")
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        model = copy.deepcopy(self.model)
        frozen = [not p.requires_grad for p in model.parameters()]
        model.requires_grad_(True)
        opt = self._optimizer(model)
        opt.load_state_dict(torch.load(file))
        for p, is_frozen in zip(model.parameters(), frozen, strict=True):
            p.requires_grad_(not is_frozen)
        self.model, self.opt = model, opt

    # Within --------------------------------------------------------------------------------------------

    def _trainable(self, model):
        return [p for p in model.parameters() if p.requires_grad]

    def _refused(self):
        try:
            self.opt.step()
        except RuntimeError:
            return
        raise AssertionError("a step without gradients was taken")

    def _interrupt(self, where):
        part, name = {
            "direction": (self.opt.recipe.preconditioner, "apply"),
            "inverses": (self.opt.recipe.preconditioner, "prepare"),
            "averages": (self.opt.recipe.preconditioner, "moves"),
            "parameters": (self.opt.recipe.trials, "take"),
            "the end": (self.opt.recipe, "_commit"),
        }[where]
        own, before = getattr(part, name), copy.deepcopy(self.model.state_dict())

        def fail(*args, **kwargs):
            raise Interrupted

        setattr(part, name, fail)
        try:
            self.opt.step()
        except Interrupted:
            if where != "the end":
                for n, p in self.model.state_dict().items():
                    assert torch.equal(p, before[n])
            else:
                self.model.load_state_dict(before)
        finally:
            setattr(part, name, own)
            delattr(part, name) if name in vars(part) else None

    def _compare(self):
        if self.divided:
            total = sum(map(self.slow.in_means, self.noted))
            for part in self.noted:
                part.factor /= total
        with torch.no_grad():
            taken = self.slow.step(self.noted)
        self.steps += 1
        assert self.opt.diagnostics["accepted"] == taken, self.opt.diagnostics
        for (n, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            error = ((p - q).abs().max() / q.abs().max().clamp_min(1e-3)).item()
            assert error < TOLERANCE, f"{n} differs by {error:.2g} of its largest entry after step {self.steps}"
        self.kept = [*self.kept[-5:], *self.open, *self.losses]  # somebody may still have them
        self.skip()
        self.noted, self.divided = [], False
