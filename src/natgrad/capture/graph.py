"""The nodes of an output's autograd graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

REENTRANT = "CheckpointFunctionBackward"
"""The node of a reentrant checkpoint. Its inner graph is only made in its backward pass."""


def edge_of(a: Tensor) -> GradientEdge:
    """The edge of `a`. If `a` is a view of another tensor (`linear` with positions), the edge of that tensor, because
    an in-place function on a view gives the view a new node and removes the old one from the graph. A reshaped
    parameter has no node of its own."""
    whole = a if a._base is None or a._base.is_leaf else a._base
    reshaped = whole.numel() == a.numel() and whole.is_contiguous() and a.is_contiguous()
    return get_gradient_edge(whole if reshaped else a)


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
