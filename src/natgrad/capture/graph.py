"""What an output's graph is made of."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

REENTRANT = "CheckpointFunctionBackward"
"""The node of a reentrant checkpoint, whose own graph is made by its backward alone."""


def nodes(output: Tensor) -> Iterator[Node]:
    """Every node that leads from the output to leaves."""
    seen, left = set[Node](), [get_gradient_edge(output).node] if output.requires_grad else []
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            yield node
            left += [n for n, _ in node.next_functions if n is not None]


def refuse_reentrant(output: Tensor) -> None:
    """Raises NotImplementedError if the forward had a reentrant checkpoint: gradients that are asked for by
    `torch.autograd.grad` are not those of what is inside of it."""
    if any(node.name() == REENTRANT for node in nodes(output)):
        raise NotImplementedError(
            "the forward has a reentrant checkpoint, through which torch.autograd.grad takes no gradients; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which a model of transformers has with "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
