"""K-FAC from its formulas, dense and slow: a reference for training loops of any kind.

It sees no forward of the user's. Every batch is given to it with the factor that its loss has in the gradients, and it
runs the model again, layer by layer.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jvp


@dataclass
class Part:
    """A batch: the seed of its forward's random numbers, the factor of its loss in the gradients, the loss."""

    x: torch.Tensor
    y: torch.Tensor
    seed: int
    factor: float
    value: float
    statistics: dict


class SlowKfac:
    def __init__(self, model, loss, options):
        self.model, self.loss, self.options = model, loss, options
        self.params = dict(model.named_parameters())
        self.linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.steps = self.age = 0
        self.averages, self.blocks, self.buffers, self.delta = {}, None, {}, {}
        self.last, self.wanted, self.frozen = None, False, self.frozen_now()

    def frozen_now(self):
        return {n for n, p in self.params.items() if not p.requires_grad}

    def output(self, x, seed, params=None):
        torch.manual_seed(seed)
        return functional_call(self.model, {**self.params, **(params or {})}, (x,))

    def curvature(self, f):
        """`D` of each example: the Hessian of its mean loss in its outputs, whatever the reduction."""
        if isinstance(self.loss, nn.MSELoss):
            return (2 / f.shape[1] * torch.eye(f.shape[1]).to(f)).expand(len(f), -1, -1)
        p = f.softmax(1)
        return torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)

    def in_means(self, part):
        """The factor of the batch's mean loss in the gradients."""
        count = part.y.numel() if self.loss.reduction == "sum" else 1
        return part.factor * count

    def part(self, x, y, seed, factor, value):
        """The batch's `Σ x xᵀ`, `Σ Jᵀ D J` and number of examples, of each layer by its trainable parameters."""
        torch.manual_seed(seed)
        f, hs, outputs = x.clone().requires_grad_(), [], []
        for module in self.model:
            h, f = f, module(f)
            if isinstance(module, nn.Linear):
                hs.append(torch.cat([h.detach(), torch.ones(len(h), 1).to(h)], 1))
                outputs.append(f)
        C, D = f.shape[1], self.curvature(f.detach())
        J = [torch.autograd.grad(f[:, c].sum(), outputs, retain_graph=True) for c in range(C)]
        found = {}
        for i, name in enumerate(self.linear):
            names = tuple(n for n in (f"{name}.weight", f"{name}.bias") if n in self.params)
            names = tuple(n for n in names if self.params[n].requires_grad)
            g = torch.stack([J[c][i] for c in range(C)], 1)
            B = torch.einsum("nci,ncd,ndj->ij", g, D, g).contiguous()
            if names:
                found[names] = (hs[i].mT @ hs[i], B, len(x))
        return Part(x, y, seed, factor, value, found)

    def due(self):
        return self.last is None or self.wanted or self.steps - self.last >= self.options["statistics_every"]

    def step(self, parts):
        """One step from the gradients in the model. Returns whether it was taken."""
        taken = self.attempt(parts)
        self.steps += 1
        if not taken:
            self.age = self.options["inverses_every"]
        return taken

    def attempt(self, parts):
        own, eta = self.options, self.options["weight_decay"]
        each = [self.in_means(part) for part in parts]
        scale = sum(each)
        if not all(torch.isfinite(torch.tensor(p.value)) for p in parts):
            return False
        eta, weights = eta / scale, [w / scale for w in each]
        gradients = {n: p.grad / scale for n, p in self.params.items() if p.grad is not None and p.requires_grad}
        waiting = self.take_in(parts, gradients)
        moving = [n for n in self.moving(gradients) if n not in waiting]
        g = {n: gradients.get(n, torch.zeros_like(self.params[n])) + eta * self.params[n] for n in moving}
        if not all(torch.isfinite(t).all() for t in g.values()):
            return False
        if not g or (own["lr"] is None and not any(t.any() for t in g.values())):
            return True
        if self.blocks is None or self.age >= own["inverses_every"]:
            self.blocks, self.age = {n: self.block(n, s, eta) for n, s in self.left().items()}, 0
        self.age += 1
        if own["lr"] is not None:
            for n in g:
                self.buffers[n] = own["momentum"] * self.buffers[n] + g[n] if n in self.buffers else g[n]
            step = {n: -own["lr"] * d for n, d in self.direction({n: self.buffers[n] for n in g}).items()}
        else:
            step = self.adaptive(g, parts, weights, eta)
        for n, d in step.items():
            self.params[n].add_(d)
            self.delta[n] = d
        return True

    def take_in(self, parts, gradients):
        """Moving averages of the sums. Returns the parameters that have none yet."""
        new = {}
        for part in parts if self.due() else ():
            for names, sums in part.statistics.items():
                new[names] = tuple(map(sum, zip(new[names], sums, strict=True))) if names in new else sums
        known, frozen = set(self.averages), self.frozen_now()
        for names in list(self.averages):  # of parameters that are in other layers now
            if any(set(names) & set(others) and names != others for others in new):
                del self.averages[names]
        for names, sums in new.items():
            if names in self.averages:
                sums = tuple(self.options["decay"] * s + t for s, t in zip(self.averages[names], sums, strict=True))
            self.averages[names] = sums
        if new:
            self.last, self.wanted = self.steps, False
        if not known.issuperset(self.averages) or frozen != self.frozen:
            self.age = self.options["inverses_every"]
        self.frozen = frozen
        missing = {n for n in gradients if not any(n in names for names in self.averages)}
        self.wanted |= any(gradients[n].any() for n in missing)
        return missing

    def left(self):
        """The averages by the parameters that are not frozen."""
        left = {tuple(n for n in names if n not in self.frozen): sums for names, sums in self.averages.items()}
        return {names: sums for names, sums in left.items() if names}

    def moving(self, gradients):
        partners = {n for names in self.left() if any(n in gradients for n in names) for n in names}
        return [n for n in self.params if n in gradients or n in partners]

    def block(self, names, sums, eta):
        """The damped block's inverse, and `T`, by which the damped coordinates come from the parameters."""
        xx, gg, count = sums
        damping, style = self.options["damping"] + eta, self.options["damping_style"]
        A, B = xx / count, gg / count
        eye = torch.eye(len(B)).to(B)

        def kron(A):
            if style == "exact":
                damped = torch.kron(B, A)
                return torch.linalg.inv(damped + damping * torch.eye(len(damped)).to(B))
            pi, root = (A.diagonal().mean() / B.diagonal().mean()).sqrt(), damping**0.5
            return torch.kron(
                torch.linalg.inv(B + root / pi * eye), torch.linalg.inv(A + pi * root * torch.eye(len(A)).to(A))
            )

        if names[0].endswith("bias"):
            return torch.linalg.inv(B + damping * eye), None
        if len(names) == 1:
            return kron(A[:-1, :-1]), None
        d_out, d_in = len(B), len(A) - 1
        if not self.options["centered"]:
            rows = torch.arange(d_out * (d_in + 1)).view(d_out, d_in + 1)
            order = torch.cat([rows[:, :-1].flatten(), rows[:, -1]])
            return kron(A)[order][:, order], None
        m = A[-1, :-1]
        K = torch.block_diag(kron(A[:-1, :-1] - torch.outer(m, m)), torch.linalg.inv(B + damping * eye))
        T = torch.eye(len(K)).to(K)
        T[d_out * d_in :, : d_out * d_in] = torch.kron(eye, m.unsqueeze(0))
        T_inverse = 2 * torch.eye(len(K)).to(K) - T
        return T_inverse @ K @ T_inverse.mT, T

    def flat(self, v, names):
        return torch.cat([v[n].flatten() for n in names])

    def direction(self, v):
        out = {}
        for names, (inverse, _) in self.blocks.items():
            if all(n in v for n in names):
                solved = (inverse @ self.flat(v, names)).split([v[n].numel() for n in names])
                out |= {n: d.view_as(v[n]) for n, d in zip(names, solved, strict=True)}
        return out

    def adaptive(self, g, parts, weights, eta):
        """`−α Δ + μ δ` of the quadratic model of the whole objective."""
        directions = [self.direction(g)]
        if directions[0] and all(n in self.delta for n in directions[0]):
            directions.append({n: self.delta[n] for n in directions[0]})
        k = len(directions)
        Q = torch.zeros(k, k, dtype=torch.float64)
        loss = 0.5 * eta * sum(p.square().sum() for p in self.params.values())
        for part, weight in zip(parts, weights, strict=True):
            pushed = []
            for d in directions:
                at = tuple(self.params[n].detach() for n in d)
                run = lambda *ps, d=d, part=part: self.output(part.x, part.seed, dict(zip(d, ps, strict=True)))  # noqa: E731
                f, Jd = jvp(run, at, tuple(d.values()))
                pushed.append(Jd)
            rows = torch.stack(pushed)
            Q += weight / len(f) * torch.einsum("inc,ncd,jnd->ij", rows, self.curvature(f), rows)
            loss = loss + weight * type(self.loss)()(f, part.y)
        damped = [{n: d[n].clone() for n in d} for d in directions]
        for names, (_, T) in self.blocks.items():
            for z in damped if T is not None and all(n in directions[0] for n in names) else ():
                moved = (T @ self.flat(z, names)).split([z[n].numel() for n in names])
                z.update({n: t.view_as(z[n]) for n, t in zip(names, moved, strict=True)})
        for i in range(k):
            for j in range(k):
                Q[i, j] += self.options["damping"] * sum((damped[i][n] * damped[j][n]).sum() for n in damped[0])
                Q[i, j] += eta * sum((directions[i][n] * directions[j][n]).sum() for n in damped[0])
        slope = torch.stack([sum((g[n] * d[n]).sum() for n in d) for d in directions])
        if k == 2 and abs(Q[0, 1]) > (1 - 1e-6) * (Q[0, 0] * Q[1, 1]).sqrt():  # parallel
            Q, slope, directions = Q[:1, :1], slope[:1], directions[:1]
        c = -torch.linalg.solve(Q, slope)
        promised = -0.5 * slope @ c
        if promised > loss:
            c = (1 - (1 - loss / promised).sqrt()) * c
        return {n: sum(a * d[n] for a, d in zip(c, directions, strict=True)) for n in directions[0]}
