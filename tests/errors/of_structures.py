"""What the structures cannot do: of layers, of losses, of their algebra."""

import tempfile

import torch
from torch import nn

import natgrad
from natgrad import linalg
from of_data_and_losses import LABELS, X, fisher, net
from of_models import CE
from of_optimizers import kfac, natural, step
from of_vectors import EYE, flat, matrix

BLOCK = linalg.ExactBlock(torch.ones(2, 1, 3), torch.ones(2, 1, 1, 4), bias=True)


def nan_weight(reduction: str) -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.tensor([torch.nan, 1.0, 1.0]), reduction=reduction)


class Rows(nn.Module):
    """A linear map by some rows of its weight."""

    def __init__(self, *parts):
        super().__init__()
        self.W, self.parts = nn.Parameter(torch.randn(6, 4)), parts

    def forward(self, x):
        return torch.cat([x @ self.W[part].T for part in self.parts], 1)[:, :3]


class Sometimes(nn.Module):
    """A model of two linear maps, of which a call uses one or both."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, both=True):
        return self.one(x) + self.two(x) if both else self.one(x)


def hessian(model=None, loss=CE, structure="dense"):
    return natgrad.hessian(model or net(), loss, (X, LABELS), structure)


def no_loss_reaches_it():
    model = Sometimes()
    opt = kfac(model, lr=0.1, momentum=0.0, damping=1.0)
    (opt.loss(model(X, False), LABELS) + model.two.weight.square().sum()).backward()
    opt.step()


def two_decays():
    model = net()
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters()}]
    step(natgrad.NaturalGradient(model, CE, params=groups))


def a_negative_factor():
    opt = natural(lr=0.1, damping=1.0)
    one, two = (opt.loss(opt.model(X), LABELS) for _ in range(2))
    (2 * one - two).backward()
    opt.step()


def gradients_from_elsewhere():
    model = Sometimes()
    opt = natgrad.NaturalGradient(model, CE, solver="dual")
    loss = opt.loss(model(X, False), LABELS) + model.two.weight.square().sum()
    loss.backward()
    opt.step()


def the_largest_of_bags():
    model = nn.Sequential(nn.EmbeddingBag(9, 3, mode="max"))
    opt = natgrad.NaturalGradient(model, CE, solver="cg")
    opt.loss(model(torch.arange(16).view(8, 2) % 9), LABELS).backward()
    opt.step()


def too_many_cases():
    step(natural(estimator="mc", max_size=2, lr=0.1, damping=1.0))


def a_matrix_by_itself():
    path = f"{tempfile.mkdtemp()}/kronecker"
    linalg.Kronecker(EYE, EYE).save(path)
    natgrad.load(path, model=net())


FACTORS = "has no factors to damp; use damping_style='exact'"

# fmt: off
ROWS = [
    # Layers
    ("some rows of a weight", lambda: fisher(Rows(slice(0, 3))), NotImplementedError,
     "'W' has shape (6, 4) and only some of its rows are used for the output; use structure='dense' or 'implicit', or"),
    ("rows that overlap", lambda: fisher(Rows(slice(0, 4), slice(2, 6))), NotImplementedError,
     "the rows of 'W' that are used are [(0, 4), (2, 6)]; expected them to follow one another without overlap. Use"),
    ("a parameter that no loss reaches", no_loss_reaches_it, NotImplementedError,
     "'two.weight' has a gradient, and no loss of opt.loss depends on it", "Give its loss as a term of the objective"),
    ("the largest of bags", the_largest_of_bags, NotImplementedError,
     "embedding_bag with mode='max', max_norm or scale_grad_by_freq has no forward mode; use mode='sum' or 'mean'"),
    ("gradients from elsewhere", gradients_from_elsewhere, NotImplementedError,
     "'two.weight' has a gradient but was not used in any forward that opt.loss followed; expected gradients from"),
    # Values
    ("a class weight that is NaN", lambda: fisher(loss=nan_weight("mean")), ValueError,
     "the loss's mean divides by nan; look for NaN or inf in its class weights"),
    ("a class weight that is NaN, in a sum", lambda: fisher(loss=nan_weight("sum")), ValueError,
     "the matrix of layer '0' is not finite; look for NaN or inf in the batch, the targets or the loss weights"),
    ("a class weight that is NaN, dense", lambda: fisher(loss=nan_weight("sum"), structure="dense"), ValueError,
     "the matrix has entries that are not finite; look for NaN or inf in targets or loss weights"),
    ("a class weight that is NaN, in the Hessian", lambda: hessian(loss=nan_weight("sum")), ValueError,
     "the Hessian has entries that are not finite; look for NaN or inf in targets or weights"),
    ("a Hessian that is too large", lambda: hessian(nn.Sequential(nn.Linear(4, 7000), nn.Linear(7000, 3))),
     ValueError, "the Hessian has 56003 rows, above the limit of 20000; use structure='implicit'"),
    # The optimizers' matrices
    ("two decays in one matrix", two_decays, ValueError,
     "weight_decay is 0 and 0.1 in several groups, ", "expected the same in all groups, or decoupled_"),
    ("a loss that counts negatively", a_negative_factor, ValueError,
     "a batch counts -0.125 times in the objective: ", "expected positive factors"),
    ("too many cases for a random matrix", too_many_cases, ValueError,
     "the batch has more than max_size=2 cases and the model more parameters, ", "use smaller batches, or raise "),
    ("the curvature of none", lambda: kfac(structure="identity").curvature(), TypeError,
     "structure='identity' keeps no curvature; choose another structure"),
    ("the curvature before a step", lambda: kfac().curvature(), RuntimeError,
     "there is no curvature before the first step; take one"),
    # Algebra
    ("factored damping of products", lambda: matrix("implicit").inverse(1.0, damping_style="factored"), TypeError,
     f"an implicit matrix {FACTORS}"),
    ("factored damping of a sum", lambda: (matrix() + matrix("diagonal")).inverse(1.0, damping_style="factored"),
     TypeError, f"a sum {FACTORS}"),
    ("factored damping of a part", lambda: matrix("implicit").blocks["0"].inverse(1.0, damping_style="factored"),
     TypeError, f"a restriction {FACTORS}"),
    ("too few products", lambda: matrix("implicit").solve(flat(), damping=0.1, max_iter=1), RuntimeError,
     "conjugate gradients ", "pass a larger damping"),
    ("a product with another layer's bias", lambda: BLOCK.Wb @ torch.ones(3), ValueError,
     "v has shape (3,); expected (4,), with any leading axes"),
    ("cases of two counts", lambda: linalg.ExactBlock(torch.ones(2, 1, 3), torch.ones(1, 1, 1, 4), bias=True),
     ValueError, "h has shape (2, 1, 3) and g (1, 1, 1, 4); expected (n, t, d_in) and"),
    ("a matrix without names", a_matrix_by_itself, ValueError,
     "has no parameter names; expected the matrix of a model, or leave model= out"),
]
