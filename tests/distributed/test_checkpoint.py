"""A checkpoint of some ranks is resumed on others: the run ends with the weights of an undisturbed one."""

import pytest
import torch
import work
from test_parity import EXACT, RECIPES

import natgrad

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
            return work.trained_in(None, options, steps, how)
        return ranks(n, work.trained_in, options, steps, how | {"sharded": sharded})[0]

    whole, _ = work.trained_in(None, options, 20, {})
    folder = str(tmp_path / "checkpoint")
    run(saved, 12, {"save": folder})
    for place in resumed:
        weights, _ = run(place, 20, {"first": 12, "load": folder})
        for n, p in whole.items():
            assert torch.allclose(weights[n], p, rtol=0, atol=1e-9), (place, n)


def test_one_ranks_state_is_not_the_whole_one(ranks):
    said = ranks(2, work.state_of_one_rank)
    assert all("save it with torch.distributed.checkpoint" in s for s in said)


def test_no_checkpoint(tmp_path):
    opt = natgrad.KFAC(work.network(), torch.nn.CrossEntropyLoss())
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        natgrad.load_checkpoint(opt, tmp_path)
    work.trained_in(None, EXACT, 1, {"save": str(tmp_path)})
    with pytest.raises(ValueError, match="has no 'opt'; it has 'model', 'optimizer'"):
        natgrad.load_checkpoint(opt, tmp_path, key="opt")
