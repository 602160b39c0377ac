"""docs/structures.md: its table of operations is what the structures do."""

import functools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, net, randn

PAGE = (Path(__file__).parents[2] / "docs" / "structures.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("\n## Operations\n")[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines() if line.startswith("|")]
STRUCTURES = ROWS[0][1:]
FACTORED = 'F.solve(v, 0.1, damping_style="factored")'
CENTERED = 'F.solve(v, 0.1, damping_style="centered")'


def test_the_structures_are_those_of_the_library():
    assert tuple(STRUCTURES) == natgrad.curvature.matrices.ALL_STRUCTURES


@cache
@functools.cache
def matrix(structure):
    data = randn(20, 4), torch.arange(20) % 3
    return natgrad.fisher(net(4, 5, 3), nn.CrossEntropyLoss(), data, structure)


def run(call, structure, path):
    F = matrix(structure)
    return eval(call, {"F": F, "v": torch.ones(F.space.size, dtype=F.dtype), "path": path})


@pytest.mark.parametrize(
    ("call", "structure", "answer"),
    [(row[0].strip("`"), s, answer) for row in ROWS[2:] for s, answer in zip(STRUCTURES, row[1:], strict=True)],
)
def test_an_operation_is_as_the_table_says(call, structure, answer, tmp_path):
    if answer == "yes":
        run(call, structure, tmp_path / "matrix")
        return
    assert answer == "no"
    with pytest.raises(TypeError):
        run(call, structure, tmp_path / "matrix")


@pytest.mark.parametrize("structure", ["dense", "ekfac", "diagonal"])
def test_of_one_factor_the_factored_damping_is_the_centered_one(structure):
    close(run(FACTORED, structure, None), run(CENTERED, structure, None), 1e-12)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_without_centered_coordinates_the_centered_damping_is_the_plain_one(structure):
    close(run(CENTERED, structure, None), run("F.solve(v, 0.1)", structure, None), 1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_with_them_it_is_not(structure):
    assert (run(CENTERED, structure, None) - run("F.solve(v, 0.1)", structure, None)).norm() > 1e-3


def test_of_two_factors_it_is_not():
    assert (run(FACTORED, "kfac", None) - run("F.solve(v, 0.1)", "kfac", None)).norm() > 1e-3


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "implicit"])
def test_the_root_of_the_inverse_whitens(structure):
    root, v = run("F.power(-0.5, 0.1)", structure, None), randn(matrix(structure).space.size)
    close(root @ (root @ v), matrix(structure).solve(v, 0.1))


def test_a_sum_of_two_kfacs_is_damped_as_all_else_is():
    both = matrix("kfac") + 2 * matrix("kfac")
    dense, v = both.to_dense(), randn(both.space.size)
    close(both.solve(v, 0.1), torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=dense.dtype), v), 1e-8)
