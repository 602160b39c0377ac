"""The negative log-likelihood of any distribution in `torch.distributions` as a loss, and its curvature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, TransformedDistribution, Uniform, kl_divergence
from torch.distributions.gumbel import Gumbel
from torch.distributions.transforms import Transform

from natgrad.checks.values import check_choice, described
from natgrad.losses.base import OutputCurvature


class Likelihood(nn.Module):
    """The loss `−log p(target)` of the distribution `p = fn(output)`.

    A batch of outputs gives a batch of distributions of shape `p.batch_shape`, each over events of shape
    `p.event_shape`: `Normal(f, 1)` has a distribution for every entry of `f`, and `Independent(Normal(f, 1), 1)` has
    one for every row.

    Args:
        fn: a function of the model's output (one tensor) that returns a `torch.distributions.Distribution`. Its
            `batch_shape` must start with the examples. It must treat each example separately, and be twice
            differentiable.
        reduction: `"mean"` over the distributions of the batch, or their `"sum"`.

    Call the loss with the output and a target of shape `batch_shape + event_shape`.

    Raises:
        TypeError: if `fn` does not return a distribution.
        ValueError: if the target has another shape (nothing is broadcast), or the reduction is unknown.

    Example:
        >>> import torch, natgrad  # a Gaussian with a learned scale
        >>> from torch.distributions import Normal
        >>> loss = natgrad.losses.Likelihood(lambda f: Normal(f[:, 0], f[:, 1].exp()))
        >>> loss(torch.zeros(5, 2), torch.zeros(5))
        tensor(0.9189)
        >>> data = torch.ones(5, 1), torch.zeros(5)
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> natgrad.fisher(model, loss, data, "dense").to_dense().round(decimals=3).tolist()  # diag(1/σ², 2)
        [[1.0, 0.0], [0.0, 2.0]]
        >>> natgrad.gauss_newton(model, loss, data, "dense").to_dense().round(decimals=3).tolist()  # 2(y − μ)²/σ²
        [[1.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, fn: Callable[[Tensor], Distribution], reduction: str = "mean"):
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        if not callable(fn):
            raise TypeError(
                f"Likelihood: fn is {described(fn)}; expected a function of the output that returns one: "
                "lambda f: Normal(f, 1.0)"
            )
        self.fn, self.reduction = fn, reduction

    def distribution(self, output: Tensor) -> Distribution:
        """`fn(output)`, which has to be a distribution."""
        p = self.fn(output)
        if not isinstance(p, Distribution):
            raise TypeError(
                f"Likelihood: fn returned {described(p)}; expected a torch.distributions.Distribution, such as "
                "Normal(output, 1.0)"
            )
        return p

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """`−log p(target)`, its mean or sum over the distributions."""
        p = self.distribution(output)
        check_target(p, target)
        values = -p.log_prob(target)
        return values.mean() if self.reduction == "mean" else values.sum()


def check_target(p: Distribution, target: Tensor) -> None:
    """Raises ValueError unless the target has one event for each distribution."""
    if target.shape != p.batch_shape + p.event_shape:
        raise ValueError(
            f"Likelihood: fn returned {_described(p)} of batch_shape {tuple(p.batch_shape)} and event_shape "
            f"{tuple(p.event_shape)}, and target has shape {tuple(target.shape)}; expected "
            f"{tuple(p.batch_shape + p.event_shape)} (reshape the target; nothing is broadcast)"
        )


class LikelihoodCurvature(OutputCurvature):
    """`D` is the Hessian at `f₀ = output` of a function of `f` that is a sum over examples.

    For Gauss-Newton this function is `−log p_f(y)` at the targets. For Fisher it is the cross-entropy
    `−Σ_y p_f₀(y) log p_f(y)` if the distribution can enumerate its support, else the divergence `KL(p_f₀ ‖ p_f)` if
    torch has one.
    """

    canonical = False

    def _check(self, output: Tensor, target: Tensor) -> None:
        with torch.no_grad():
            p = self.module.distribution(output)
        check_target(p, target)
        if output.ndim == 0 or p.batch_shape[:1] != output.shape[:1]:
            raise ValueError(
                f"Likelihood: the output has shape {tuple(output.shape)} and fn returned {_described(p)} of "
                f"batch_shape {tuple(p.batch_shape)}; expected both to start with the examples"
            )

    def normalizer(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            return output.new_tensor(self.module.distribution(output).batch_shape.numel())

    def stand_in(self, output: Tensor) -> Tensor:
        with torch.no_grad():
            p = self.module.distribution(output)
        return output.new_zeros(p.batch_shape + p.event_shape)

    def product(self, output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        return self._hessian(output, target)(v)

    def exact_columns(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        columns = []
        for sign, s in self.signed_columns(output, target):
            if sign > 0:
                columns.append(s)
            elif self.kind == "gauss_newton":  # negative eigenvalues of a Fisher information are rounding errors
                raise self.indefinite()
        yield from columns or [torch.zeros_like(output)]

    def signed_columns(self, output: Tensor, target: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Eigenvectors times the square root of `|eigenvalue|`, in float64. Those within rounding errors are left
        out."""
        D = self._blocks(output, target)
        e, U = torch.linalg.eigh(D.double())
        rounding = e.abs().max() * torch.finfo(D.dtype).eps * 8 * len(e[0])
        for k in range(e.shape[1]):
            for sign in (1, -1):
                part = (sign * e[:, k]).clamp_min(0)
                if part.max() > rounding:
                    yield sign, (U[:, :, k] * part.sqrt().unsqueeze(1)).to(output.dtype).view(output.shape)

    def sampled_column(self, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
        with torch.no_grad(), _drawing_from(generator, output.device):
            label = self.module.distribution(output).sample()
        with torch.enable_grad():
            f = output.detach().requires_grad_()
            return self._gradient(-self.module.distribution(f).log_prob(label).sum(), f)

    def _blocks(self, output: Tensor, target: Tensor) -> Tensor:
        """`D` of every example, `(examples, size, size)` for outputs of `size` entries."""
        product = self._hessian(output, target)
        examples, size = len(output), output[0].numel()
        unit = torch.eye(size, dtype=output.dtype, device=output.device)
        rows = [product(row.repeat(examples).view(output.shape)) for row in unit]
        D = torch.stack(rows, 1).view(examples, size, size)
        if not torch.isfinite(D).all():
            raise ValueError(
                "Likelihood: the curvature in the output has entries that are not finite; look for parameters of the "
                "distribution at the edge of what it takes, such as a scale of zero"
            )
        return (D + D.mT) / 2

    def _hessian(self, output: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
        """`v ↦ D v`, by a second backward pass."""
        with torch.enable_grad():
            f = output.detach().requires_grad_()
            gradient = self._gradient(self._function(f, target), f, create_graph=True)

        def product(v: Tensor) -> Tensor:
            if not gradient.requires_grad:  # the function is linear
                return torch.zeros_like(v)
            (Dv,) = torch.autograd.grad(gradient, f, v, retain_graph=True, materialize_grads=True)
            return Dv

        return product

    def _function(self, f: Tensor, target: Tensor) -> Tensor:
        q = self.module.distribution(f)
        if self.kind == "gauss_newton":
            return -q.log_prob(target).sum()
        with torch.no_grad():
            p = self.module.distribution(f.detach())
        # Binomials with different counts cannot be enumerated, but have a divergence.
        with contextlib.suppress(NotImplementedError):
            if p.has_enumerate_support:
                support = p.enumerate_support()
                weight = p.log_prob(support).exp()
                return -torch.where(weight > 0, weight * q.log_prob(support), 0.0).sum()
        if _is_smooth(q):
            with contextlib.suppress(NotImplementedError):
                return kl_divergence(p, q).sum()
        raise ValueError(
            f"the exact Fisher information of {_described(p)} is not known: it has no finite support, and torch no "
            "KL divergence that is twice differentiable here. Use estimator='mc', or natgrad.gauss_newton"
        )

    def _gradient(self, value: Tensor, f: Tensor, create_graph: bool = False) -> Tensor:
        if not value.requires_grad:
            raise ValueError("Likelihood: what fn returned does not depend on its argument; look for a detach()")
        (gradient,) = torch.autograd.grad(value, f, create_graph=create_graph, materialize_grads=True)
        return gradient


def _is_smooth(q: Distribution) -> bool:
    """Whether torch's KL divergence is twice differentiable in what `q` depends on.

    It is not, if a kink or an end of the density depends on the output. It is also wrong for transforms that depend on
    the output, because torch treats them as constant. Gumbel is an exception, because it has its own divergence.
    """
    if isinstance(q, Gumbel):
        return True
    if isinstance(q, Laplace):
        return not _moves(q.loc)
    if isinstance(q, Uniform):
        return not _moves([q.low, q.high])
    if isinstance(q, TransformedDistribution) and _moves(q.transforms):
        return False
    return not hasattr(q, "base_dist") or _is_smooth(q.base_dist)


def _moves(part: Any) -> bool:
    """Whether a tensor, or one within a transform, depends on the output."""
    if isinstance(part, Transform):
        return any(_moves(value) for value in vars(part).values())
    if isinstance(part, (list, tuple)):
        return any(_moves(value) for value in part)
    return isinstance(part, Tensor) and part.requires_grad


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Within this context, torch's global generator is replaced by this one, because distributions accept no generator.
    The given generator advances."""
    if generator is None:
        yield
        return
    if generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, and the output on {device}; expected one device: "
            f"torch.Generator({str(device)!r})"
        )
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        if cuda:
            torch.cuda.set_rng_state(generator.get_state(), device)
        else:
            torch.set_rng_state(generator.get_state())
        yield
        state = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    generator.set_state(state)


def _described(p: Distribution) -> str:
    inner = f" of {_described(p.base_dist)}" if isinstance(p, torch.distributions.Independent) else ""
    return f"a {type(p).__name__}{inner}"
