"""What users get wrong about posteriors, influence, pruning, unlearning, rounding."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from of_data_and_losses import LABELS, X, fisher, net
from of_models import CE

MODEL = net().eval()
DATA = X, LABELS
NUMBERS = X, torch.randn(8, 3)


def laplace(loss=CE, data=DATA, **options):
    return natgrad.laplace(MODEL, loss, data, **options)


def influence(train=DATA, query=DATA, **options):
    return natgrad.influence(MODEL, CE, train, query, **options)


def lds(scores=None, retrain=lambda kept, seed: torch.zeros(2), **options):
    return natgrad.lds(torch.randn(2, 8) if scores is None else scores, retrain, **options)


def lds_from(line):
    path = Path(tempfile.mkdtemp()) / "results.jsonl"
    lds(subsets=2, path=path)
    path.write_text(path.read_text() + line + "\n")
    lds(subsets=2, path=path)


def unlearn(F=None, **options):
    model = net()
    return natgrad.unlearn(model, CE, DATA, F or fisher(model), **options)


def quantize(structure="kfac", *more, **options):
    model = net()
    return natgrad.quantize(model, fisher(model, structure=structure), *more, **options)


TERMS = {"class": nn.CrossEntropyLoss(), "box": nn.MSELoss()}


def through_checkpoints(checkpoints=None, times=1.0, **options):
    return influence(checkpoints=[MODEL.state_dict()] if checkpoints is None else checkpoints, times=times, **options)


def with_a_nan():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    return model


def of_terms():
    """A posterior of two losses of one output."""
    return natgrad.laplace(
        MODEL, TERMS, DATA, forward=lambda m, b: (dict.fromkeys(TERMS, m(b[0])), {"class": b[1], "box": NUMBERS[1]})
    )


def a_penalty_of_a_hessian():
    model = net()
    penalty = natgrad.ewc(model, -1 * fisher(model, structure="dense"))
    nn.init.normal_(model[0].weight)
    penalty()


# fmt: off
ROWS = [
    # Posteriors
    ("a subset that is cut short", lambda: laplace(subset="last"), ValueError,
     "subset='last' is unknown; expected 'all', 'last_layer', or names", "; did you mean 'last_layer'?"),
    ("inputs to predict in another precision", lambda: laplace().predict(X.double()), ValueError,
     "a batch has a tensor of dtype torch.float64, and the model's parameters have torch.float32; expected the same"),
    ("queries on another device", lambda: influence(query=(X.to("meta"), LABELS)), ValueError,
     "a batch is on meta and the model on cpu; expected both on one device: x.to('cpu')"),
    ("targets of training that are NaN", lambda: natgrad.influence(MODEL, nn.MSELoss(), (X, NUMBERS[1] * torch.nan),
     NUMBERS), ValueError, "the scores of 8 training examples are not finite, of which the first is example 0"),
    ("a prior of zero", lambda: laplace(prior_precision=0), ValueError,
     "prior_precision=0 for '0.weight' is not usable: expected a finite number > 0", "use a small one, such as 1e-3"),
    ("a prediction under a robust loss", lambda: laplace(nn.HuberLoss(), NUMBERS).predict(X), TypeError,
     "HuberLoss gives no distribution of targets at the model's outputs", "use P.functional_variance(x)"),
    ("a posterior of nothing", lambda: laplace(data=(X, torch.full_like(LABELS, -100))).fit_prior(), ValueError,
     "the data do not depend on the weights: their curvature is zero", "look for targets that are all ignored"),
    ("a posterior of targets that are NaN", lambda: laplace(nn.MSELoss(), (X, NUMBERS[1] * torch.nan)), ValueError,
     "the loss over the data is nan; look for NaN or inf in the targets"),
    ("a prediction for one example without an axis", lambda: laplace().predict(X[0]), ValueError,
     "x has shape (4,) and the model's output (3,); expected a first axis of examples", "x.unsqueeze(0)"),
    ("the noise of a loss that has none", lambda: laplace().log_marginal_likelihood(sigma_noise=1.0), ValueError,
     "sigma_noise is the noise of one nn.MSELoss, and the loss is CrossEntropyLoss", "leave it out"),
    ("the noise of several losses", lambda: of_terms().fit_prior(noise=True), ValueError,
     "noise=True is for one loss: with several losses the matrix depends on their noises", "sigma_noise={...}"),
    ("a term that is none", lambda: of_terms().predict(X, term="boxes"), ValueError,
     "term='boxes' is unknown; expected one of 'class', 'box'; did you mean 'box'?"),
    # Influence
    ("one checkpoint, not in a list", lambda: through_checkpoints(dict(MODEL.state_dict())), TypeError,
     "checkpoints is a dict", "expected a list of state dicts"),
    ("checkpoints without times", lambda: through_checkpoints(times=None), ValueError,
     "checkpoints= needs times=; give the learning rate times the number of steps"),
    ("a time that is NaN", lambda: through_checkpoints(times=float("nan")), ValueError,
     "times has nan; expected numbers above zero"),
    ("checkpoints of another model", lambda: through_checkpoints([nn.Linear(2, 2).state_dict()]), ValueError,
     "checkpoints[0] is of another model: '0.weight' is not in it; expected a state dict of this model"),
    ("a whole training's checkpoint", lambda: through_checkpoints([{"model": MODEL.state_dict()}]), ValueError,
     "checkpoints[0] is of another model: '0.weight' is not in it; expected a state dict of this model"),
    ("self-influence through checkpoints", lambda: through_checkpoints(query=None), ValueError,
     "with checkpoints= there is no self-influence; give query="),
    ("training data that are shuffled", lambda: influence(DataLoader(TensorDataset(*DATA), shuffle=True)), ValueError,
     "train is a DataLoader that shuffles, so the order of the scores would be unknown", "shuffle=False"),
    ("factors of other weights", lambda: influence(factors=fisher(net())), ValueError,
     "factors were computed at other weights of the model: '0.weight' has changed since", "To use them as they are"),
    ("the top of too many", lambda: influence().top(9), ValueError,
     "k=9 is not usable: expected a whole number, at least 1 and at most the 8 training examples"),
    ("scores that are not finite", lambda: lds(torch.full((2, 8), torch.nan)), ValueError,
     "16 of 16 scores are not finite; look for a damping that is too small"),
    ("a seed below zero", lambda: lds(seed=-1), ValueError,
     "seed=-1 is not usable: expected a whole number, at least 0"),
    ("scores of no query", lambda: lds(torch.ones(0, 8)), ValueError,
     "scores are of no query; expected real numbers, of at least one query"),
    ("subsets of all examples", lambda: lds(fraction=0.99), ValueError,
     "fraction=0.99 of 8 training examples are 8; expected at least 1, and fewer than all"),
    ("a path that is a number", lambda: lds(path=3), TypeError, "path is an int; expected the name of a file"),
    ("a line that is no result", lambda: lds_from('{"subset": 1}'), ValueError,
     "has a line that is not a result, '{\"subset\": 1}'; expected those that natgrad.lds wrote", "give another path"),
    # Editing
    ("a model with a NaN", lambda: natgrad.prune(with_a_nan(), 1.0 * fisher(MODEL)), ValueError,
     "'0.weight' of the model has entries that are not finite; look for a training that diverged"),
    ("a model that is none", lambda: natgrad.merge([MODEL, "m"], [fisher(MODEL)] * 2), TypeError,
     "model is a str; expected an instance of torch.nn.Module"),
    ("a merge of one model", lambda: natgrad.merge(MODEL, fisher(MODEL)), TypeError,
     "models is a Sequential; expected a list with one for each model"),
    ("pruning by products alone", lambda: natgrad.prune(MODEL, fisher(MODEL, structure="implicit")), TypeError,
     "the inverse of F (ImplicitGaussNewton) has no diagonal", "use structure='kfac'"),
    ("a penalty of an indefinite matrix", a_penalty_of_a_hessian, ValueError,
     "F is indefinite: its curvature is -", "use the Fisher information, natgrad.fisher"),
    ("unlearning without steps", lambda: unlearn(steps=0), ValueError,
     "steps=0 is not usable: expected a whole number of steps, at least 1"),
    ("unlearning at no price", lambda: unlearn(increase=0), ValueError,
     "increase=0 is not usable: expected a number > 0"),
    ("rounding to no bits", lambda: quantize("kfac", 0), ValueError,
     "bits=0 is not usable: expected a whole number of bits, at least 1"),
    ("rounding by a diagonal", lambda: quantize("diagonal"), TypeError,
     "'0.weight' is held as diagonal, which is no Kronecker product; use structure='kfac' or 'kfoc'"),
    ("low rank of none", lambda: fisher(structure="low_rank", rank=0), ValueError,
     "rank=0 is not usable: expected a whole number of eigenvalues, at least 1"),
]
