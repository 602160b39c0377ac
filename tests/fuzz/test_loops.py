"""Random training loops against a slow reference, which recomputes everything at each step.

`NATGRAD_PROGRAMS=1000 pytest tests/fuzz/test_loops.py` runs that many, other ones each time.
"""

import os
import warnings

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from programs import Loop

BY_HAND = os.environ.get("NATGRAD_PROGRAMS")
LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(), nn.MSELoss(reduction="sum")]
sizes = st.integers(1, 5)
factors = st.sampled_from([1.0, 0.5, 0.25, 3.0, 128.0])
zeros = st.sampled_from(["opt", "opt, in place", "model", "model, in place", "by hand"])
places = st.sampled_from([None, "direction", "inverses", "averages", "parameters"])


def operation(name, *arguments):
    return st.tuples(st.just(name), *arguments)


plain = operation("iterate", sizes, zeros, st.booleans())
steps = st.one_of(
    plain,
    plain,
    operation("iterate", sizes, zeros, st.booleans(), st.just(True)),
    operation("accumulate", st.lists(sizes, min_size=2, max_size=3), st.booleans()),
    operation("set_by_hand", sizes, factors),
    operation("closure_step", sizes),
    operation("step", places),
)
others = st.one_of(
    operation("forward", sizes),
    operation("compute_loss", st.integers(0, 2)),
    operation("backward", st.lists(factors, min_size=1, max_size=2), st.booleans()),
    operation("backward_zero_backward", zeros),
    operation("peek"),
    operation("zero", zeros),
    operation("clip", st.sampled_from([0.01, 1.0])),
    operation("evaluate"),
    operation("skip"),
    operation("freeze", st.integers(0, 5), st.booleans()),
    operation("freeze", st.integers(0, 5), st.just(True)),
    operation("raise_in_forward", st.integers(0, 2)),
    operation("raise_in_backward"),
    operation("save_and_load"),
)
programs = st.lists(st.tuples(st.integers(0, 5), st.one_of(steps, others)), min_size=6, max_size=30)
options = st.fixed_dictionaries(
    {
        "centered": st.booleans(),
        "damping_style": st.sampled_from(["exact", "factored"]),
        "damping": st.sampled_from([0.05, 0.5]),
        "decay": st.sampled_from([0.0, 0.8]),
        "statistics_every": st.integers(1, 3),
        "inverses_every": st.integers(1, 3),
        "weight_decay": st.sampled_from([0.0, 0.01]),
    }
)
step_rules = st.sampled_from(
    [{"lr": 0.02, "momentum": 0.0}, {"lr": 0.02, "momentum": 0.9}, {"lr": None, "momentum": None}]
)


@settings(
    max_examples=int(BY_HAND or 100),
    derandomize=not BY_HAND,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    program=programs,
    options=options,
    rule=step_rules,
    loss=st.sampled_from(LOSSES),
    biases=st.tuples(*[st.booleans()] * 3),
    dropout=st.booleans(),
)
def test_any_loop_takes_the_steps_of_the_reference(program, options, rule, loss, biases, dropout):
    """A program is a list of operations, each on one of two models: on the second one time in six."""
    loops = [
        Loop(biases, dropout, loss, {**options, **rule}),
        Loop((True, True, False), False, nn.MSELoss(), {**options, "lr": None, "momentum": None}, seed=1),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rejections in a row, and of runs that diverge
        for which, (name, *arguments) in program:
            getattr(loops[which == 5], name)(*arguments)
    assert all(torch.isfinite(p).all() for loop in loops for p in loop.model.parameters())
