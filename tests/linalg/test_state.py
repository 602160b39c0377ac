"""Operators as plain dictionaries, and back."""

import io

import pytest
import torch

from natgrad.linalg import Block, BlockDiagonal, CenteredKronecker, Dense, Homogeneous, Kronecker, Layout, Space
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
    "Centered": lambda: centered().inverse(0.1).inverse(),
    "CenteredInverse exact": lambda: centered().inverse(0.1),
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
    with pytest.raises(ValueError, match="is of kind 'Toeplitz'; expected one of Kronecker"):
        restore({"kind": "Toeplitz"})
    state = dump(Homogeneous(Kronecker(A1, B)))
    state["stacked"]["kind"] = "Toeplitz"
    with pytest.raises(ValueError, match="'Toeplitz'"):
        restore(state)
