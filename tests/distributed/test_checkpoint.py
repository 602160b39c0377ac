"""A checkpoint of some ranks is resumed on others: the run ends with the weights of an undisturbed one."""

import pytest
import torch

import natgrad
import rank_errors
import rank_training
import work
from natgrad.curvature.bases import turned
from natgrad.linalg.eigen import eigh, inverse_from_cholesky
from test_parity import EXACT, RECIPES

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "saved", "resumed"),
    [
        ("all adaptive", (4, "fsdp"), [(2, "fsdp"), (1, "fsdp"), (2, ""), (0, "")]),
        ("all adaptive", (0, ""), [(2, "fsdp"), (2, "")]),
        ("EKFAC", (2, "fsdp"), [(1, "fsdp"), (0, "")]),
        ("diagonal", (2, "fsdp"), [(0, "")]),
        ("orthogonalized", (2, "fsdp"), [(1, "fsdp"), (2, "")]),
        ("given step size", (2, ""), [(2, "fsdp")]),
        pytest.param("all adaptive", (4, "hsdp"), [(4, "fsdp"), (2, "")], marks=SLOW),
        pytest.param("EKFAC", (4, "fsdp"), [(2, "fsdp")], marks=SLOW),
    ],
)
def test_resumed_on_other_ranks(ranks, tmp_path, recipe, saved, resumed):
    options = EXACT | RECIPES[recipe]

    def run(place, steps, how):
        n, sharded = place
        if n == 0:
            return rank_training.trained_in(None, options, steps, how)
        return ranks(n, rank_training.trained_in, options, steps, how | {"sharded": sharded})[0]

    whole, _ = rank_training.trained_in(None, options, 20, {})
    folder = str(tmp_path / "checkpoint")
    run(saved, 12, {"save": folder})
    for place in resumed:
        weights, _ = run(place, 20, {"first": 12, "load": folder})
        for n, p in whole.items():
            assert torch.allclose(weights[n], p, rtol=0, atol=1e-9), (place, n)


def test_one_ranks_state_is_not_the_whole_one(ranks):
    said = ranks(2, rank_errors.state_of_one_rank)
    assert all("save it with torch.distributed.checkpoint" in s for s in said)


def test_no_checkpoint(tmp_path):
    opt = natgrad.KFAC(work.network(), torch.nn.CrossEntropyLoss())
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        natgrad.load_checkpoint(opt, tmp_path)
    rank_training.trained_in(None, EXACT, 1, {"save": str(tmp_path)})
    with pytest.raises(ValueError, match="has no 'opt'; it has 'model', 'optimizer'"):
        natgrad.load_checkpoint(opt, tmp_path, key="opt")


@pytest.mark.parametrize(
    "options",
    [{}, {"damping_style": "exact"}, {"centered": False}, {"structure": "ekfac", "bases_every": 5}]
    + [{"structure": s} for s in ("diagonal", "input", "identity")],
    ids=str,
)
def test_resumed_to_the_last_bit_on_one_process(tmp_path, options):
    """In single precision too: matrices come back in the layout in which they were."""
    whole, _ = rank_training.trained_in(None, options, 14, {"dtype": torch.float32})
    rank_training.trained_in(None, options, 9, {"dtype": torch.float32, "save": str(tmp_path)})
    resumed, _ = rank_training.trained_in(
        None, options, 14, {"dtype": torch.float32, "first": 9, "load": str(tmp_path)}
    )
    for n, p in whole.items():
        assert torch.equal(resumed[n], p), n


def test_what_is_kept_lies_row_by_row_as_what_is_loaded_does():
    """Else products with it differ in the last bit, at sizes where a library has a kernel for each layout."""
    M = torch.randn(30, 90)
    M = M @ M.mT
    for dtype in (torch.float32, torch.float64):
        for own in (M.to(dtype), M.to(dtype) / 1e30):
            assert inverse_from_cholesky(own, "M", 1.0).is_contiguous()
            U = eigh(own, "M")[1]
            assert U.is_contiguous()
            assert turned(own, U, "M").is_contiguous()
