"""K-FAC on one page of plain PyTorch: slow, easy to read, and with the same steps as `natgrad.KFAC`.

The model is an `nn.Sequential` of linear layers with biases, and activations between them. A layer computes
`a = W h + b`, and `g` is a gradient in `a`. K-FAC takes averages over examples: the mean `m = E[h]` and the covariance
`C` of the layer's inputs, and `B = E[g gᵀ]`. docs/recipe.md explains every function below.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp


def sampled_column(loss, f, generator):
    """The gradient `s` of each example's loss in the output `f`, for a target that is drawn from the model."""
    if isinstance(loss, nn.MSELoss):  # the target is normal around f
        return (2 / f.shape[1]) ** 0.5 * torch.randn(f.shape, dtype=f.dtype, generator=generator)
    noise = -(-torch.rand(f.shape, dtype=f.dtype, generator=generator).log()).log()
    labels = (f + noise).argmax(1)  # the largest of logits plus Gumbel noise is a draw from the softmax
    return f.softmax(1) - F.one_hot(labels, f.shape[1])


def dot(u, v):
    return sum((s * t).sum() for s, t in zip(u, v, strict=True))


def combine(coefficients, vectors):
    return [sum(c * t for c, t in zip(coefficients, parts, strict=True)) for parts in zip(*vectors, strict=True)]


def inverse(matrix, damping):
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


class SimpleKFAC:
    def __init__(self, model, loss, generator=None):
        self.model, self.loss, self.generator = model, loss, generator
        self.names, self.params = zip(*model.named_parameters(), strict=True)  # W, b, W, b, ...
        self.sums = self.damping = self.delta = None  # moving averages, λ, and the last step δ₀
        self.rejections, self.loss_before = 0, torch.inf

    def step(self, x, y):
        """One step on a mini-batch. Returns the loss before it."""
        inputs, outputs, f = [], [], x
        for module in self.model:
            h, f = f, module(f)
            if isinstance(module, nn.Linear):
                inputs.append(h.detach())
                outputs.append(f)
        loss = self.loss(f, y)
        gradient = torch.autograd.grad(loss, self.params, retain_graph=True)
        gs = torch.autograd.grad(f, outputs, sampled_column(self.loss, f.detach(), self.generator))
        with torch.no_grad():
            self.average(inputs, gs)
            self.move(x, y, gradient, loss)
        return loss.item()

    def average(self, inputs, gs):
        """Moving averages of `Σ x xᵀ`, `x = [h; 1]`, and of `Σ g gᵀ`, and from these `C`, `m` and `B` of each layer."""
        xs = [F.pad(h, (0, 1), value=1) for h in inputs]
        sums = [(x.T @ x, g.T @ g) for x, g in zip(xs, gs, strict=True)]
        if self.sums:
            sums = [combine((0.8, 1), pair) for pair in zip(self.sums, sums, strict=True)]
        self.sums, self.factors = sums, []
        for xx, gg in sums:  # the last entry of Σ x xᵀ is the number of examples
            A, B = xx / xx[-1, -1], gg / xx[-1, -1]
            m = A[-1, :-1]
            self.factors.append((A[:-1, :-1] - torch.outer(m, m), m, B))

    def typical_curvature(self):
        """The mean eigenvalue of a layer's `C ⊗ B` (for `W`) and `B` (for `b`): the median over the parameters."""
        sizes = torch.tensor([len(B) * (len(C) + 1) for C, _, B in self.factors])
        traces = torch.stack([(C.trace() + 1) * B.trace() for C, _, B in self.factors])
        return (traces / sizes).repeat_interleave(sizes).median().item()

    def precondition(self, gradient, damping):
        """`ΔW = B⁻¹ (∇_W − ∇_b mᵀ) C⁻¹` and `Δb = B⁻¹ ∇_b − ΔW m`, with damped inverses."""
        direction = []
        for W, b, (C, m, B) in zip(gradient[::2], gradient[1::2], self.factors, strict=True):
            pi, root = (C.diagonal().mean() / B.diagonal().mean()).sqrt(), damping**0.5
            dW = inverse(B, root / pi) @ (W - torch.outer(b, m)) @ inverse(C, pi * root)
            direction += [dW, inverse(B, damping) @ b - dW @ m]
        return direction

    def centered(self, d):
        """`(W, b + W m)` for each layer: the coordinates in which the damping adds `λ I`."""
        return [t for W, b, (_, m, _) in zip(d[::2], d[1::2], self.factors, strict=True) for t in (W, b + W @ m)]

    def output(self, x, *params):
        return functional_call(self.model, dict(zip(self.names, params, strict=True)), x)

    def propose(self, x, y, gradient, loss, damping):
        """The step `δ = −α Δ + μ δ₀` that minimizes `½ δᵀ(F + λI)δ + ∇ᵀδ`, and the decrease that it promises."""
        directions = [self.precondition(gradient, damping)] + ([self.delta] if self.delta else [])
        f, Jd = zip(*(jvp(lambda *p: self.output(x, *p), self.params, tuple(d)) for d in directions), strict=True)
        DJd = [torch.autograd.functional.hvp(lambda f: self.loss(f, y), f[0], v)[1] for v in Jd]  # D: its Hessian
        z, n = [self.centered(d) for d in directions], range(len(directions))
        Q = torch.stack([dot([Jd[i]], [DJd[j]]) + damping * dot(z[i], z[j]) for i in n for j in n])
        slope = torch.stack([dot(gradient, d) for d in directions])
        c = -torch.linalg.solve(Q.view(len(n), len(n)), slope)  # (−α, μ)
        promised = -(slope @ c) / 2
        if promised > loss:  # no step gains so much: go as far as the model promises all of the loss
            c, promised = (1 - (1 - loss / promised).sqrt()) * c, loss
        return combine(c, directions), promised

    def move(self, x, y, gradient, loss):
        """Takes the step, or a part of it, or none, so that the loss does not rise. Then adapts the damping."""

        def after(delta, share=1):
            return self.loss(self.output(x, *combine((1, share), (self.params, delta))), y).item()

        typical = self.typical_curvature()
        if self.damping is None:  # take the one whose step lowers the first loss most; stop where two are no better
            grid = [typical * 10.0**k for k in range(3, -7, -1)]
            losses = [after(self.propose(x, y, gradient, loss, damping)[0]) for damping in grid]
            stop = next((i for i in range(1, 9) if min(losses[i : i + 2]) >= min(losses[:i])), 10)
            self.damping = grid[losses.index(min(losses[:stop]))]
        if self.delta and loss > 1.5 * self.loss_before and loss > 1.5 * after(self.delta, -1):
            delta, promised, shares = self.delta, 1, (-1,)  # the last step has made this batch worse: take it back
        else:
            delta, promised = self.propose(x, y, gradient, loss, self.damping)
            self.loss_before, shares = loss, (1, 1 / 4, 1 / 16, 1 / 64, 0)
        for share in shares:
            loss_after = after(delta, share)
            if loss_after <= (1.5 * loss if share == 1 else loss):
                break
        for p, d in zip(self.params, delta, strict=True):
            p.add_(share * d)
        self.delta = combine((share,), (delta,)) if share > 0 else None
        self.rejections = 0 if share > 0 else self.rejections + 1
        ratio = (loss - loss_after) / promised
        if share < 1:
            self.damping = min(self.damping * 4.0 ** max(1, self.rejections), max(self.damping, 1000 * typical))
        elif ratio > 3 / 4 or (ratio > 1 / 4 and self.damping > 10 * typical):
            self.damping = min(self.damping, max(0.8 * self.damping, typical))
        elif ratio < 1 / 4:
            self.damping = min(self.damping / 0.8, max(self.damping, 10 * typical))


if __name__ == "__main__":
    torch.manual_seed(0)
    x = 2 * torch.randn(2000, 2, dtype=torch.float64)
    y = (x.sum(1) + 2 * x.prod(1).sin() > 0).long()
    model = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 2)).double()
    opt = SimpleKFAC(model, nn.CrossEntropyLoss())
    for step in range(201):
        batch = torch.randint(len(x), (500,))
        loss = opt.step(x[batch], y[batch])
        if step % 40 == 0:
            print(f"step {step:3}: loss {loss:.4f}")
