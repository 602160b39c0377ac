"""An optimizer whose model turns out to be in `DistributedDataParallel`: what trains the model has put it there."""

import pytest
import torch

import rank_errors
import rank_training

OPTIONS = {
    "all adaptive": {"estimator": "exact", "matmul_precision": "highest", "statistics_share": 1.0},
    "given step size": {"estimator": "exact", "statistics_share": 1.0, "lr": 0.1, "momentum": 0.9, "damping": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["late", "part"])
def test_the_weights_are_those_of_one_process(ranks, how, options):
    expected, _ = rank_training.trained(None, OPTIONS[options], 12)
    for weights in ranks(2, rank_training.trained_within, how, OPTIONS[options], 12):
        for n, p in expected.items():
            assert torch.allclose(weights[n], p, rtol=0, atol=1e-9), n


@pytest.mark.parametrize("kind", ["NaturalGradient", "PRONG"])
def test_an_optimizer_for_one_rank_says_so(ranks, kind):
    for said in ranks(2, rank_errors.refused_within, kind):
        assert said.startswith(f"{kind} sees only the batches of its own rank, but the model is on 2 ranks")
