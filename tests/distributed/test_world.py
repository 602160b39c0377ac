"""Ranks that are not alike: without data, with a NaN, with other layers; who computes what, and what is sent."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

import rank_errors
import rank_messages
import rank_training
from natgrad.distributed.assignment import assign
from natgrad.distributed.packing import Form, empty, filled, form_of, from_triangle, leaves, packed, triangle, unpacked
from oracles import close


def test_optimizers_for_one_rank_say_so(ranks):
    for said in ranks(2, rank_errors.refused, "NaturalGradient"):
        assert said.startswith("NaturalGradient sees only the batches of its own rank, but the model is on 2 ranks")


def test_PRONG_says_so_too(ranks):
    for said in ranks(2, rank_errors.refused_by_prong):
        assert said.startswith("PRONG sees only the batches of its own rank, but the model is on 2 ranks")


def test_shards_do_not_go_with_derivatives_in_the_forward(ranks):
    for way in ("autograd", "torch.func"):
        for said in ranks(2, rank_errors.refused_with_shards, way):
            assert said.startswith("no layer kind covers 'u.0.weight' (used by ")
            assert said.endswith("use DistributedDataParallel in place of fully_shard")


def test_a_NaN_on_one_rank_is_a_step_that_all_reject(ranks):
    for rank, said in enumerate(ranks(4, rank_errors.spoiled)):
        assert [accepted for accepted, _ in said][2:4] == [False, True]
        assert said[2][1].startswith("the loss is not finite" if rank == 1 else "a batch has a fault on rank 1")


def test_bytes_sent_are_those_of_the_formula(ranks):
    """`d_in + 1` numbers for the means, triangles, a mass, and the squares of a scale's three products."""
    sizes = [(5, 7), (7, 7), (7, 3)]
    means = sum(i + 1 for i, _ in sizes) + 2
    sums = sum(i * (i + 1) // 2 + o * (o + 1) // 2 + 1 for i, o in sizes) + 3 * 7 + 1
    for came in ranks(2, rank_messages.sent):
        assert came["the moments"] == 8 * (means + sums)


def test_moments_travel_while_the_backward_runs(ranks):
    for said in ranks(2, rank_messages.under_way):
        assert said == [(True,), (False, True), (True,), (False,), (False,)]


def test_a_loss_that_one_rank_has_not_used_has_no_part_in_the_statistics(ranks):
    expected = rank_training.dropped(None)
    for came in ranks(2, rank_training.dropped):
        for n, p in expected.items():
            close(came[n], p, 1e-9)


@given(costs=st.lists(st.integers(1, 20), min_size=1, max_size=7), ranks=st.integers(1, 3))
def test_an_assignment_is_nearly_the_best(costs, ranks):
    named = {str(i): float(c) for i, c in enumerate(costs)}
    place = assign(named, ranks)
    assert list(place) == list(named)

    def longest(places):
        return max(sum(c for c, p in zip(costs, places, strict=True) if p == r) for r in range(ranks))

    best = min(longest(places) for places in itertools.product(range(ranks), repeat=len(costs)))
    assert longest(place.values()) <= 7 / 6 * best


def test_the_layers_of_GPT2_small_are_shared_out_within_a_tenth_of_the_best():
    blocks = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    costs = {f"{k}.{j}": float(i**3 + o**3) for k in range(12) for j, (i, o) in enumerate(blocks)}
    costs |= {"tokens": 768.0**3, "positions": 768.0**3 + 1024.0**3}
    for ranks in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64):
        load = [0.0] * ranks
        for key, rank in assign(costs, ranks).items():
            load[rank] += costs[key]
        no_better_than = max(sum(costs.values()) / ranks, max(costs.values()))
        if ranks == 24:  # as many as there are layers of the largest cost: some rank has one, and one of the next
            no_better_than = costs["0.2"] + costs["0.0"]
        assert max(load) <= 1.1 * no_better_than, ranks


def test_packing_is_undone_and_symmetric_matrices_take_half():
    S = torch.randn(4, 4, dtype=torch.float64)
    value = {"a": S + S.mT, "b": [torch.arange(3), (S, "name", None)], "c": torch.tensor(2.0)}
    form = form_of(value)
    forms = list(leaves(form, Form))
    assert [f.size for f in forms] == [10, 3, 16, 1]
    buffers = packed(leaves(value, torch.Tensor), forms)
    assert {k: b.shape for k, b in empty(forms, torch.device("cpu")).items()} == {
        k: b.shape for k, b in buffers.items()
    }
    again = filled(form, iter(unpacked(buffers, forms)))
    assert torch.equal(again["a"], value["a"])
    assert torch.equal(again["b"][0], value["b"][0])
    assert torch.equal(again["b"][1][0], S)
    assert again["b"][1][1:] == ("name", None)
    close(from_triangle(triangle(S + S.mT), 4), S + S.mT)
