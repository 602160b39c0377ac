"""Operators as plain dictionaries, and back."""

import io

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

import natgrad
from natgrad.linalg import (
    Block,
    BlockDiagonal,
    CenteredKronecker,
    CoordinateBlocks,
    Dense,
    Homogeneous,
    Kronecker,
    Layout,
    Space,
)
from natgrad.linalg.state import dump, restore
from oracles import f64, randn, spd

D_IN, D_OUT = 4, 3
C, A1, B, M = spd(D_IN, 0), spd(D_IN + 1, 1), spd(D_OUT, 2), randn(D_IN, seed=3)


def centered():
    return CenteredKronecker(covariance=C, mean=M, output=B)


def block_diagonal(name="0"):
    blocks = {
        name: Block(centered(), ("w", "b")),
        "1": Block(Kronecker(C, B), ("v",), layout=Layout("transposed")),
        "space": Block(Dense(B), ("c",)),
    }
    shapes = ((D_OUT, D_IN), (D_OUT,), (D_IN, D_OUT), (D_OUT,))
    return BlockDiagonal(blocks, Space(shapes, ("w", "b", "v", "c")))


OPERATORS = {
    "Kronecker": lambda: Kronecker(C, B),
    "KroneckerEigen": lambda: Kronecker(C, B).power(-0.5, 0.1),
    "Homogeneous": lambda: Homogeneous(Kronecker(A1, B)),
    "Homogeneous inverse": lambda: Homogeneous(Kronecker(A1, B)).inverse(0.1),
    "CenteredKronecker": centered,
    "Centered": lambda: centered().inverse(0.1, damping_style="centered").inverse(),
    "CenteredInverse": lambda: centered().inverse(0.1, damping_style="centered"),
    "CenteredPower": lambda: centered().inverse(0.1, damping_style="centered").inverse().power(-0.5, 0.1),
    "CoordinateInverse": lambda: CoordinateBlocks(C[0] ** 2, M, C[1] ** 2).inverse(0.1, damping_style="centered"),
    "of an inverse with plain damping": lambda: centered().inverse(0.1),
    "CenteredInverse in units": lambda: centered().inverse(0.1, damping_style="factored", units=2 * torch.ones_like(M)),
    "CenteredInverse factored": lambda: centered().inverse(0.1, damping_style="factored"),
    "Dense": lambda: Dense(spd(D_OUT * D_IN, 4), Space(((D_OUT, D_IN),), ("w",))),
    "Dense without names": lambda: Dense(B),
}


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_restored_operator_acts_as_before_bit_for_bit(kind):
    op = OPERATORS[kind]()
    again = restore(saved_and_loaded(dump(op)))
    assert type(again) is type(op)
    assert again.space == op.space
    v = randn(op.space.size, seed=5)
    assert torch.equal(again @ v, op @ v)
    assert again.dtype == op.dtype


@pytest.mark.parametrize("name", ["0", "kind"])
@pytest.mark.parametrize("change", [lambda op: op, lambda op: op.inverse(0.1)], ids=["matrix", "inverse"])
def test_a_restored_block_diagonal_acts_as_before_whatever_its_layers_are_called(change, name):
    op = change(block_diagonal(name))
    again = restore(saved_and_loaded(dump(op)))
    v = randn(op.space.size, seed=5)
    assert torch.equal(again @ v, op @ v)
    assert again.space == op.space
    assert list(again.layers) == list(op.layers)


def test_the_operations_of_a_restored_operator_are_those_of_the_original():
    op = centered()
    again = restore(dump(op))
    assert torch.equal(again.to_dense(), op.to_dense())
    assert torch.equal(again.inverse(0.1).to_dense(), op.inverse(0.1).to_dense())
    assert again.logdet() == op.logdet()


def test_a_dump_holds_the_tensors_themselves():
    assert dump(Kronecker(C, B))["A"] is C


@pytest.mark.parametrize("value", [None, 3, "text", torch.ones(2, dtype=f64)], ids=str)
def test_what_is_no_operator_stays_as_it_is(value):
    assert restore(dump(value)) is value


def test_an_unknown_kind_is_named_with_those_known():
    with pytest.raises(ValueError, match="is of kind 'Toeplitz', which is unknown to this version of natgrad"):
        restore({"kind": "Toeplitz"})
    state = dump(Homogeneous(Kronecker(A1, B)))
    state["stacked"]["kind"] = "Toeplitz"
    with pytest.raises(ValueError, match="'Toeplitz'"):
        restore(state)


class TestLoading:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
            natgrad.load(tmp_path / "none.safetensors")

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "matrix").write_text("not a matrix")
        with pytest.raises(ValueError, match=r"matrix is not a safetensors file .*expected one that save\(\) wrote"):
            natgrad.load(tmp_path / "matrix")

    def test_tensors_of_something_else(self, tmp_path):
        save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "weights")
        with pytest.raises(ValueError, match="holds 2 tensors but no natgrad matrix"):
            natgrad.load(tmp_path / "weights")

    def test_a_later_format(self, tmp_path):
        Dense(B).save(tmp_path / "matrix")
        with safetensors.safe_open(tmp_path / "matrix", framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        save_file(tensors, tmp_path / "matrix", metadata | {"format": "2"})
        with pytest.raises(
            ValueError, match=r"has format '2', but this version of natgrad reads '1'.*compute the matrix"
        ):
            natgrad.load(tmp_path / "matrix")

    def test_the_matrix_of_another_model(self, tmp_path):
        model, other = nn.Linear(D_IN, D_OUT, dtype=f64), nn.Linear(D_IN, D_OUT + 1, dtype=f64)
        data = (randn(5, D_IN), randn(5, D_OUT))
        natgrad.fisher(model, nn.MSELoss(), data).save(tmp_path / "matrix")
        assert natgrad.load(tmp_path / "matrix", model=model).space.size == D_OUT * (D_IN + 1)
        with pytest.raises(ValueError, match=r"for another model: its 'weight' of shape \(3, 4\) has shape \(4, 4\)"):
            natgrad.load(tmp_path / "matrix", model=other)
        with pytest.raises(ValueError, match=r"'weight' of shape .* is not a parameter of"):
            natgrad.load(tmp_path / "matrix", model=nn.Sequential(model))

    def test_what_holds_a_model_is_not_saved(self, tmp_path):
        data = (randn(5, D_IN), randn(5, D_OUT))
        implicit = natgrad.fisher(nn.Linear(D_IN, D_OUT, dtype=f64), nn.MSELoss(), data, "implicit")
        with pytest.raises(TypeError, match=r"holds a model and data.*structure='kfac'"):
            implicit.save(tmp_path / "matrix")
