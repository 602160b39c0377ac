"""Influence scores and posteriors from the data of several ranks are those of one process that has all of it."""

import pytest
import torch

import rank_uses

ASKED = {
    "ekfac": {},
    "kfac, low rank": {"structure": "kfac", "rank": 2},
    "diagonal, refined": {"structure": "diagonal", "refine": 5},
    "implicit": {"structure": "implicit"},
}
SIZES = [10, 11, 12, 13]
"""Examples in the four batches that the ranks share out."""


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_each_rank_scores_its_own_examples(ranks, asked):
    expected = rank_uses.influences(None, asked, "even").split(SIZES, 1)
    for n, share, own in ((2, "even", [[0, 2], [1, 3]]), (2, "none", [[], [0, 1, 2, 3]])):
        for found, batches in zip(ranks(n, rank_uses.influences, asked, share), own, strict=True):
            wanted = torch.cat([expected[0][:, :0], *(expected[b] for b in batches)], 1)
            assert found.shape == wanted.shape
            assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("rank", [None, 2])
def test_texts_are_scored_by_several_ranks(ranks, rank):
    expected = rank_uses.of_words(None, rank)
    for r, found in enumerate(ranks(2, rank_uses.of_words, rank)):
        assert torch.allclose(found, expected[:, r::2], rtol=1e-7, atol=1e-9)


def test_each_rank_scores_its_own_examples_with_themselves(ranks):
    expected = rank_uses.influences(None, {}, "even", True).split(SIZES)
    found = ranks(2, rank_uses.influences, {}, "even", True)
    for own, batches in zip(found, [[0, 2], [1, 3]], strict=True):
        assert torch.allclose(own, torch.cat([expected[b] for b in batches]), rtol=1e-7, atol=1e-9)


def test_what_one_rank_raises_all_raise(ranks):
    assert all("has other queries than another rank" in s for s in ranks(2, rank_uses.influence_error, "queries"))
    assert all("output are not finite" in said for said in ranks(2, rank_uses.influence_error, "nan"))
    first, second = ranks(2, rank_uses.influence_error, "factors")
    assert first.startswith("ValueError: on rank 1 of 2: ")
    assert second.startswith("ValueError: ")
    assert all("each rank has its own examples" in said for said in ranks(2, rank_uses.influence_error, "itself"))


@pytest.mark.parametrize("structure", ["kfac", "dense"])
def test_a_posterior_is_of_all_data_and_predicts_on_one_rank_alone(ranks, structure):
    evidence, delta, predicted = rank_uses.posterior(None, structure, "even")
    first, second = ranks(2, rank_uses.posterior, structure, "uneven")
    for own in (first, second):
        assert own[:2] == pytest.approx((evidence, delta), rel=1e-6)
    assert torch.allclose(first[2], predicted, rtol=1e-7)
