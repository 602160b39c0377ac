"""`natgrad plan --influence`: the cost of influence scores on many devices."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from natgrad.checks.errors import UserError
from natgrad.cli.plan import assumed, counts_of, layers_of, machine_of
from natgrad.distributed.scoring import Scoring, predict_influence
from natgrad.report.words import visible


def run_plan_influence(
    target: str, ranks: str, machine: Path | None, given: dict[str, float | None], scoring: Scoring
) -> None:
    """Print the predictions for a model on several numbers of ranks. The arguments are those of `run_plan`."""
    counts = counts_of(ranks)
    for name, value in (("influence", scoring.train), ("queries", scoring.queries), ("batch", scoring.batch)):
        if value < 1:
            raise UserError(f"--{name} was {value}; expected a number of examples, at least 1.")
    if scoring.rank is not None and scoring.rank < 1:
        raise UserError(f"--rank was {scoring.rank}; expected the rank of query gradients, at least 1.")
    constants = machine_of(machine, given)
    layers = layers_of(target)
    predictions = [predict_influence(layers, n, constants, scoring) for n in counts]
    table = Table(box=None, pad_edge=False)
    for heading in ("ranks", "time", "of it sending", "GiB a rank", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    for p in predictions:
        remark = "does not fit" if p.held > constants.memory else ""
        table.add_row(str(p.ranks), duration(p.time), f"{p.sending / p.time:.0%}", f"{p.held / 2**30:,.2f}", remark)
    console = Console()
    millions = sum(layer.parameters for layer in layers) / 1e6
    low = "in full" if scoring.rank is None else f"of rank {scoring.rank}"
    console.print(
        f"{visible(target)}: {millions:,.1f}M parameters in {len(layers)} layers; {scoring.train:,} training examples, "
        f"{scoring.queries:,} queries with gradients {low}; EKFAC with one sampled label for each example",
        markup=False,
        soft_wrap=True,
    )
    console.print(table)
    spent = ", ".join(f"{what} {duration(s)}" for what, s in predictions[-1].seconds.items() if s > 0)
    console.print(f"On {counts[-1]} ranks: {spent}", soft_wrap=True)
    if scoring.rank is None and any(p.held > constants.memory for p in predictions):
        console.print(
            "Gradients of low rank take less memory: --rank 8, and rank=8 in natgrad.influence", soft_wrap=True
        )
    console.print(assumed(constants, machine), soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """In a unit that is easy to read."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"
