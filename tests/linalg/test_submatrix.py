"""Parts of a matrix, and conversions."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import BlockDiagonal, Dense, Diagonal
from oracles import close, net, randn

STRUCTURES = ["dense", "block", "kfac", "ekfac", "low_rank", "diagonal", "implicit"]


def matrix(structure):
    torch.manual_seed(0)
    data = randn(20, 4), torch.arange(20) % 3
    return natgrad.fisher(net(4, 5, 3), nn.CrossEntropyLoss(), data, structure)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("names", ["0", "2.bias", ["2.weight", "0"], ["0.weight", "2.weight"]])
def test_a_submatrix_has_the_rows_of_its_parameters(structure, names):
    F = matrix(structure)
    part = F[names]
    index = F.space.unflatten(torch.arange(F.space.size))
    wanted = [names] if isinstance(names, str) else names
    kept = [
        i for n, i in zip(F.space.names, index, strict=True) if any(n == w or n.startswith(f"{w}.") for w in wanted)
    ]
    rows = torch.cat([i.flatten() for i in kept])
    close(part.to_dense(), F.to_dense()[rows[:, None], rows])
    assert list(part.space.names) == [n for n in F.space.names if any(n == w or n.startswith(f"{w}.") for w in wanted)]


def test_whole_blocks_keep_their_structure():
    assert isinstance(matrix("kfac")["0"], BlockDiagonal)
    assert isinstance(matrix("dense")["0.bias"], Dense)
    assert matrix("kfac")[["0", "2"]].logdet(0.1) == matrix("kfac").logdet(0.1)
    assert isinstance(
        Diagonal((torch.ones(2), torch.ones(3)), natgrad.linalg.Space(((2,), (3,)), ("a", "b")))["b"], Diagonal
    )


def test_names_that_are_not_there():
    F = matrix("kfac")
    with pytest.raises(KeyError, match=r"no parameter or module has the name '0.wieght'.*did you mean '0.weight'"):
        F["0.wieght"]
    with pytest.raises(TypeError, match="is indexed by an int; expected a name"):
        F[0]
    with pytest.raises(ValueError, match="the list of names is empty"):
        F[[]]
    with pytest.raises(TypeError, match="has no named parameters"):
        F.blocks["0"]["weight"]


@pytest.mark.parametrize("structure", STRUCTURES[:-1])
def test_another_dtype(structure):
    F = matrix(structure)
    low = F.to(torch.float32)
    assert low.dtype == torch.float32
    assert low.to_dense().dtype == torch.float32
    close(low.to_dense().double(), F.to_dense(), 1e-6)
    assert low.to("cpu").device.type == "cpu"


def test_a_matrix_that_holds_a_model_stays_where_it_is():
    with pytest.raises(TypeError, match="holds a model and data"):
        matrix("implicit").to(torch.float32)
