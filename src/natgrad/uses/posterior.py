"""A Laplace posterior: the Gaussian over a model's weights, its prior, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.replaced import call_with
from natgrad.checks.values import check_count, check_generator, check_number
from natgrad.curvature.problem import Forward, Problem
from natgrad.linalg import Operator
from natgrad.linalg.files import read, save
from natgrad.losses.elementwise import SquaredError
from natgrad.uses.covariance import output_covariance
from natgrad.uses.evidence import Evidence
from natgrad.uses.precision import Matrix, Precision
from natgrad.uses.predictive import (
    Outputs,
    Prediction,
    check_link,
    needs_covariance,
    of_draws,
    predicted,
    probabilities,
)
from natgrad.uses.prior import Precisions, read_precisions
from natgrad.uses.rows import Rows, outputs_problem, rows_of, unit_columns
from natgrad.uses.subset import Fingerprint


class LaplacePosterior:
    """What `natgrad.laplace` returns: the Gaussian over weights, its prior, and predictions under it.

    Predictions are those of the model linearized at its weights, `f(x) + J(x) (θ' − θ)`, whose Gaussian over outputs
    `N(f(x), J P⁻¹ Jᵀ)` is known exactly. `linearized=False` evaluates the network at drawn weights instead, which often
    fits its own data badly (Immer, Korzepa & Bauer 2021).

    Args:
        model: the trained model.
        loss: its loss.
        matrix: the Fisher information of the sum over the data; of `nn.MSELoss`, `JᵀJ`.
        total_loss: the summed loss at the weights; of `nn.MSELoss`, half of it.
        entries: of `nn.MSELoss`, how many entries all targets have.
        forward: as for `natgrad.fisher`.

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
        loss: nn.Module,
        matrix: Operator,
        total_loss: float,
        entries: int = 0,
        forward: Forward | None = None,
    ):
        self.model, self.loss, self.forward = model, loss, forward
        names = list(matrix.space.names or ())
        self._problem = Problem(model, loss, [], params=names)
        self._curvature = self._problem.curvature
        self.weights = {n: p.detach().clone() for n, p in self._problem.parameters.items()}
        self._rest = Fingerprint.of(self._problem.model, names)
        weights = {n: w.to(matrix.dtype) for n, w in self.weights.items()}
        self._evidence = Evidence(Matrix(matrix), weights, total_loss, entries)
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
    def sigma_noise(self) -> float:
        """The standard deviation of targets under `nn.MSELoss`. It can be set."""
        return self._sigma

    @sigma_noise.setter
    def sigma_noise(self, value: float) -> None:
        if not self._has_noise:
            raise ValueError(
                f"sigma_noise is the noise of nn.MSELoss, and the loss is {type(self.loss).__name__}; leave it out"
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
        self._evidence = Evidence(e.matrix, e.weights, e.loss, e.entries, float(value))
        self._forget()

    @property
    def _has_noise(self) -> bool:
        return isinstance(self._curvature, SquaredError)

    def _forget(self) -> None:
        self.__dict__.pop("_posterior", None)

    @cached_property
    def _posterior(self) -> Precision:
        return self._evidence.precision(self._precisions, self._sigma)

    def fit_prior(self, per: str = "one", noise: bool | None = None) -> LaplacePosterior:
        """Sets the prior's precision to that of the largest marginal likelihood, and returns the posterior itself.

        Args:
            per: one precision for all weights (`"one"`), for each `"layer"`, each named `"parameter"`, or each weight
                (`"entry"`). Several in one block of K-FAC with `bias="coupled"` are exact; a large block of EKFAC
                takes one.
            noise: whether to fit `sigma_noise` as well, under `nn.MSELoss`. None: unless it was given.

        Raises:
            ValueError: if the marginal likelihood has no maximum: weights that are all zero, or that the data do not
                depend on.
            RuntimeError: if the iteration does not converge.

        Single weights (`per="entry"`) that are zero, or that the data do not depend on, keep the precision they have.
        """
        fit_noise = self._has_noise and not self._sigma_given if noise is None else noise
        if fit_noise and not self._has_noise:
            raise ValueError(f"noise=True is for nn.MSELoss, and the loss is {type(self.loss).__name__}; leave it out")
        start = self._sigma
        if fit_noise and not self._sigma_given and self._evidence.loss > 0:  # from the residuals' root mean square
            start = (2 * self._evidence.loss / self._evidence.entries) ** 0.5
        self._precisions, self._sigma = self._evidence.maximized(self._precisions, start, per, fit_noise)
        self._forget()
        return self

    def log_marginal_likelihood(
        self,
        prior_precision: float | int | Tensor | Mapping[str, float | int | Tensor] | None = None,
        sigma_noise: float | None = None,
    ) -> Tensor:
        """`log p(data | θ) / T − ½ Σ δ θ² + ½ Σ log δ − ½ log det P`: how well model and prior explain the data.

        Args:
            prior_precision: another than the posterior's own, which stays.
            sigma_noise: likewise.
        """
        if prior_precision is None and sigma_noise is None:
            return self._evidence.value(self._precisions, self._sigma, self._posterior)
        own = self._evidence.matrix.M
        precisions = self._precisions if prior_precision is None else read_precisions(prior_precision, own)
        check_number("sigma_noise", sigma_noise, positive=True, optional=True)
        return self._evidence.value(precisions, self._sigma if sigma_noise is None else sigma_noise)

    @property
    def covariance(self) -> Operator:
        """`P⁻¹`, an operator on the chosen weights."""
        return self._posterior.covariance

    # Predictions --------------------------------------------------------------------------------------------

    def predict(
        self,
        x: Any,
        *,
        link: str | None = None,
        samples: int = 100,
        linearized: bool = True,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> Tensor | Prediction:
        """The prediction at inputs `x`, with the uncertainty of the weights.

        Args:
            x: a batch of inputs, what `model(x)` takes; with a `forward`, a batch that it takes, whose target is not
                looked at.
            link: for probabilities: `"probit"` (the default), `"mc"` (draws of the outputs), `"bridge"` and
                `"bridge_norm"` (the Laplace bridge).
            samples: how many draws `"mc"` and `linearized=False` take.
            linearized: predict with the linearized model; False: with networks of drawn weights.
            batch_size: how many examples of a tensor `x` are worked on at a time.
            generator: the source of the draws.

        Returns:
            The probabilities, in the shape of the output, for `nn.CrossEntropyLoss` and `nn.BCEWithLogitsLoss`; else a
            `Prediction` with `mean`, `variance` (of a target, with the noise) and `functional_variance`.
        """
        check_count("samples", samples, "draws")
        check_generator(generator, self._problem.device)
        link = check_link(self._curvature, link)
        if not linearized:
            drawn = self._network_outputs(x, samples, batch_size, generator)
            return of_draws(self._curvature, drawn, self._sigma)
        diagonal = not needs_covariance(self._curvature, link)
        found = [
            predicted(self._curvature, outputs, link, self._sigma, samples, generator)
            for outputs in self._outputs(x, batch_size, diagonal)
        ]
        if isinstance(found[0], Tensor):
            return torch.cat([p for p in found if isinstance(p, Tensor)])
        parts = [p for p in found if isinstance(p, Prediction)]
        return Prediction(*(torch.cat([getattr(p, w) for p in parts]) for w in Prediction.__dataclass_fields__))

    def functional_variance(self, x: Any, *, diagonal: bool = False, batch_size: int = 256) -> Tensor:
        """`J P⁻¹ Jᵀ`, the covariance of every example's outputs: `(examples, outputs, outputs)`.

        Args:
            x: as for `predict`.
            diagonal: the variances alone, in the shape of the output.
            batch_size: as for `predict`.
        """
        found = self._outputs(x, batch_size, diagonal)
        return torch.cat([outputs.variance if diagonal else outputs.covariance for outputs in found])

    def sample(
        self,
        x: Any,
        n: int = 100,
        *,
        linearized: bool = True,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`n` draws of the prediction, `(n, *output)`, each of one model for all of `x`: probabilities for
        `nn.CrossEntropyLoss` and `nn.BCEWithLogitsLoss`, the model's outputs for other losses.

        Args:
            x, linearized, batch_size, generator: as for `predict`.
            n: how many.
        """
        if not linearized:
            return probabilities(self._curvature, self._network_outputs(x, n, batch_size, generator))
        draws = self._draws(n, generator)
        found = []
        for rows in self._rows(x, batch_size):
            moves = rows.times(draws)
            found.append(rows.output + moves.reshape(n, *rows.output.shape))
        return probabilities(self._curvature, torch.cat(found, 1))

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

    def _outputs(self, x: Any, batch_size: int, diagonal: bool) -> Iterator[Outputs]:
        for rows in self._rows(x, batch_size):
            yield Outputs(rows.output, output_covariance(rows, self._posterior.covariance, diagonal))

    def _rows(self, x: Any, batch_size: int) -> Iterator[Rows]:
        return rows_of(self._at(x, batch_size), unit_columns)

    def _at(self, x: Any, batch_size: int) -> Problem:
        """The model on some inputs, whose weights must be those of the posterior."""
        check_count("batch_size", batch_size, "examples")
        self._check_weights()
        batches = x.split(batch_size) if isinstance(x, Tensor) and x.ndim else [x]
        names = list(self.weights)
        return outputs_problem(self.model, iter(batches), names, self._output, self._evidence.matrix.M.dtype)

    def _output(self, model: Callable[..., Any], batch: Any) -> Tensor:
        output = model(batch) if self.forward is None else self.forward(model, batch)[0]  # type: ignore[arg-type]
        return self._curvature.join(output)

    def _network_outputs(self, x: Any, n: int, batch_size: int, generator: torch.Generator | None) -> Tensor:
        problem, weights = self._at(x, batch_size), self.sample_weights(n, generator)
        found = []
        with torch.no_grad():
            for batch in problem:
                each = []
                for i in range(n):
                    own = {name: w[i] for name, w in weights.items()}

                    def forward(*args: Any, own: dict[str, Tensor] = own, **kwargs: Any) -> Any:
                        return call_with(problem.model, own, args, kwargs)

                    each.append(problem.run(forward, batch)[0])
                found.append(torch.stack(each))
        return torch.cat(found, 1)

    def _check_weights(self) -> None:
        own = self._problem.parameters
        changed = [n for n, w in self.weights.items() if not torch.equal(own[n].detach(), w)]
        changed = changed or self._rest.changes(self._problem.model)
        if changed:
            raise ValueError(
                f"{changed[0]!r} has changed since the posterior was taken, which holds for the model as it was; take "
                "it anew, or load the weights of then"
            )

    # Saving -------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the posterior to a safetensors file, which `LaplacePosterior.load` reads. The model is not in it.

        Raises:
            TypeError: for `structure="implicit"`, which holds the model and data.
        """
        e = self._evidence
        save(
            {
                "laplace": e.matrix.M,
                "precisions": self._precisions,
                "weights": self.weights,
                "numbers": [e.loss, e.entries, e.temperature, self._sigma, self._sigma_given],
                "rest": self._rest.sizes,
                "loss": type(self.loss).__name__,
            },
            path,
        )

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: nn.Module, loss: nn.Module, *, forward: Forward | None = None
    ) -> LaplacePosterior:
        """The posterior that `save` wrote.

        Args:
            path: the file.
            model: the model it was taken of, with the weights of then.
            loss: its loss.
            forward: as for `natgrad.fisher`.

        Raises:
            ValueError: if the file holds no posterior, or is of another model, other weights or another loss.
        """
        state = read(path)
        if not (isinstance(state, dict) and "laplace" in state):
            raise ValueError(f"{path} holds no Laplace posterior; expected a file that LaplacePosterior.save wrote")
        if state["loss"] != type(loss).__name__:
            raise ValueError(f"{path} is of a model under {state['loss']} and loss is {type(loss).__name__}; give that")
        shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        wrong = [n for n, w in state["weights"].items() if shapes.get(n) != w.shape]
        if wrong:
            raise ValueError(
                f"{path} is of another model: {wrong[0]!r}, of shape {tuple(state['weights'][wrong[0]].shape)} there, "
                "is no such parameter of this one; give the model that the posterior was taken of"
            )
        total, entries, temperature, sigma, given = state["numbers"]
        posterior = cls(model, loss, state["laplace"], total, entries, forward)
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
        return f"LaplacePosterior({type(self.loss).__name__}, {size} weights, prior precision {span})"
