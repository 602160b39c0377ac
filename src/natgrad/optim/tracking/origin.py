"""Which forward of the model a loss's input comes from, and by which operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from natgrad.checks.values import described
from natgrad.optim.tracking.forward import Forward, full_precision
from natgrad.optim.tracking.returned import Way
from natgrad.optim.tracking.watch import Watch


def forward_of(output: Any, watch: Watch, optimizer: str) -> Forward:
    """The forward that produced `output`.

    Raises:
        RuntimeError: if there was no forward, or none of them produced the output.
        ValueError: if several forwards produced it.
    """
    forwards = watch.forwards
    if watch.running:
        raise RuntimeError(
            "opt.loss was called before the model's forward returned. If the training step is part of that forward, "
            "as in Lightning under DistributedDataParallel, pass the inner module whose output you use: "
            f"{optimizer}(self.net, ...)"
        )
    if not forwards:
        raise RuntimeError(
            "opt.loss follows a forward of the model in training mode with gradients enabled, but there was "
            "none since the last step; call model.train() and model(x) first. For evaluation, use the loss "
            "module itself"
        )
    for forward in reversed(forwards):
        returned = forward.returned
        assert returned is not None
        if returned.is_all_of(output) or (isinstance(output, Tensor) and returned.way_to(output) is not None):
            return forward
    if not isinstance(output, Tensor) or not output.requires_grad:
        return forwards[-1]
    behind = _behind(output)
    of = [f for f in forwards if f.returned is not None and f.returned.nodes() & behind]
    if not of:
        raise RuntimeError(
            "opt.loss follows a forward of the model in training mode with gradients enabled, but the tensor that it "
            "was given comes from none since the last step; expected a tensor that the model returned"
        )
    if len(of) > 1:
        raise ValueError(
            f"opt.loss was given a tensor that comes from {len(of)} forwards of the model; expected one forward: run "
            "the model once on the concatenated batches (torch.cat), and split the result"
        )
    return of[0]


def read(output: Any, forward: Forward, made: Way | None, optimizer: str) -> tuple[Tensor, Way | None]:
    """The loss's input, and how it follows from what the model returned; `made` is the user's own map from one to the
    other.

    Raises:
        ValueError: if that is not a tensor.
    """
    returned = forward.returned
    assert returned is not None
    if made is not None and returned.is_all_of(output):
        return full_precision(made(output)), made
    if not isinstance(output, Tensor):
        raise ValueError(
            f"opt.loss was given {described(output)}; expected the tensor that the loss takes. Give it one "
            "of the tensors that the model returned, or pass output= (a function from what the model returns to that "
            f"tensor) to {optimizer} and give opt.loss all that the model returned"
        )
    return full_precision(output), returned.way_to(output)


def _behind(output: Tensor) -> set[Node]:
    """The nodes of the autograd graph that a tensor comes from."""
    found: set[Node] = set()
    left = [] if output.grad_fn is None else [output.grad_fn]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [n for n, _ in node.next_functions if n is not None]
    return found
