"""The calls that users make: `opt.loss` and `opt.predict`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natgrad.capture.eager import not_compiled
from natgrad.checks.values import did_you_mean
from natgrad.optim.tracking.batch import Term
from natgrad.optim.tracking.tracker import Tracker


class Losses:
    """`opt.loss`, for one term or for all terms."""

    def __init__(self, tracker: Tracker, term: Term | None = None):
        self._tracker = tracker
        alone = next(iter(tracker.terms.values())) if len(tracker.terms) == 1 else None
        self._term = term or alone

    @not_compiled
    def __call__(self, output: Any, target: Any) -> Tensor:
        return self._tracker.loss(self._one("opt.loss"), output, target)

    def __getitem__(self, name: str) -> Losses:
        return Losses(self._tracker, self._named(name))

    def _one(self, what: str) -> Term:
        if self._term is None and self._tracker.own:
            raise TypeError(
                f'{what} is not available: this optimizer was made with loss="model" and uses the model\'s own loss. '
                "Expected loss = model(**batch).loss; loss.backward(); opt.step(), with the labels in the batch"
            )
        if self._term is None:
            names = ", ".join(map(repr, self._tracker.terms))
            raise TypeError(f"{what} has several terms, {names}; name the one to use: {what}[name](output, ...)")
        return self._term

    def _named(self, name: str) -> Term:
        terms = self._tracker.terms
        if self._tracker.own:
            self._one("opt.loss")
        if name not in terms:
            if list(terms) == [""]:
                raise KeyError(
                    f"{name!r}: this optimizer has one loss, which has no name; call opt.loss without a name"
                )
            known = ", ".join(map(repr, terms))
            raise KeyError(f"no term is called {name!r}; expected one of {known}{did_you_mean(name, terms)}")
        return terms[name]


class Predictions(Losses):
    """`opt.predict`, for one term or for all terms."""

    @not_compiled
    def __call__(self, output: Any, target: None = None) -> None:  # type: ignore[override]
        self._tracker.predict(self._one("opt.predict"), output)

    def __getitem__(self, name: str) -> Predictions:
        return Predictions(self._tracker, self._named(name))
