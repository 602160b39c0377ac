"""What users call: `opt.loss` and `opt.predict`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natgrad.checks.values import did_you_mean
from natgrad.optim.tracking.batch import Term
from natgrad.optim.tracking.tracker import Tracker


class Losses:
    """`opt.loss`: the loss module's value on what the model returned, noted for the step.

        loss = opt.loss(output, target)                # of an optimizer of one loss
        loss = opt.loss["box"](output, target)         # of one made with several, by its name

    `output` is a tensor that a forward of the model in training mode has returned since the last step (also one in an
    object or a dictionary), a view of it, or all that was returned where the optimizer has an `output=`. Losses may be
    of one forward or of several. Backward from them, scaled or summed as you like, then call `step`.

    Raises:
        KeyError: for a term that there is not.
        RuntimeError: if no forward in training mode with gradients enabled came before, or it has not returned.
        ValueError: if output and target do not fit the loss, or the batch is empty (on all of several ranks).
        NotImplementedError: if the output depends on a parameter in a way that no layer kind covers; it is named.
    """

    def __init__(self, tracker: Tracker, term: Term | None = None):
        self._tracker = tracker
        alone = next(iter(tracker.terms.values())) if len(tracker.terms) == 1 else None
        self._term = term or alone

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        return self._tracker.loss(self._one("opt.loss"), output, target)

    def __getitem__(self, name: str) -> Losses:
        return Losses(self._tracker, self._named(name))

    def _one(self, what: str) -> Term:
        if self._term is None and self._tracker.own:
            raise TypeError(
                f'{what} is not for an optimizer of the loss "model", which is the model\'s own: expected loss = '
                "model(**batch).loss; loss.backward(); opt.step(), with the labels in the batch"
            )
        if self._term is None:
            names = ", ".join(map(repr, self._tracker.terms))
            raise TypeError(
                f"{what} has several terms, {names}; expected the one that is meant: {what}[name](output, ...)"
            )
        return self._term

    def _named(self, name: str) -> Term:
        terms = self._tracker.terms
        if self._tracker.own:
            self._one("opt.loss")
        if name not in terms:
            if list(terms) == [""]:
                raise KeyError(f"{name!r}: this optimizer has one loss, without a name; call it without one")
            known = ", ".join(map(repr, terms))
            raise KeyError(f"no term is called {name!r}; expected one of {known}{did_you_mean(name, terms)}")
        return terms[name]


class Predictions(Losses):
    """`opt.predict`: the curvature of a predictive distribution; the gradient comes from a loss of the user's own.

        logits = model(observations)
        opt.predict(logits)                             # with several terms: opt.predict["policy"](logits)
        (-advantages * logits.log_softmax(1)[range(n), actions]).mean().backward()
        opt.step()

    The distribution is that of the optimizer's loss: softmax for `nn.CrossEntropyLoss`, a Gaussian for `nn.MSELoss`,
    any other by `natgrad.losses.Likelihood`. No loss measures such a step. So give the optimizer `lr`, or `max_kl`: the
    step goes to that bound, as in TRPO. Without a number for `damping`, it is the curvature's own scale.

    Raises:
        TypeError: if the loss's curvature depends on targets.
        RuntimeError, NotImplementedError: as `opt.loss` does.
    """

    def __call__(self, output: Any, target: None = None) -> None:  # type: ignore[override]
        self._tracker.predict(self._one("opt.predict"), output)

    def __getitem__(self, name: str) -> Predictions:
        return Predictions(self._tracker, self._named(name))
