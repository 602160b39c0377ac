"""The natural gradient in 66 lines of plain PyTorch, with the same steps as `natgrad.NaturalGradient` on a full batch.

`J` is the Jacobian of an example's outputs in all parameters, `D` the Hessian of its loss in the outputs, and
`F = E[Jᵀ D J]` the exact Fisher matrix. docs/recipe.md explains the step: `opt.step(x, y)`, always on the same batch.
"""

import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap


class SimpleNaturalGradient:
    def __init__(self, model, loss, momentum=0.8):
        self.model, self.loss, self.momentum = model, loss, momentum
        self.damping, self.delta = None, 0.0

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
        scale = (F.diagonal() / F.diagonal().mean()).clamp_min(1e-6).sqrt()  # the diagonal of M
        typical = F.trace().item() / min(len(F), f.numel())  # the mean of the eigenvalues that are not zero

        def propose(damping, momentum):
            """`δ = −(F + λM)⁻¹ (∇ − λ μ M δ₋)`, with its acceleration. Also the decrease that the model promises."""
            damped = F + damping * scale.diag()
            delta = -torch.linalg.solve(damped, gradient - damping * momentum * scale * self.delta)
            slope, half = -(gradient @ delta).item(), (delta @ F @ delta).item() / 2
            root = max(0.0, slope**2 - 4 * half * loss) ** 0.5
            share = 2 * loss / (slope + root) if slope - half > loss else 1.0  # no step gains more than the loss
            delta = share * delta
            bend = 200 * (self.output(theta + 0.1 * delta, x) - f - 0.1 * J @ delta)  # d²f along the step
            a = -torch.linalg.solve(damped, torch.einsum("nip,nij,nj->p", J, D, bend)) / (2 * len(x))
            return delta + a * min(1.0, (0.375 * delta.norm() / a.norm()).item()), share * slope - share**2 * half

        def after(delta):
            return self.loss(self.output(theta + delta, x), y).item()

        if self.damping is None:  # take the one whose step lowers the first loss most; stop where two are no better
            grid = [typical * 10.0**k for k in range(3, -7, -1)]
            losses = [after(propose(damping, 0)[0]) for damping in grid]
            stop = next((i for i in range(1, 9) if min(losses[i : i + 2]) >= min(losses[:i])), 10)
            self.damping = grid[losses.index(min(losses[:stop]))]
        for tries in range(1, 13):  # with more damping each time, and without momentum in the end
            delta, promised = propose(self.damping, self.momentum if tries <= 3 else 0)
            ratio, most = (loss - after(delta)) / promised, max(self.damping, 1e5 * typical)
            if after(delta) <= 1.001 * loss:
                if ratio > 1 / 2:
                    least = torch.finfo(F.dtype).eps * len(F) * typical
                    self.damping = min(self.damping, max(0.3 * self.damping, least))
                elif ratio <= 0:
                    self.damping = min(self.damping / 0.3, most)
                nn.utils.vector_to_parameters(theta + delta, self.model.parameters())
                self.delta = delta
                break
            self.damping = min(self.damping * 2.0**tries, most)
        return loss
