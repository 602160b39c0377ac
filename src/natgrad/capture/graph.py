"""The nodes of an output's autograd graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

REENTRANT = "CheckpointFunctionBackward"
"""The node of a reentrant checkpoint. Its inner graph is only made in its backward pass."""


def nodes(output: Tensor) -> Iterator[Node]:
    """Every node between the output and the leaves."""
    seen, left = set[Node](), [get_gradient_edge(output).node] if output.requires_grad else []
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            yield node
            left += [n for n, _ in node.next_functions if n is not None]


def refuse_reentrant(output: Tensor) -> None:
    """Raises NotImplementedError if the forward pass had a reentrant checkpoint: `torch.autograd.grad` does not compute
    the gradients inside it."""
    if any(node.name() == REENTRANT for node in nodes(output)):
        raise NotImplementedError(
            "the forward has a reentrant checkpoint, through which torch.autograd.grad cannot compute gradients; use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), in a model of transformers by "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
