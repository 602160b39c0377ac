"""Matrices and residuals of the data of several ranks are those of one process that has all of it."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import rank_matrices

ASKED = {
    "kfac": {},
    "kfac, not centered, reduce": {"structure": "kfac", "centered": False, "sharing": "reduce"},
    "kfac, empirical": {"structure": "kfac", "estimator": "empirical"},
    "kfac, wide factors": {"structure": "kfac", "max_dim": 6},
    "ekfac": {"structure": "ekfac"},
    "diagonal": {"structure": "diagonal"},
    "block": {"structure": "block"},
    "dense": {"structure": "dense"},
    "implicit": {"structure": "implicit"},
    "gauss_newton": {"kind": "gauss_newton"},
    "hessian, implicit": {"kind": "hessian", "structure": "implicit"},
    "hessian, dense": {"kind": "hessian", "structure": "dense"},
    "hessian, block": {"kind": "hessian", "structure": "block"},
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_matrices_are_those_of_one_process(ranks, asked, reduction):
    expected = rank_matrices.matrix(None, asked, reduction, "even")
    for n, share in ((2, "uneven"), (4, "none")):
        for own in ranks(n, rank_matrices.matrix, asked, reduction, share):
            assert torch.allclose(own, expected, rtol=0, atol=1e-10), (n, share)


@pytest.mark.parametrize(("n", "share"), [*itertools.product((1, 2, 4), ("even", "none"))])
def test_residuals_are_those_of_one_process(ranks, n, share):
    expected = rank_matrices.residuals(None, "even")
    for own in ranks(n, rank_matrices.residuals, share):
        assert own.keys() == expected.keys()
        for layer, figures in expected.items():
            assert own[layer] == pytest.approx(figures, rel=1e-9, abs=1e-10, nan_ok=True), layer


def test_labels_differ_from_rank_to_rank_and_the_matrix_does_not(ranks):
    asked = {"structure": "ekfac", "estimator": "mc", "samples": 400}
    first, second = ranks(2, rank_matrices.matrix, asked, "mean", "same")
    exact = rank_matrices.matrix(None, {"structure": "ekfac"}, "mean", "even")
    assert torch.equal(first, second)
    assert (first - exact).norm() < 0.2 * exact.norm()
    one, other = ranks(2, rank_matrices.labels)
    assert one != other


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense", "implicit"])
def test_what_one_rank_raises_all_raise(ranks, structure):
    asked = {"structure": structure}
    for rank, said in enumerate(ranks(4, rank_matrices.matrix_error, asked, "nan")):
        assert "entries of the model's output are not finite" in said
        assert said.startswith("ValueError: on rank 2 of 4" if rank != 2 else "ValueError:")
    for rank, said in enumerate(ranks(4, rank_matrices.matrix_error, asked, "key")):
        assert said == ("KeyError: 'images'" if rank == 2 else "RuntimeError: on rank 2 of 4: KeyError: 'images'")
    assert all(
        "is empty" in said or "divides by 0" in said for said in ranks(2, rank_matrices.matrix_error, asked, "empty")
    )


def test_random_vectors_are_the_same_on_all_ranks(ranks):
    (trace, exact), *others = ranks(2, rank_matrices.estimated)
    assert all(other == (trace, exact) for other in others)
    assert abs(trace - exact) < 0.3 * exact


def test_different_vectors_are_not_multiplied(ranks):
    assert all(
        "the ranks multiply different vectors" in said for said in ranks(2, rank_matrices.matrix_error, {}, "vectors")
    )


def test_sharded_models_are_refused(ranks):
    said = ranks(2, rank_matrices.matrix_error, {}, "sharded")
    assert all("the model's parameters are sharded over ranks (fully_shard)" in s for s in said)


@pytest.mark.long  # seven processes
def test_inspect_under_torchrun(tmp_path):
    """Each process gives its own part of the data; one of them prints and writes, what one process would."""
    (tmp_path / "own_problem.py").write_text(
        "import os, torch\n"
        "def problem():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()\n"
        "    x, y = torch.randn(60, 3).double(), torch.randint(2, (60,))\n"
        "    rank, ranks = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))\n"
        "    half = slice(rank * 60 // ranks, (rank + 1) * 60 // ranks)\n"
        "    return model, torch.nn.CrossEntropyLoss(), (x[half], y[half])\n"
    )
    here = os.environ | {"OMP_NUM_THREADS": "1"}
    inspect = ["natgrad", "inspect", "own_problem:problem", "--permutations", "20"]

    def run(*command):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=here, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return re.sub(r"\[Gloo\].*\n|\d+:\d\d:\d\d", "", done.stdout)  # torch's own lines, the bars' times

    alone = run(*inspect, "--out", "alone")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    said = run(*torchrun, *inspect, "--out", "together")
    assert said.count("Report: ") == 1
    assert said.replace("together", "alone") == alone
    results = [json.loads((tmp_path / out / "results.json").read_text())["layers"] for out in ("alone", "together")]
    for layer, figures in results[0].items():
        for key, value in figures.items():
            assert results[1][layer][key] == pytest.approx(value, rel=1e-9, abs=1e-10), (layer, key)
