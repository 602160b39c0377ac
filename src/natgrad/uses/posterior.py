"""A Laplace posterior: the Gaussian over a model's weights, its prior, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.entry import entry
from natgrad.checks.values import check_count, check_generator, check_number
from natgrad.curvature.problem import Forward, Problem
from natgrad.curvature.terms import Losses
from natgrad.distributed.placement import unwrapped
from natgrad.linalg import Operator
from natgrad.linalg.files import read, save
from natgrad.uses.evidence import Evidence
from natgrad.uses.head import Head, Heads
from natgrad.uses.precision import Matrix, Precision
from natgrad.uses.predictive import Prediction
from natgrad.uses.prior import Precisions, read_precisions
from natgrad.uses.subset import Fingerprint


class LaplacePosterior:
    """What `natgrad.laplace` returns: the Gaussian over weights, its prior, and predictions under it.

    Predictions use the model linearized at its weights, `f(x) + J(x) (θ' − θ)`. The distribution of its outputs is
    exactly the Gaussian `N(f(x), J P⁻¹ Jᵀ)`. `linearized=False` evaluates the network at drawn weights instead, which
    often fits its own data badly (Immer, Korzepa & Bauer 2021).

    With several losses, `predict`, `functional_variance` and `sample` return a dictionary with an entry for each term.
    With `term=` they return the result for one term.

    Args:
        model: the trained model.
        loss: its loss, or a dictionary of several.
        matrix: the Fisher information of the sum over the data; for `nn.MSELoss`, `JᵀJ`.
        total_loss: the summed loss at the weights; for `nn.MSELoss`, half of it.
        entries: for `nn.MSELoss`, the number of entries of all targets together.
        forward: as for `natgrad.fisher`.
        noises: with several losses, the standard deviation of each `nn.MSELoss`. They are part of the matrix and of the
            loss.
        constant: with several losses, what the noises add to the log-likelihood.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(-1, 1, 30).unsqueeze(1)
        >>> model = torch.nn.Linear(1, 1).eval()
        >>> P = natgrad.laplace(model, torch.nn.MSELoss(), (x, model(x).detach() + 0.1 * torch.randn(30, 1)))
        >>> P = P.fit_prior(per="one")
        >>> round(P.sigma_noise, 2), P.predict(x).mean.shape
        (0.09, torch.Size([30, 1]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Losses,
        matrix: Operator,
        total_loss: float,
        entries: int = 0,
        forward: Forward | None = None,
        noises: Mapping[str, float] | None = None,
        constant: float = 0.0,
    ):
        model, _ = unwrapped(model)  # each rank predicts by itself
        self.model, self.loss, self.forward = model, loss, forward
        names = list(matrix.space.names or ())
        self._noises = dict(noises or {})
        heads: dict[str | None, Head] = {}
        for term, one in loss.items() if isinstance(loss, Mapping) else [(None, loss)]:
            self._problem = Problem(model, one, [], params=names)
            heads[term] = Head(model, self._problem.curvature, names, forward, term, matrix.dtype)
        self._heads = Heads(heads)
        self.weights = {n: p.detach().clone() for n, p in self._problem.parameters.items()}
        self._rest = Fingerprint.of(self._problem.model, names)
        weights = {n: w.to(matrix.dtype) for n, w in self.weights.items()}
        self._evidence = Evidence(Matrix(matrix), weights, total_loss, entries, constant=constant)
        self._precisions = read_precisions(1.0, matrix)
        self._sigma, self._sigma_given = 1.0, False

    # The prior, and how well it fits ------------------------------------------------------------------------

    @property
    def prior_precision(self) -> Precisions:
        """`δ` by parameter, a number or a tensor of the parameter's shape each. Set it as in `natgrad.laplace`."""
        return dict(self._precisions)

    @prior_precision.setter
    def prior_precision(self, value: float | int | Tensor | Mapping[str, float | int | Tensor]) -> None:
        self._precisions = read_precisions(value, self._evidence.matrix.M)
        self._forget()

    @property
    def sigma_noise(self) -> float | dict[str, float]:
        """The standard deviation of targets under `nn.MSELoss`. It can be set. With several losses: of each such term;
        they are part of the matrix."""
        return dict(self._noises) if self._heads.several else self._sigma

    @sigma_noise.setter
    def sigma_noise(self, value: float | int) -> None:
        if self._heads.several:
            raise ValueError(
                "sigma_noise cannot be set with several losses, because the matrix depends on the noises; pass "
                "sigma_noise={...} to natgrad.laplace"
            )
        if not self._heads.has_noise:
            raise ValueError(
                f"sigma_noise is the noise of nn.MSELoss, and the loss is {self._heads.label}; leave it out"
            )
        check_number("sigma_noise", value, positive=True)
        self._sigma, self._sigma_given = float(value), True
        self._forget()

    @property
    def temperature(self) -> float:
        """`T`, which the Fisher information is divided by. It can be set."""
        return self._evidence.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_number("temperature", value, positive=True)
        e = self._evidence
        self._evidence = replace(e, temperature=float(value))
        self._forget()

    def _forget(self) -> None:
        self.__dict__.pop("_posterior", None)

    @cached_property
    def _posterior(self) -> Precision:
        return self._evidence.precision(self._precisions, self._sigma)

    @entry
    def fit_prior(self, per: str = "one", noise: bool | None = None) -> LaplacePosterior:
        """Sets the prior's precision to the value that maximizes the marginal likelihood, and returns the posterior
        itself.

        Args:
            per: one precision for all weights (`"one"`), for each `"layer"`, for each named `"parameter"`, or for each
                weight (`"entry"`). A K-FAC block with `bias="coupled"` may have several precisions, without
                approximation. A large EKFAC block may have only one.
            noise: whether to fit `sigma_noise` of `nn.MSELoss` as well. None: yes, if there is only one loss and you
                did not give `sigma_noise`.

        Raises:
            ValueError: if the marginal likelihood has no maximum, because weights are all zero or do not affect the
                outputs on the data.
            RuntimeError: if the iteration does not converge.

        With `per="entry"`, weights that are zero or do not affect the outputs on the data keep their present precision.
        """
        fit_noise = self._heads.has_noise and not self._sigma_given if noise is None else noise
        if fit_noise and self._heads.several:
            raise ValueError(
                "noise=True is for one loss: with several losses the matrix depends on their noises; pass "
                "sigma_noise={...} to natgrad.laplace"
            )
        if fit_noise and not self._heads.has_noise:
            raise ValueError(f"noise=True is for nn.MSELoss, and the loss is {self._heads.label}; leave it out")
        start = self._sigma
        if fit_noise and not self._sigma_given and self._evidence.loss > 0:  # from the residuals' root mean square
            start = (2 * self._evidence.loss / self._evidence.entries) ** 0.5
        self._precisions, self._sigma = self._evidence.maximized(self._precisions, start, per, fit_noise)
        self._forget()
        return self

    @entry
    def log_marginal_likelihood(
        self,
        prior_precision: float | int | Tensor | Mapping[str, float | int | Tensor] | None = None,
        sigma_noise: float | None = None,
    ) -> Tensor:
        """`log p(data | θ) / T − ½ Σ δ θ² + ½ Σ log δ − ½ log det P`: how well model and prior explain the data.

        Args:
            prior_precision: a value to use instead of the posterior's own, which does not change.
            sigma_noise: likewise.
        """
        if prior_precision is None and sigma_noise is None:
            return self._evidence.value(self._precisions, self._sigma, self._posterior)
        own = self._evidence.matrix.M
        precisions = self._precisions if prior_precision is None else read_precisions(prior_precision, own)
        check_number("sigma_noise", sigma_noise, positive=True, optional=True)
        if sigma_noise is not None and not self._heads.has_noise:
            raise ValueError(
                f"sigma_noise is the noise of one nn.MSELoss, and the loss is {self._heads.label}; leave it out"
            )
        return self._evidence.value(precisions, self._sigma if sigma_noise is None else sigma_noise)

    @property
    def covariance(self) -> Operator:
        """`P⁻¹`, an operator on the chosen weights."""
        return self._posterior.covariance

    # Predictions --------------------------------------------------------------------------------------------

    @entry
    def predict(
        self,
        x: Any,
        *,
        link: str | Mapping[str, str] | None = None,
        samples: int = 100,
        linearized: bool = True,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
        term: str | None = None,
    ) -> Any:
        """The prediction at inputs `x`, with the uncertainty of the weights.

        Args:
            x: a batch of inputs for `model(x)`. With a `forward`, a batch for `forward`; its target is not used.
            link: for probabilities: `"probit"` (the default), `"mc"` (draws of the outputs), `"bridge"` and
                `"bridge_norm"` (the Laplace bridge). With several losses a dictionary.
            samples: the number of draws for `"mc"` and `linearized=False`.
            linearized: True predicts with the linearized model, False with the network itself at drawn weights.
            batch_size: how many examples of a tensor `x` are processed at a time.
            generator: the source of the draws.
            term: with several losses, the one to predict for. None: all of them.

        Returns:
            The probabilities, in the shape of the output, for `nn.CrossEntropyLoss` and `nn.BCEWithLogitsLoss`; else a
            `Prediction` with `mean`, `variance` (of a target, with the noise) and `functional_variance`. With several
            losses a dictionary of these.
        """
        check_count("samples", samples, "draws")
        check_generator(generator, self._problem.device)
        heads = self._heads.chosen(term)
        links = self._heads.links(link, heads)
        self._check_weights()
        if not linearized:
            drawn = self.sample_weights(samples, generator)
            return self._heads.of(heads, lambda t, head: head.predict_from(x, drawn, self._noise(t), batch_size))
        sigma = self._posterior.covariance

        def of(t: str | None, head: Head) -> Tensor | Prediction:
            return head.predict(x, sigma, self._noise(t), links[t], samples, batch_size, generator)

        return self._heads.of(heads, of)

    @entry
    def functional_variance(
        self, x: Any, *, diagonal: bool = False, batch_size: int = 256, term: str | None = None
    ) -> Any:
        """`J P⁻¹ Jᵀ`, the covariance of every example's outputs: `(examples, outputs, outputs)`.

        Args:
            x, term: as for `predict`.
            diagonal: return only the variances, in the shape of the output.
            batch_size: as for `predict`.
        """
        heads = self._heads.chosen(term)
        self._check_weights()
        sigma = self._posterior.covariance
        return self._heads.of(heads, lambda t, head: head.functional_variance(x, sigma, diagonal, batch_size))

    @entry
    def sample(
        self,
        x: Any,
        n: int = 100,
        *,
        linearized: bool = True,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
        term: str | None = None,
    ) -> Any:
        """`n` draws of the prediction, `(n, *output)`. Each draw is one model, for all of `x` and for all losses. The
        draws are probabilities for `nn.CrossEntropyLoss` and `nn.BCEWithLogitsLoss`, and the model's outputs for other
        losses.

        Args:
            x, linearized, batch_size, generator, term: as for `predict`.
            n: how many.
        """
        heads = self._heads.chosen(term)
        self._check_weights()
        if not linearized:
            weights = self.sample_weights(n, generator)
            return self._heads.of(heads, lambda t, head: head.sample_from(x, weights, batch_size))
        draws = self._draws(n, generator)
        return self._heads.of(heads, lambda t, head: head.sample(x, draws, batch_size))

    def sample_weights(self, n: int = 100, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """`n` draws of the weights, `(n, *shape)` for each parameter: what `torch.func.functional_call` takes under
        `torch.vmap`.

        Args:
            n: how many.
            generator: the source of the draws.
        """
        return {name: self.weights[name] + d.to(self.weights[name]) for name, d in self._draws(n, generator).items()}

    def _draws(self, n: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        check_count("n", n, "draws")
        check_generator(generator, self._problem.device)
        return self._posterior.sample(n, generator)

    def _noise(self, term: str | None) -> float:
        return self._sigma if term is None else self._noises.get(term, 1.0)

    def _check_weights(self) -> None:
        own = self._problem.parameters
        changed = [n for n, w in self.weights.items() if not torch.equal(own[n].detach(), w)]
        changed = changed or self._rest.changes(self._problem.model)
        if changed:
            raise ValueError(
                f"{changed[0]!r} has changed since the posterior was computed; compute it again, or load the "
                "earlier weights"
            )

    # Saving -------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the posterior to a safetensors file, which `LaplacePosterior.load` reads. The model is not in it.

        Raises:
            TypeError: for `structure="implicit"`, which refers to the model and the data.
        """
        e = self._evidence
        save(
            {
                "laplace": e.matrix.M,
                "precisions": self._precisions,
                "weights": self.weights,
                "numbers": [e.loss, e.entries, e.temperature, self._sigma, self._sigma_given],
                "rest": self._rest.sizes,
                "loss": self._heads.label,
                "noises": self._noises,
                "constant": e.constant,
            },
            path,
        )

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: nn.Module, loss: Losses, *, forward: Forward | None = None
    ) -> LaplacePosterior:
        """The posterior that `save` wrote.

        Args:
            path: the file.
            model: the model that the posterior was computed for, with the same weights.
            loss: the loss or losses of the model.
            forward: as for `natgrad.fisher`.

        Raises:
            ValueError: if the file contains no posterior, or if it belongs to another model, other weights or another
                loss.
        """
        state = read(path)
        if not (isinstance(state, dict) and "laplace" in state):
            raise ValueError(f"{path} holds no Laplace posterior; expected a file that LaplacePosterior.save wrote")
        shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        wrong = [n for n, w in state["weights"].items() if shapes.get(n) != w.shape]
        if wrong:
            raise ValueError(
                f"{path} is for another model: its {wrong[0]!r} of shape {tuple(state['weights'][wrong[0]].shape)} is "
                "not a parameter of this one; give the model that the posterior was computed for"
            )
        total, entries, temperature, sigma, given = state["numbers"]
        noises, constant = state.get("noises", {}), state.get("constant", 0.0)
        posterior = cls(model, loss, state["laplace"], total, entries, forward, noises, constant)
        if state["loss"] != posterior._heads.label:
            raise ValueError(
                f"{path} is for the loss {state['loss']}, but loss is {posterior._heads.label}; pass that of the file"
            )
        posterior.weights, posterior._rest = state["weights"], Fingerprint(state["rest"])
        posterior._check_weights()
        posterior.temperature = temperature
        posterior._precisions, posterior._sigma, posterior._sigma_given = state["precisions"], sigma, given
        return posterior

    def __repr__(self) -> str:
        deltas = torch.stack([d.log().mean() for d in self._precisions.values()])
        span = f"{float(deltas.min().exp()):.3g}" + (
            f" to {float(deltas.max().exp()):.3g}" if deltas.max() - deltas.min() > 1e-6 else ""
        )
        size = self._evidence.matrix.M.space.size
        return f"LaplacePosterior({self._heads.label}, {size} weights, prior precision {span})"
