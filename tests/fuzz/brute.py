"""What a case's matrices are, by autograd's rows alone."""

import torch
from torch import nn

from architectures import TOKENS, Network, Spec

f64 = torch.float64


class Case:
    """The model, the loss and the data of a spec, and its matrix by brute force in float64."""

    def __init__(self, spec: Spec):
        self.spec = spec
        torch.manual_seed(spec.seed)
        self.model = Network(spec).to(f64).train(spec.training)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.2 * torch.randn_like(p))
            for b in self.model.buffers():
                if b.is_floating_point():
                    b.add_(0.5 * torch.rand_like(b))
        self.loss = self._loss()
        self.batches = [self._batch(n) for n in spec.sizes]
        self.names = self._names()

    def _loss(self):
        reduction, C = self.spec.reduction, self.spec.classes
        return {
            "cross entropy": lambda: nn.CrossEntropyLoss(reduction=reduction),
            "weighted": lambda: nn.CrossEntropyLoss(
                weight=torch.linspace(0.5, 2, C, dtype=f64), label_smoothing=0.1, ignore_index=1, reduction=reduction
            ),
            "squared error": lambda: nn.MSELoss(reduction=reduction),
            "logistic": lambda: nn.BCEWithLogitsLoss(
                pos_weight=torch.linspace(0.5, 2, C, dtype=f64), reduction=reduction
            ),
            "poisson": lambda: nn.PoissonNLLLoss(reduction=reduction),
        }[self.spec.loss]()

    def _batch(self, n):
        spec = self.spec
        if spec.source == "numbers":
            x = torch.randn(n, spec.length, 3, dtype=f64)
        else:
            x = torch.randint(TOKENS, (n, spec.length))
        shape = {
            "pooled": (n, spec.classes),
            "last": (n, spec.classes),
            "positions": (n, spec.classes, spec.length),
            "flattened": (n * spec.length, spec.classes),
        }[spec.shape]
        if spec.loss in ("cross entropy", "weighted"):
            y = torch.randint(spec.classes, (shape[0], *shape[2:]))
            y.view(-1)[0] = 0  # not all ignored
        else:
            y = torch.rand(shape, dtype=f64)
            y = (y > 0.5).to(f64) if spec.loss == "logistic" else (4 * y).round() if spec.loss == "poisson" else y
        return x, y

    def _names(self):
        names = [n for n, _ in self.model.named_parameters()]
        kept = [n for n in names if torch.rand(()) < self.spec.params]
        return kept or names[-1:]

    @property
    def data(self):
        if self.spec.form == "dictionaries":
            return [{"x": x, "y": y} for x, y in self.batches]
        return self.batches[0] if len(self.batches) == 1 and self.spec.form == "pair" else self.batches

    @property
    def options(self):
        options = {"estimator": self.spec.estimator, "params": self.names}
        if self.spec.form == "dictionaries":
            options["forward"] = lambda model, batch: (model(batch["x"]), batch["y"])
        return options

    # Brute force -------------------------------------------------------------------------------------------

    def summed(self, output, y):
        """The loss's sum."""
        reduction, self.loss.reduction = self.loss.reduction, "sum"
        value = self.loss(output, y)
        self.loss.reduction = reduction
        return value

    def dense(self):
        """`Σ Jᵀ D J`, or `Σ` of the rows' own gradients' outer products, over what the loss's mean divides by."""
        owned = dict(self.model.named_parameters())
        leaves = [owned[n] for n in self.names]
        size = sum(p.numel() for p in leaves)
        G, mass = torch.zeros(size, size, dtype=f64), 0.0
        buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        for x, y in self.batches:
            output = self.model(x)
            if self.spec.estimator == "empirical":
                for i in range(len(output)):
                    S = gradient(self.summed(output[i : i + 1], y[i : i + 1]), leaves)
                    G += torch.outer(S, S)
            else:
                J = torch.stack([gradient(f, leaves) for f in output.flatten()])
                H = torch.autograd.functional.hessian(lambda f, y=y: self.summed(f, y), output.detach())
                G += J.T @ H.reshape(len(J), len(J)) @ J
            mean, self.loss.reduction = self.loss.reduction, "mean"
            mass += (self.summed(output, y) / self.loss(output, y)).item()
            self.loss.reduction = mean
            for n, b in self.model.named_buffers():
                b.copy_(buffers[n])
        return G / mass if self.spec.reduction == "mean" else G

    def places(self, names):
        """Where these parameters' entries are in the dense matrix."""
        owned = dict(self.model.named_parameters())
        sizes = [owned[n].numel() for n in self.names]
        index = dict(zip(self.names, torch.arange(sum(sizes)).split(sizes), strict=True))
        return torch.cat([index[n] for n in names])


def gradient(value, leaves):
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, leaves, strict=True)])
