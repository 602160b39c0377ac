"""Training on several ranks is training on one process that sees all of every batch."""

import itertools

import pytest
import torch

import rank_errors
import rank_training

STEPS = 17  # past the refreshes at 0, 1, 3, 7, 15
EXACT = {"estimator": "exact", "matmul_precision": "highest", "statistics_share": 1.0}
RECIPES = {
    "all adaptive": {},
    "not centered": {"centered": False},
    "exact damping": {"damping_style": "exact"},
    "EKFAC": {"structure": "ekfac", "bases_every": 7},
    "diagonal": {"structure": "diagonal"},
    "input factor": {"structure": "input"},
    "orthogonalized": {"structure": "input", "orthogonalize": True, "lr": 1e-2, "momentum": 0.9},
    "no preconditioning": {"structure": "identity", "lr": 0.1, "momentum": 0.9},
    "given step size": {"lr": 0.1, "momentum": 0.9, "damping": 0.1},
    "weight decay": {"weight_decay": 1e-2},
    "a bound on the divergence": {"max_kl": 0.01},
    "reduce": {"sharing": "reduce"},
}


def compare(own, expected):
    weights, diagnostics = expected
    for theirs, its_diagnostics in own:
        for step, (mine, its) in enumerate(zip(diagnostics, its_diagnostics, strict=True)):
            assert mine.keys() == its.keys()
            for key in ("loss", "damping", "lr", "reduction_ratio"):
                if mine.get(key) is not None:
                    assert its[key] == pytest.approx(mine[key], rel=1e-7, abs=1e-12), (step, key)
        for n, p in weights.items():
            assert torch.allclose(theirs[n], p, rtol=0, atol=1e-9), n
    for theirs, _ in own[1:]:
        for n, p in own[0][0].items():
            assert torch.allclose(theirs[n], p, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def alone():
    """What one process comes to."""
    known = {}

    def of(options, steps, how=None):
        key = str((options, steps, how))
        if key not in known:
            known[key] = rank_training.trained_in(None, options, steps, how or {})
        return known[key]

    return of


def ways():
    """Every recipe on one and two ranks; on four, which take their turns on a small machine, some."""
    for recipe in RECIPES:
        for n, sharded in itertools.product((1, 2, 4), ("", "fsdp")):
            seldom = n == 4 and recipe not in ("all adaptive", "EKFAC", "input factor")
            yield pytest.param(n, sharded, recipe, marks=[pytest.mark.slow] if seldom else [])


@pytest.mark.pairs
@pytest.mark.parametrize(("n", "sharded", "recipe"), list(ways()))
def test_weights_are_those_of_one_process(ranks, alone, n, sharded, recipe):
    options = EXACT | RECIPES[recipe]
    compare(ranks(n, rank_training.trained_in, options, STEPS, {"sharded": sharded}), alone(options, STEPS))


@pytest.mark.pairs
@pytest.mark.parametrize(
    ("recipe", "microbatches", "period"),
    [("all adaptive", 2, 2), ("all adaptive", 2, 3), ("EKFAC", 2, 2), ("diagonal", 3, 5), ("given step size", 1, 3)],
)
def test_weights_are_those_of_one_process_where_some_batches_use_a_bias(ranks, recipe, microbatches, period):
    """Then layers that share a parameter must be on one rank. DistributedDataParallel does not allow it."""
    options = EXACT | RECIPES[recipe]
    alone = rank_training.used_in_part(None, "", options, microbatches, period)
    for own in ranks(2, rank_training.used_in_part, "fsdp", options, microbatches, period):
        for n, p in alone.items():
            assert torch.allclose(own[n], p, rtol=0, atol=1e-9), n


@pytest.mark.pairs
@pytest.mark.parametrize(
    "how", [{}, {"uneven": True}, {"uneven": "none"}, {"microbatches": 3}, {"few": "no bias"}], ids=str
)
@pytest.mark.parametrize("sharded", ["", "fsdp"])
def test_weights_are_those_of_one_process_where_inputs_have_scales(ranks, alone, how, sharded):
    how = how | {"raw": True}
    compare(ranks(2, rank_training.trained_in, EXACT, STEPS, how | {"sharded": sharded}), alone(EXACT, STEPS, how))


@pytest.mark.parametrize("recipe", ["all adaptive", pytest.param("EKFAC", marks=pytest.mark.slow)])
def test_weights_are_those_of_one_process_where_there_are_copies_of_shards(ranks, alone, recipe):
    options = EXACT | RECIPES[recipe]
    compare(ranks(4, rank_training.trained_in, options, STEPS, {"sharded": "hsdp"}), alone(options, STEPS))


@pytest.mark.pairs
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how",
    [
        {"uneven": True},
        {"uneven": "none"},
        {"uneven": "none", "reduction": "sum"},
        {"microbatches": 3},
        {"uneven": True, "reduction": "sum"},
        {"microbatches": 2, "reduction": "sum"},
        {"clip": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["all adaptive", "EKFAC", pytest.param("given step size", marks=pytest.mark.long)])
def test_ranks_count_by_their_cases(ranks, alone, n, how, recipe):
    options = EXACT | RECIPES[recipe]
    compare(ranks(n, rank_training.trained_in, options, 20, how), alone(options, 20, how))


@pytest.mark.parametrize("how", [{"uneven": True}, {"uneven": "none"}, {"microbatches": 3}, {"clip": 0.5}], ids=str)
def test_ranks_with_shards_count_by_their_cases(ranks, alone, how):
    compare(ranks(2, rank_training.trained_in, EXACT, 20, how | {"sharded": "fsdp"}), alone(EXACT, 20, how))


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[] if name in ("all adaptive", "EKFAC", "orthogonalized") else [pytest.mark.slow])
        for name in RECIPES
    ],
)
def test_weights_are_those_of_one_process_where_ranks_have_no_layer(ranks, alone, recipe):
    options, how = EXACT | RECIPES[recipe], {"few": True}
    compare(ranks(4, rank_training.trained_in, options, 14, how | {"sharded": "fsdp"}), alone(options, 14, how))


@pytest.mark.parametrize("recipe", ["all adaptive", "EKFAC", "given step size"])
def test_ranks_that_run_out_of_data_join_the_others(ranks, recipe):
    options, batches = EXACT | RECIPES[recipe], [14, 9]
    expected = rank_training.joined(None, options, batches)
    for weights in ranks(2, rank_training.joined, options, batches):
        for n, p in expected.items():
            assert torch.allclose(weights[n], p, rtol=0, atol=1e-9), n


def test_the_first_batch_is_not_empty_everywhere(ranks):
    assert all(said.startswith("the first batch has no cases on any rank") for said in ranks(2, rank_errors.nothing))


@pytest.mark.parametrize("sharded", ["", "fsdp"])
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "momentum": 0.9, "damping": 0.1}], ids=["adaptive", "given"])
@pytest.mark.parametrize(
    ("train", "uneven"),
    [
        (rank_training.trained_on_own_loss, False),
        (rank_training.trained_on_terms, False),
        (rank_training.trained_on_terms, True),
    ],
    ids=["a model's own loss", "two terms", "two terms, uneven"],
)
def test_other_objectives(ranks, sharded, options, train, uneven):
    expected = train(None, "", EXACT | options, uneven)
    for own in ranks(2, train, sharded, EXACT | options, uneven):
        for n, p in expected.items():
            assert torch.allclose(own[n], p, rtol=0, atol=1e-9), n


def of_derivatives():
    """Each way of taking derivatives, structure and share of the ranks; not all of them together by default."""
    usual = (("autograd", "kfac", "adaptive", True), ("torch.func", "ekfac", "adaptive", "none"))
    ways, structures = ("autograd", "torch.func"), ("kfac", "ekfac", "diagonal")
    for how in itertools.product(ways, structures, ("adaptive", "given"), (False, True, "none")):
        yield pytest.param(*how, marks=[] if how in usual else [pytest.mark.long])


@pytest.mark.parametrize(("way", "structure", "step", "uneven"), list(of_derivatives()))
def test_models_that_take_derivatives_in_their_forward(ranks, way, structure, step, uneven):
    given = {"lr": 0.1, "momentum": 0.9, "damping": 0.1} if step == "given" else {}
    options = EXACT | given | {"structure": structure}
    expected = rank_training.trained_on_derivatives(None, way, options, uneven)
    for own in ranks(2, rank_training.trained_on_derivatives, way, options, uneven):
        for n, p in expected.items():
            assert torch.allclose(own[n], p, rtol=0, atol=1e-9), n
