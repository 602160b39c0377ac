"""Which forward of the model a loss's input comes from, and how."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from natgrad.checks.values import described
from natgrad.optim.tracking.forward import Forward, full_precision
from natgrad.optim.tracking.returned import Way
from natgrad.optim.tracking.watch import Watch


def forward_of(output: Any, watch: Watch, optimizer: str) -> Forward:
    """The forward that `output` is of.

    Raises:
        RuntimeError: if there was none, or the output is of none of them.
        ValueError: if the output is made of several.
    """
    forwards = watch.forwards
    if watch.running:
        raise RuntimeError(
            "opt.loss was called before the model's forward had returned; where a training step is a part of that, "
            "as Lightning's is under DistributedDataParallel, make the optimizer for the module that the output is "
            f"of: {optimizer}(self.net, ...)"
        )
    if not forwards:
        raise RuntimeError(
            "opt.loss follows a forward of the model in training mode with gradients enabled, and there was "
            "none since the last step; call model.train() and model(x) first, and for evaluation the loss module "
            "itself"
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
            "opt.loss follows a forward of the model in training mode with gradients enabled, and was given a "
            "tensor that none since the last step has led to; expected one that the model returned"
        )
    if len(of) > 1:
        raise ValueError(
            f"opt.loss was given a tensor made of {len(of)} forwards of the model; expected one forward: run the "
            "model once on the batches together (torch.cat), and split what it returns"
        )
    return of[0]


def read(output: Any, forward: Forward, made: Way | None, optimizer: str) -> tuple[Tensor, Way | None]:
    """The loss's input, and how it came from what the model returned; `made` is the user's own way to it, if any.

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
            "of those that the model returned, or pass output= (how to make it of what the model returns) to "
            f"{optimizer} and give opt.loss all that the model returned"
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
