"""Per-example gradients: a row for every example and scalar of one batch, held as the cases of each layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.capture.reading import example_gradients, read_cases
from natgrad.capture.recorder import Recorder
from natgrad.checks.parameters import Selection
from natgrad.checks.values import described
from natgrad.curvature.blocks import assemble, named_blocks
from natgrad.curvature.exact import ExactStructure
from natgrad.curvature.problem import Problem
from natgrad.linalg import Block, BlockDiagonal, ColumnBlock, ExactBlock, Space
from natgrad.linalg.joint import Joint
from natgrad.losses.base import OutputCurvature, one_by_one

Vector = Mapping[str, Tensor]
Columns = Callable[[Tensor, Any], Iterable[Tensor]]
"""From the output and the target to columns in the shape of the output: row `k` of an example is `Jᵀ s_k`."""


class Rows:
    """`(examples n, k)` gradients in the parameters, as the cases `(h, g)` of each layer: they are formed only in
    `dense`.

    `output` and `target` are those of the batch.
    """

    def __init__(self, layers: BlockDiagonal, output: Tensor, target: Any):
        self.layers, self.output, self.target = layers, output, target
        self._joint = Joint(layers)

    def __len__(self) -> int:
        return len(self.output)

    @property
    def space(self) -> Space:
        return self.layers.space

    def times(self, v: Vector) -> Float[Tensor, "*lead n k"]:
        """The rows times a vector, or times as many vectors as `v` has leading axes."""
        return self._joint.inner(tuple(v[n] for n in self.space.names or ())).unflatten(-1, (len(self), -1))

    def transposed(self, c: Float[Tensor, "*lead n k"]) -> dict[str, Tensor]:
        """The sum of the rows with the weights `c`."""
        return dict(zip(self.space.names or (), self._joint.outer(c.flatten(-2)), strict=True))

    def gram(self) -> Float[Tensor, "nk nk"]:
        """The inner products of all pairs of rows."""
        return self._joint.gram()

    def blocks(self) -> Iterator[tuple[str, Block, ExactBlock]]:
        """Each layer's name, parameters and cases."""
        for name, block in self.layers.layers.items():
            assert isinstance(block.operator, ExactBlock)
            yield name, block, block.operator

    def part(self, examples: slice) -> Rows:
        """The rows of some examples."""
        blocks = {name: block.with_operator(op.part(examples)) for name, block, op in self.blocks()}
        return Rows(BlockDiagonal(blocks, self.space), self.output[examples], None)

    def dense(self) -> dict[str, Tensor]:
        """The rows themselves, `(n, k, *shape)` for each parameter."""
        out: dict[str, Tensor] = {}
        for _, block, op in self.blocks():
            n, k = op.g.shape[:2]
            out |= block.named(tuple(p.unflatten(0, (n, k)) for p in op.space.unflatten(op.columns().mT)))
        return {n: out[n] for n in self.space.names or ()}


def rows_of(problem: Problem, columns: Columns, batches: Iterable[Any] | None = None) -> Iterator[Rows]:
    """The rows of every batch of a problem, or of the given ones.

    Layers that the capture supports are read as cases. If it does not support a parameter, or the output's rows see one
    another, the rows of that batch come from autograd alone, one example after the other.
    """
    for recorder, output, target in problem.recorded(problem.parameters, batches):
        own = list(columns(output.detach(), target))
        try:
            layers = _captured(problem, recorder, output, own)
        except NotImplementedError:
            layers = _by_autograd(problem, output, own)
        yield Rows(layers, output.detach(), target)


def _captured(problem: Problem, recorder: Recorder, output: Tensor, columns: list[Tensor]) -> BlockDiagonal:
    blocks: dict[str, Block] = {}
    parts = ExactStructure()
    if add_batch(parts, problem, recorder, output, columns):
        blocks = named_blocks(parts.build(is_mean=False), problem.parameters)
    reached = {n for block in blocks.values() for n in block.names}
    for name, p in problem.parameters.items():  # a parameter that this batch did not use has rows of zeros
        if name not in reached:
            zeros = p.new_zeros(len(output), len(columns), p.numel(), dtype=problem.dtype)
            blocks[name] = Block(ColumnBlock(zeros, (tuple(p.shape),)), (name,))
    return BlockDiagonal(blocks, _space(problem))


def add_batch(
    parts: ExactStructure, problem: Problem, recorder: Recorder, output: Tensor, columns: list[Tensor]
) -> bool:
    """Takes the rows of a recorded batch into the exact blocks. False if they are all zero, as the output depends on no
    parameter."""
    uses = recorder.check(output, reached=problem.reached)
    if problem.reached and (not uses or not output.requires_grad):
        return False
    mode = tuple(module.training for module in problem.model.modules())
    separation = problem.separation.of(uses, output, mode).whole()
    if any(grouping.members > 1 for grouping in separation.groupings):
        raise NotImplementedError("the output's rows see one another in some layer; use autograd")
    for use in uses:
        use.forget_output()
    one = torch.ones((), dtype=problem.dtype, device=problem.device)
    parts.add(read_cases(uses, output, lambda: columns, one, problem.dtype, separation=separation, sampled=False))
    return True


def joined_layers(parts: ExactStructure, problem: Problem) -> Joint:
    """The rows of all batches, of those parameters that they use."""
    return Joint(assemble(parts.build(is_mean=False), problem.parameters))


def _by_autograd(problem: Problem, output: Tensor, columns: list[Tensor]) -> BlockDiagonal:
    space = _space(problem)
    every = (example_gradients(output, c, problem.parameters) for c in columns)
    S = torch.stack([torch.cat([space.flatten(some) for some in its]) for its in every], 1)
    block = ColumnBlock(S.detach().to(problem.dtype), space.shapes)
    return BlockDiagonal({"all": Block(block, space.names or (), shapes=space.shapes)}, space)


def _space(problem: Problem) -> Space:
    return Space(tuple(tuple(p.shape) for p in problem.parameters.values()), tuple(problem.parameters))


def unit_columns(output: Tensor, target: Any = None) -> Iterator[Tensor]:
    """One column for every entry of an example's output: the rows are the Jacobian."""
    return one_by_one(torch.ones_like(output))


def outputs_problem(
    model: nn.Module,
    data: Any,
    params: Selection = None,
    output: Callable[[Any, Any], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    reached: bool = False,
) -> Problem:
    """A model on inputs without targets: each batch is what `output(model, batch)` takes, by default `model(batch)`.
    With `reached` the output may depend on none of the parameters."""
    take = output or (lambda model, batch: model(batch))

    def forward(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        out = take(model, batch)
        return out, torch.zeros_like(out) if isinstance(out, Tensor) else out

    loss = nn.MSELoss(reduction="sum")
    return Problem(model, loss, data, params=params, forward=forward, dtype=dtype, reached=reached)


def loss_columns(problem: Problem) -> Columns:
    """The one column whose rows are the gradients of each example's own loss.

    An example's own loss is what the loss module gives for that example by itself: for a mean over several entries or
    positions, the mean over those of the example.
    """
    total = summed(problem.curvature)

    def of_loss(output: Tensor, target: Any) -> Iterator[Tensor]:
        s = _slope(lambda f: total.loss(f, target), output)
        if problem.curvature.is_mean:
            own = own_normalizers(problem.curvature, output, target).view(-1, *[1] * (s.ndim - 1))
            s = torch.where(own > 0, s / own, 0.0)
        yield s

    return of_loss


def measure_columns(measure: Callable[[Tensor, Any], Tensor]) -> Columns:
    """The one column whose rows are the gradients of `measure(output, target)`, `(n,)`."""

    def of_measure(output: Tensor, target: Any) -> Iterator[Tensor]:
        def total(f: Tensor) -> Tensor:
            values = measure(f, target)
            if not isinstance(values, Tensor) or values.shape != (len(output),):
                raise ValueError(
                    f"measure returned {described(values)}; expected one number for each example: a Tensor of shape "
                    f"{(len(output),)}"
                )
            return values.sum()

        yield _slope(total, output)

    return of_measure


def summed(curvature: OutputCurvature) -> OutputCurvature:
    """The same loss with `reduction="sum"`."""
    module = copy.copy(curvature.module)
    module.reduction = "sum"
    return type(curvature)(module, curvature.kind)


def _slope(of: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    with torch.enable_grad():
        f = output.detach().requires_grad_()
        value = of(f)
        s = torch.autograd.grad(value, f, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(output) if s is None else s


def own_normalizers(curvature: OutputCurvature, output: Tensor, target: Any) -> Float[Tensor, " n"]:
    """What the mean over each example by itself divides by; zero where all of its targets are ignored."""
    alike = curvature.ignored(output, target) is None and getattr(curvature.module, "weight", None) is None
    if alike:
        return curvature.normalizer(output[:1], target[:1]).expand(len(output))
    return torch.stack([curvature.normalizer(output[i : i + 1], target[i : i + 1]) for i in range(len(output))])
