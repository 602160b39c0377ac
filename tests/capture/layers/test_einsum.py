"""`torch.einsum` with a weight: the affine map that it is, or a refusal by name."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.capture.layers.einsum import affine_map
from oracles import close, f64, randn

LOSS = nn.CrossEntropyLoss()
SIZES = {"n": 5, "t": 4, "i": 3, "j": 2, "h": 2, "d": 3, "o": 4}
# Of an input and a weight, in either order.
AFFINE = [
    "ni,oi->no",
    "ni,io->no",
    "nti,oi->nto",
    "oi,nti->nto",
    "nti,ihd->nthd",
    "nti,hdi->nhtd",
    "nthd,hdi->nti",
    "nthd,ihd->nti",
    "ntij,ijo->nto",
    "nijt,jio->nto",
    "...i,oi->...o",
    "oi,...i->...o",
    "nti,io",
    "nti , io -> nto",
]
OTHERS = ["nti,i->nti", "nti,tio->nto", "nti,nio->nto", "nti,oi->no", "nti,oij->nto", "nti,hid->nthd", "ni,hd->nihd"]


def operands(equation, weight_is_second=True):
    left = equation.replace(" ", "").split("->")[0].split(",")
    sizes = [[SIZES[i] for i in term.replace("...", "nt")] for term in left]
    return [randn(*s, seed=k) for k, s in enumerate(sizes)]


@pytest.mark.parametrize("equation", AFFINE)
def test_the_value_is_einsums(equation):
    a, b = operands(equation)
    close(affine_map(equation, a, b), torch.einsum(equation, a, b), 1e-12)
    close(affine_map(equation, [a, b]), torch.einsum(equation, [a, b]), 1e-12)


@pytest.mark.parametrize("equation", [*OTHERS, "nti,oi,o->nto", "nii,oi->no", "nti->nt"])
def test_other_equations_are_left_to_torch(equation):
    assert affine_map(equation, *operands(equation.replace("nii", "nij"))) is NotImplemented


def test_an_axis_that_is_spread_is_none_of_its_maps():
    assert affine_map("ni,io->no", randn(5, 3), randn(1, 4)) is NotImplemented
    assert affine_map("ni,io->no", randn(5, 1), randn(3, 4)) is NotImplemented


class Net(nn.Module):
    def __init__(self, equation, fused=True):
        super().__init__()
        terms = equation.replace(" ", "").split("->")[0].replace("...", "nt").split(",")
        self.second = "n" in terms[0]
        self.equation, self.function = equation, torch.einsum if fused else affine_map
        shapes = [[SIZES[i] for i in term] for term in terms]
        self.shape, weight = shapes if self.second else shapes[::-1]
        self.w = nn.Parameter(randn(*weight))
        self.to(f64)

    def forward(self, x):
        pair = (x, self.w) if self.second else (self.w, x)
        return self.function(self.equation, *pair).tanh().flatten(1)


@pytest.mark.parametrize("equation", AFFINE)
@pytest.mark.parametrize("structure", ["block", "diagonal", "kfac"])
def test_the_curvature_is_autograds(equation, structure):
    net = Net(equation)
    x = randn(*net.shape)
    data = (x, torch.arange(len(x)) % 4)
    F = natgrad.fisher(net, LOSS, data, structure).to_dense()
    dense = natgrad.fisher(net, LOSS, data, "dense").to_dense()
    if structure == "block":
        close(F, dense, 1e-10)
    elif structure == "diagonal":
        close(F.diagonal(), dense.diagonal(), 1e-10)
    else:  # that of a linear layer
        close(F, natgrad.fisher(Net(equation, fused=False), LOSS, data, structure).to_dense(), 1e-12)


@pytest.mark.parametrize("equation", OTHERS)
def test_others_are_refused(equation):
    net = Net(equation)
    x = randn(*net.shape)
    with pytest.raises(NotImplementedError, match="no layer kind covers 'w'"):
        natgrad.fisher(net, LOSS, (x, torch.zeros(len(x), dtype=torch.long)), "block")
