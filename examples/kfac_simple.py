"""K-FAC on one page of plain PyTorch: slow, easy to read, and the same steps as `natgrad.KFAC`.

The model is an `nn.Sequential` of linear layers with biases, and activations between them. A layer computes
`a = W h + b`, and `g` is a gradient in `a`. K-FAC takes averages over examples: the mean `m = E[h]` and the covariance
`C` of the layer's inputs, and `B = E[g gᵀ]`. docs/recipe.md explains every function below.

    python examples/kfac_simple.py
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp


def curvature_product(loss, f, v):
    """`D v`, where `D` is the Hessian of each example's loss in the model's output `f`."""
    if isinstance(loss, nn.MSELoss):
        return 2 * v / f.shape[1]
    p = f.softmax(1)
    return p * (v - (p * v).sum(1, keepdim=True))


def sampled_column(loss, f, generator):
    """The gradient `s` of each example's loss in `f`, for a target drawn from the model: `E[s sᵀ] = D`."""
    if isinstance(loss, nn.MSELoss):
        return (2 / f.shape[1]) ** 0.5 * torch.randn(f.shape, dtype=f.dtype, generator=generator)
    noise = -(-torch.rand(f.shape, dtype=f.dtype, generator=generator).log()).log()
    labels = (f + noise).argmax(1)  # the class with the largest logit plus Gumbel noise is a draw from the softmax
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
            self.move(x, y, f, gradient, loss)
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

    def output(self, params, x):
        return functional_call(self.model, dict(zip(self.names, params, strict=True)), x)

    def propose(self, x, f, gradient, loss, damping):
        """The step `δ = −α Δ + μ δ₀` that minimizes `½ δᵀ(F + λI)δ + ∇ᵀδ`, and the decrease that this model promises."""
        directions = [self.precondition(gradient, damping)] + ([self.delta] if self.delta else [])
        Jd = [jvp(lambda *params: self.output(params, x), self.params, tuple(d))[1] for d in directions]
        DJd = [curvature_product(self.loss, f, v) / len(x) for v in Jd]
        z, n = [self.centered(d) for d in directions], range(len(directions))
        Q = torch.stack([dot([Jd[i]], [DJd[j]]) + damping * dot(z[i], z[j]) for i in n for j in n])
        slope = torch.stack([dot(gradient, d) for d in directions])
        c = -torch.linalg.solve(Q.view(len(n), len(n)), slope)  # (−α, μ)
        promised = -(slope @ c) / 2
        if promised > loss:  # no step gains so much: go as far as the model promises all of the loss
            c, promised = (1 - (1 - loss / promised).sqrt()) * c, loss
        return combine(c, directions), promised

    def move(self, x, y, f, gradient, loss):
        """Takes the step. The damping follows the ratio of the loss's actual decrease to the promised one."""

        def tried(damping):
            delta, promised = self.propose(x, f, gradient, loss, damping)
            return self.loss(self.output(combine((1, 1), (self.params, delta)), x), y), delta, promised

        typical = self.typical_curvature()
        if self.damping is None:  # the damping whose step lowers the first loss most
            self.damping = min((typical * 10.0**k for k in range(3, -7, -1)), key=lambda damping: tried(damping)[0])
        after, self.delta, promised = tried(self.damping)
        for p, d in zip(self.params, self.delta, strict=True):
            p.add_(d)
        ratio = (loss - after) / promised
        if ratio > 3 / 4 or (ratio > 1 / 4 and self.damping > 10 * typical):
            self.damping = min(self.damping, max(0.8 * self.damping, typical))
        elif ratio < 1 / 4:
            self.damping = min(self.damping / 0.8, max(self.damping, 10 * typical))


def main():
    torch.manual_seed(0)
    angle = 4 * torch.rand(600, dtype=torch.float64)  # three spirals
    y = torch.arange(600) % 3
    turned = 1.5 * angle + y * 2 * torch.pi / 3
    x = angle.unsqueeze(1) * torch.stack([turned.cos(), turned.sin()], 1) + 0.05 * torch.randn(600, 2).double()
    model = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    opt = SimpleKFAC(model, nn.CrossEntropyLoss())
    for step in range(101):
        batch = torch.randint(600, (200,))
        loss = opt.step(x[batch], y[batch])
        if step % 20 == 0:
            print(f"step {step:3}: loss {loss:.2e}")


if __name__ == "__main__":
    main()
