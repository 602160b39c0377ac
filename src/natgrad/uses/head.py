"""Each output of a model with its loss: the Gaussian over it under a posterior, and what that predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.checks.replaced import call_with
from natgrad.checks.values import check_count, described, did_you_mean
from natgrad.curvature.problem import Forward, Problem
from natgrad.curvature.terms import entry
from natgrad.linalg import BlockDiagonal
from natgrad.losses.base import OutputCurvature
from natgrad.losses.elementwise import SquaredError
from natgrad.uses.covariance import output_covariance
from natgrad.uses.predictive import (
    Outputs,
    Prediction,
    check_link,
    needs_covariance,
    of_draws,
    predicted,
    probabilities,
)
from natgrad.uses.rows import Rows, outputs_problem, rows_of, unit_columns


@dataclass(frozen=True)
class Head:
    """An output of a model with its loss.

    Args:
        model: the trained model.
        curvature: that of the loss.
        names: the parameters of the posterior.
        forward: `forward(model, batch)[0]` is the output; None: `model(batch)`.
        term: the output's key, if a forward returns several.
        dtype: that of the posterior.
    """

    model: nn.Module
    curvature: OutputCurvature
    names: list[str]
    forward: Forward | None
    term: str | None
    dtype: torch.dtype

    @property
    def has_noise(self) -> bool:
        """Whether targets have a standard deviation that the loss does not know."""
        return isinstance(self.curvature, SquaredError)

    def check_link(self, link: str | None) -> str:
        """The link that holds."""
        return check_link(self.curvature, link)

    def predict(
        self,
        x: Any,
        covariance: BlockDiagonal,
        sigma: float,
        link: str,
        samples: int,
        batch_size: int,
        generator: torch.Generator | None,
    ) -> Tensor | Prediction:
        """The prediction of the linearized model."""
        diagonal = not needs_covariance(self.curvature, link)
        found = [
            predicted(self.curvature, outputs, link, sigma, samples, generator)
            for outputs in self._outputs(x, covariance, batch_size, diagonal)
        ]
        if isinstance(found[0], Tensor):
            return torch.cat([p for p in found if isinstance(p, Tensor)])
        parts = [p for p in found if isinstance(p, Prediction)]
        return Prediction(*(torch.cat([getattr(p, w) for p in parts]) for w in Prediction.__dataclass_fields__))

    def predict_from(self, x: Any, weights: dict[str, Tensor], sigma: float, batch_size: int) -> Tensor | Prediction:
        """The prediction of networks with the given weights, `(n, *shape)` for each parameter."""
        return of_draws(self.curvature, self._network_outputs(x, weights, batch_size), sigma)

    def functional_variance(self, x: Any, covariance: BlockDiagonal, diagonal: bool, batch_size: int) -> Tensor:
        """`J P⁻¹ Jᵀ` of every example, or its diagonal in the shape of the output."""
        found = self._outputs(x, covariance, batch_size, diagonal)
        return torch.cat([outputs.variance if diagonal else outputs.covariance for outputs in found])

    def sample(self, x: Any, draws: dict[str, Tensor], batch_size: int) -> Tensor:
        """Predictions of the linearized model, moved by each of the draws."""
        n, found = len(next(iter(draws.values()))), []
        for rows in self._rows(x, batch_size):
            moves = rows.times(draws)
            found.append(rows.output + moves.reshape(n, *rows.output.shape))
        return probabilities(self.curvature, torch.cat(found, 1))

    def sample_from(self, x: Any, weights: dict[str, Tensor], batch_size: int) -> Tensor:
        """Predictions of networks with the given weights."""
        return probabilities(self.curvature, self._network_outputs(x, weights, batch_size))

    def _outputs(self, x: Any, covariance: BlockDiagonal, batch_size: int, diagonal: bool) -> Iterator[Outputs]:
        for rows in self._rows(x, batch_size):
            yield Outputs(rows.output, output_covariance(rows, covariance, diagonal))

    def _rows(self, x: Any, batch_size: int) -> Iterator[Rows]:
        return rows_of(self._at(x, batch_size), unit_columns)

    def _at(self, x: Any, batch_size: int) -> Problem:
        check_count("batch_size", batch_size, "examples")
        batches = x.split(batch_size) if isinstance(x, Tensor) and x.ndim else [x]
        reached = self.term is not None
        return outputs_problem(self.model, iter(batches), self.names, self._output, self.dtype, reached=reached)

    def _output(self, model: Callable[..., Any], batch: Any) -> Tensor:
        output = model(batch) if self.forward is None else self.forward(model, batch)[0]  # type: ignore[arg-type]
        found = self.curvature.join(output if self.term is None else entry(output, self.term, (self.term,), "outputs"))
        if isinstance(batch, Tensor) and batch.ndim == 1 and found.shape[:1] != batch.shape:
            raise ValueError(
                f"x has shape {tuple(batch.shape)} and the model's output {tuple(found.shape)}; expected a first axis "
                "of examples in both: for one example x.unsqueeze(0)"
            )
        return found

    def _network_outputs(self, x: Any, weights: dict[str, Tensor], batch_size: int) -> Tensor:
        problem, found = self._at(x, batch_size), []
        with torch.no_grad():
            for batch in problem:
                each = []
                for i in range(len(next(iter(weights.values())))):
                    own = {name: w[i] for name, w in weights.items()}

                    def forward(*args: Any, own: dict[str, Tensor] = own, **kwargs: Any) -> Any:
                        return call_with(problem.model, own, args, kwargs)

                    each.append(problem.run(forward, batch)[0])
                found.append(torch.stack(each))
        return torch.cat(found, 1)


class Heads:
    """The heads of a posterior: one without a name, or one for each of several losses, by name."""

    def __init__(self, heads: dict[str | None, Head]):
        self.all = heads
        self.several = None not in heads

    @property
    def has_noise(self) -> bool:
        """Whether there is one loss, whose targets have a noise to be fitted."""
        return not self.several and self.all[None].has_noise

    @property
    def label(self) -> str:
        """The losses, by their names."""
        kinds = {term: type(head.curvature.module).__name__ for term, head in self.all.items()}
        return ", ".join(f"{t!r}: {k}" for t, k in kinds.items()) if self.several else kinds[None]

    def chosen(self, term: str | None) -> dict[str | None, Head]:
        """That of a term, or all."""
        if term is None:
            return self.all
        if not self.several:
            raise ValueError(f"term={term!r} is for several losses, and the posterior is of one; leave it out")
        if term not in self.all:
            known = [t for t in self.all if t is not None]
            raise ValueError(
                f"term={term!r} is unknown; expected one of {', '.join(map(repr, known))}{did_you_mean(term, known)}"
            )
        return {term: self.all[term]}

    def links(self, link: Any, heads: Mapping[str | None, Head]) -> dict[str | None, str]:
        """The link of every head, from a name or, for several, a dictionary of names."""
        if link is None or (len(heads) == 1 and not isinstance(link, Mapping)):
            return {t: head.check_link(link) for t, head in heads.items()}
        if not (self.several and isinstance(link, Mapping)):
            what = "a dictionary by term, such as {'class': 'mc'}" if self.several else "a name, as there is one loss"
            raise ValueError(f"link is {described(link)}; expected {what}")
        if unknown := [t for t in link if t not in self.all]:
            raise ValueError(
                f"link names {unknown[0]!r}, which is no term; expected some of {', '.join(map(repr, self.all))}"
            )
        return {t: head.check_link(link.get(t)) for t, head in heads.items()}

    def of(self, heads: Mapping[str | None, Head], find: Callable[[str | None, Head], Any]) -> Any:
        """What is found for each head, by term; of one loss, or of one term that was asked for, that alone."""
        found = {t: find(t, head) for t, head in heads.items()}
        return found if heads is self.all and self.several else next(iter(found.values()))
