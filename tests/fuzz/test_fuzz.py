"""Random networks, losses, batches and options: every structure and operation against brute force in float64.

60 cases are run with the other tests; `pytest -m slow tests/fuzz` runs 3,000 others.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import natgrad
from architectures import ACTIVATIONS, STAGES, Spec
from brute import Case, f64

TOLERANCE = 1e-8
STRUCTURES = ("dense", "block", "diagonal", "kfac", "ekfac", "implicit")


@st.composite
def specs(draw):
    shape = draw(st.sampled_from(["pooled", "last", "positions", "flattened"]))
    losses = ["cross entropy", "weighted", "squared error", "poisson"]
    losses += ["logistic"] if shape != "positions" else []
    loss = draw(st.sampled_from(losses))
    estimators = ["exact", "exact", "empirical"] if loss in ("cross entropy", "squared error", "poisson") else ["exact"]
    return Spec(
        seed=draw(st.integers(0, 2**20)),
        source=draw(st.sampled_from(["numbers", "numbers", "tokens", "bags"])),
        padding=draw(st.sampled_from([None, 1, -1])),
        stages=tuple(draw(st.lists(st.sampled_from(sorted(STAGES)), min_size=1, max_size=3))),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        shared=draw(st.booleans()),
        shape=shape,
        width=draw(st.sampled_from([2, 4])),
        length=draw(st.integers(1, 4)),
        classes=draw(st.integers(2, 3)),
        sizes=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))),
        loss=loss,
        reduction=draw(st.sampled_from(["mean", "sum"])),
        training=draw(st.booleans()),
        estimator=draw(st.sampled_from(estimators)),
        params=draw(st.sampled_from([1.0, 1.0, 0.5])),
        form=draw(st.sampled_from(["pairs", "pair", "dictionaries"])),
    )


def usable(spec):
    """Batch normalization in training mode needs more than one value for each channel."""
    alone = "BatchNorm" in spec.stages and spec.training and min(spec.sizes) * spec.length == 1
    one = "Prompt" in spec.stages and min(spec.sizes) == 1  # a prompt that is not repeated is refused
    return not alone and not one and not ("GroupNorm" in spec.stages and spec.width * spec.length == 2)


def close(came, expected, what):
    scale = max(1e-3, expected.abs().max().item())
    error = (came - expected).abs().max().item()
    assert error <= TOLERANCE * scale, f"{what} is off by {error:.3g} at a scale of {scale:.3g}"


def check(spec):
    case = Case(spec)
    dense = case.dense()
    close(dense, dense.T, "the reference's transpose")
    for structure in STRUCTURES:
        if structure == "implicit" and spec.estimator != "exact":
            continue
        F = natgrad.fisher(case.model, case.loss, case.data, structure, **case.options)
        assert F.space.names == tuple(case.names), "the parameters"
        check_matrix(case, F, dense, structure)


def check_matrix(case, F, dense, structure):
    M = F @ torch.eye(F.space.size, dtype=f64)
    close(M, M.T, f"{structure}: the transpose")
    if structure in ("dense", "implicit"):
        close(M, dense, structure)
    elif structure == "diagonal":
        close(M, dense.diagonal().diag(), structure)
    else:
        for block in F.layers.values():
            rows = case.places(block.names)
            own, exact = M[rows[:, None], rows], dense[rows[:, None], rows]
            if structure == "block":
                close(own, exact, f"the block of {block.names}")
            else:
                check_factors(own, exact, block, structure)
        covered = sorted(n for block in F.layers.values() for n in block.names)
        assert covered == sorted(case.names), "the blocks' parameters"
    check_operations(F, M, structure)


def check_factors(own, exact, block, structure):
    """A block of K-FAC or EKFAC is semidefinite, zero where the exact one is; one of a single use has bounds."""
    e = torch.linalg.eigvalsh(own)
    assert e[0] >= -1e-9 * max(1e-3, e[-1].item()), f"{structure}: the block of {block.names} is not semidefinite"
    both_ways = block.names[0].endswith(".W")  # used as W and as Wᵀ: EKFAC keeps K-FAC's block
    plain = "+" not in block.function and len(block.names) < 2 and block.function != "expand" and not both_ways
    if structure == "ekfac" and plain:
        close(own.trace(), exact.trace(), f"ekfac: the trace of {block.names}")


def check_operations(F, M, structure):
    v = torch.linspace(-1, 1, len(M), dtype=f64)
    close(F.quadratic(v), v @ M @ v, f"{structure}: the quadratic form")
    if structure == "implicit":
        return
    close(F.trace(), M.trace(), f"{structure}: the trace")
    close(F.norm(), M.norm(), f"{structure}: the norm")
    close(torch.cat([d.flatten() for d in F.diagonal().values()]), M.diagonal(), f"{structure}: the diagonal")
    inverse = F.inverse(0.3)
    W = inverse @ torch.eye(len(M), dtype=f64)
    close(F.solve(v, 0.3), W @ v, f"{structure}: the solve")
    if structure in ("dense", "block", "diagonal"):
        close(W @ (M + 0.3 * torch.eye(len(M), dtype=f64)), torch.eye(len(M), dtype=f64), f"{structure}: the inverse")
        close(
            F.logdet(0.3), torch.linalg.slogdet(M + 0.3 * torch.eye(len(M), dtype=f64))[1], f"{structure}: the logdet"
        )


COUNT = []
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


FOUND = {"padding": None, "shared": False, "loss": "cross entropy", "reduction": "mean", "training": False}
FOUND |= {"estimator": "exact", "form": "pairs", "dtype": f64}
# A derivative that is zero but for rounding.
ZERO = Spec(
    seed=3, source="numbers", stages=("Centred",), activation="gelu", shape="positions", width=4, classes=2, sizes=(3,),
    length=3, params=0.5, **FOUND,
)  # fmt: skip
# Rows without a gradient in the first batch, which hide that the rows of the second see one another.
HIDDEN = Spec(
    seed=126, source="tokens", stages=("Attention",), activation="relu", shape="flattened", width=2, classes=3,
    sizes=(1, 1), length=3, params=1.0, **FOUND,
)  # fmt: skip
# Large gradients that cancel in the parameter, of rows that hardly see one another.
CANCELLED = Spec(
    seed=42564, source="numbers", stages=("GroupNorm", "GroupNorm", "Depthwise"), activation="relu", shape="flattened",
    width=2, length=2, classes=2, sizes=(1,), params=1.0, **FOUND,
)  # fmt: skip


@settings(max_examples=60, derandomize=True, phases=[Phase.explicit, Phase.generate, Phase.shrink], **QUIET)
@example(ZERO)
@example(HIDDEN)
@example(CANCELLED)
@given(specs())
def test_every_structure_is_brute_force(spec):
    if usable(spec):
        check(spec)


@pytest.mark.slow
@settings(max_examples=3000, phases=[Phase.generate, Phase.shrink], **QUIET)
@given(specs())
def test_3000_others(spec):
    if usable(spec):
        check(spec)
        COUNT.append(spec)
        if len(COUNT) % 100 == 0:
            print(f"{len(COUNT)} cases, no mismatch")
