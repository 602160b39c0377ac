"""NewtonMuon on several ranks is NewtonMuon on one process that sees all of every batch."""

import pytest
import torch

import muon


@pytest.fixture(scope="module")
def alone():
    known = {}

    def of(steps, how):
        key = str((steps, how))
        if key not in known:
            known[key] = muon.trained(None, steps, how)
        return known[key]

    return of


def compare(own, expected):
    for theirs in own:
        for n, p in expected.items():
            assert torch.allclose(theirs[n], p, rtol=0, atol=1e-8), n
            assert torch.equal(theirs[n], own[0][n])


@pytest.mark.parametrize(
    ("n", "sharded"),
    [(2, ""), (1, "fsdp"), (2, "fsdp"), pytest.param(4, "fsdp", marks=pytest.mark.slow), (4, "hsdp")],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"average": 0.9, "cautious": True, "weight_decay": 0.3, "sides": "both"},
        {"steps": {"3.weight": "orthogonal"}},
    ],
    ids=["default", "averaged, cautious, both sides", "chosen"],
)
def test_weights_are_those_of_one_process(ranks, alone, n, sharded, options):
    how = {"options": options}
    compare(ranks(n, muon.trained, 12, how | {"sharded": sharded}), alone(12, how))


@pytest.mark.parametrize("sharded", ["", "fsdp"])
def test_microbatches(ranks, alone, sharded):
    how = {"microbatches": 2}
    compare(ranks(2, muon.trained, 6, how | {"sharded": sharded}), alone(6, how))


def test_an_optimizer_that_was_made_before_the_ranks_were(ranks, alone):
    compare(ranks(2, muon.trained, 8, {"late": True}), alone(8, {}))


def test_ranks_that_use_other_layers(ranks):
    first, second = ranks(2, muon.routes)
    assert first == second
    assert first["branches.0.weight"] == first["branches.1.weight"] == "whitened"


def test_all_ranks_leave_a_step_that_is_not_finite_on_one(ranks):
    assert ranks(2, muon.spoiled) == [[True, True, False, True, True]] * 2


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((2, "fsdp"), [(1, "fsdp"), (2, ""), (0, "")]),
        ((0, ""), [(2, "fsdp"), (2, "")]),
        pytest.param((4, "hsdp"), [(2, "fsdp")], marks=pytest.mark.slow),
    ],
)
def test_resumed_on_other_ranks(ranks, tmp_path, saved, resumed):
    def run(place, steps, how):
        n, sharded = place
        return (
            muon.trained(None, steps, how) if n == 0 else ranks(n, muon.trained, steps, how | {"sharded": sharded})[0]
        )

    options = {"options": {"sides": "both"}}
    whole = run((0, ""), 14, options)
    folder = str(tmp_path / "checkpoint")
    run(saved, 8, options | {"save": folder})
    for place in resumed:
        weights = run(place, 14, options | {"first": 8, "load": folder})
        for n, p in whole.items():
            assert torch.allclose(weights[n], p, rtol=0, atol=1e-8), (place, n)


def test_one_ranks_state_is_not_the_whole_one(ranks):
    assert all("save it with torch.distributed.checkpoint" in said for said in ranks(2, muon.one_ranks_state))


def test_uneven_numbers_of_batches_are_refused(ranks):
    for error in ranks(2, muon.joined):
        assert "cannot run within DistributedDataParallel.join()" in error
