"""The natural gradient in 60 lines of plain PyTorch, with the same steps as `natgrad.NaturalGradient` on a full batch.

`J` is the Jacobian of an example's outputs in all parameters, `D` the Hessian of its loss in the outputs, and
`F = E[Jᵀ D J]` the exact Fisher matrix. docs/recipe.md explains the step: `opt.step(x, y)`, always on the same batch.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap


class SimpleNaturalGradient:
    def __init__(self, model, loss):
        self.model, self.loss, self.damping = model, loss, None

    def output(self, theta, x):
        parts = theta.split([p.numel() for p in self.model.parameters()])
        values = {n: t.view_as(p) for (n, p), t in zip(self.model.named_parameters(), parts, strict=True)}
        return functional_call(self.model, values, x)

    @torch.no_grad()
    def step(self, x, y):
        """One step. Returns the loss before it."""
        theta = nn.utils.parameters_to_vector(self.model.parameters())
        f, J = self.output(theta, x), vmap(jacrev(self.output), (None, 0))(theta, x)  # J: examples, outputs, parameters
        D = vmap(hessian(self.loss))(f, y)
        loss, gradient = self.loss(f, y).item(), torch.einsum("nip,ni->p", J, grad(self.loss)(f, y))
        F = torch.einsum("nip,nij,njq->pq", J, D, J) / len(x)
        typical = F.trace().item() / len(F)

        def propose(damping):
            """`δ = −(F + λI)⁻¹ ∇` minimizes `½ δᵀ(F + λI)δ + ∇ᵀδ`. Also the decrease that this model promises."""
            delta = -torch.linalg.solve(F + damping * torch.eye(len(F)).to(F), gradient)
            promised = -(gradient @ delta).item() / 2
            share = 1 - (1 - loss / promised) ** 0.5 if promised > loss else 1  # no step gains more than the loss
            return share * delta, min(promised, loss)

        def after(delta):
            return self.loss(self.output(theta + delta, x), y).item()

        if self.damping is None:  # take the one whose step lowers the first loss most; stop where two are no better
            grid = [typical * 10.0**k for k in range(3, -7, -1)]
            losses = [after(propose(damping)[0]) for damping in grid]
            stop = next((i for i in range(1, 9) if min(losses[i : i + 2]) >= min(losses[:i])), 10)
            self.damping = grid[losses.index(min(losses[:stop]))]
        for tries in range(1, 9):  # with more damping each time
            delta, promised = propose(self.damping)
            shares = (s for s in (1, 1 / 4, 1 / 16, 1 / 64) if after(s * delta) <= (1.001 * loss if s == 1 else loss))
            share = next(shares, 0)
            ratio = (loss - after(share * delta)) / promised
            if share < 1:
                self.damping = min(self.damping * 4.0 ** (1 if share else tries), max(self.damping, 1000 * typical))
            elif ratio > 3 / 4 or (ratio > 1 / 4 and self.damping > 10 * typical):
                self.damping = min(self.damping, max(self.damping / 5, torch.finfo(F.dtype).eps * F.trace().item()))
            elif ratio < 1 / 4:
                self.damping = min(self.damping * 5, max(self.damping, 10 * typical))
            if share > 0:
                nn.utils.vector_to_parameters(theta + share * delta, self.model.parameters())
                break
        return loss
