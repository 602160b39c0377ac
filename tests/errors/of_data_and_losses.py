"""What users get wrong about data, losses and options of a matrix."""

import torch
from torch import nn
from torch.distributions import Normal

import natgrad
from natgrad.losses import Likelihood

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
ONE = nn.Linear(4, 1)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def planes() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))


def fisher(model=None, loss=None, data=(X, LABELS), *more, **options):
    return natgrad.fisher(model or net(), loss or nn.CrossEntropyLoss(), data, *more, **options)


def read_twice():
    data = iter([(X, LABELS)])
    fisher(data=data)
    fisher(data=data)


PAIR = "expected an (input, target) pair"
OF_ANOTHER_FORM = "For batches of another form pass forward=lambda model, batch: (output, target)"
AN_INSTANCE = "expected an instance of one of nn.CrossEntropyLoss(), nn.MSELoss()"

# fmt: off
ROWS = [
    ("batches that grow, of what has no length", lambda: natgrad.GrowingBatches(iter(X), 1, 4, 2), TypeError,
     "data is a tuple_iterator, which has no length; expected a data set, or range(n)"),
    ("inputs in another precision", lambda: fisher(data=(X.double(), LABELS)), ValueError,
     "a batch has a tensor of dtype torch.float64, and the model's parameters have torch.float32; expected the same"),
    ("inputs that are whole numbers", lambda: fisher(data=(LABELS[:, None].expand(8, 4), LABELS)), ValueError,
     "a batch has a tensor of dtype torch.int64 where the model takes torch.float32; expected x.to(torch.float32)"),
    ("inputs on another device", lambda: fisher(data=(X.to("meta"), LABELS)), ValueError,
     "a batch is on meta and the model on cpu; expected both on one device: x.to('cpu')"),
    # Functions as models
    ("a function without its parameters", lambda: natgrad.fisher(lambda p, x: x, nn.MSELoss(), (X, X)), TypeError,
     "model is a function; expected an instance of torch.nn.Module", "or of a function f(params, x) natgrad.Function"),
    ("parameters that are no tensors", lambda: natgrad.jacobian(lambda p, x: x, X, params={"W": [1.0]}), TypeError,
     "params has a list of 1 as 'W'; expected a floating tensor"),
    ("parameters without names", lambda: natgrad.Function(lambda p, x: x, [X]), TypeError,
     "params is a list of 1; expected a dictionary of tensors by name"),
    ("a function that is none", lambda: natgrad.Function(1.0, {"W": X}), TypeError,
     "function is a float; expected a function f(params, x)"),
    # The loss
    ("a class of losses", lambda: fisher(loss=nn.MSELoss), TypeError,
     "loss is the class MSELoss; ", AN_INSTANCE, "did you mean nn.MSELoss()?"),
    ("a function of torch's as loss", lambda: fisher(loss=nn.functional.cross_entropy), TypeError,
     "loss is a function; ", AN_INSTANCE, "did you mean nn.CrossEntropyLoss()?"),
    ("a function of one's own as loss", lambda: fisher(loss=lambda f, y: (f - y).mean()), TypeError,
     "loss is a function; ", AN_INSTANCE, "or natgrad.losses.Likelihood(fn)"),
    ("no loss", lambda: natgrad.fisher(net(), None, (X, LABELS)), TypeError, "loss is None; ", AN_INSTANCE),
    ("a loss of log-probabilities", lambda: fisher(loss=nn.NLLLoss()), ValueError,
     "NLLLoss: output has entries above zero; expected log-probabilities, as by log_softmax, or nn.CrossEntropyLoss"),
    ("a function of a hinge loss", lambda: fisher(loss=nn.functional.multi_margin_loss), TypeError,
     "loss is a function; ", AN_INSTANCE, "did you mean nn.MultiMarginLoss()?"),
    ("a hinge loss at positions", lambda: fisher(planes(), nn.MultiMarginLoss()), ValueError,
     "MultiMarginLoss: output has shape (8, 2, 2); expected (examples, classes): flatten positions into axis 0"),
    ("a hinge loss of floats", lambda: fisher(loss=nn.MultiMarginLoss(), data=(X, LABELS.float())), ValueError,
     "MultiMarginLoss: target has dtype torch.float32; expected class indices of dtype torch.int64 (target.long())"),
    ("a loss without curvature", lambda: fisher(loss=nn.MultiLabelMarginLoss()), TypeError,
     "loss is a MultiLabelMarginLoss; ", AN_INSTANCE, "natgrad.losses.Convex(fn) for a loss of one's own",
     "nn.MultiLabelSoftMarginLoss(), whose labels are 0 and 1, is supported"),
    ("a distribution in place of a function", lambda: Likelihood(Normal(0, 1)), TypeError,
     "Likelihood: fn is a Normal; expected a function of the output that returns one: lambda f: Normal(f, 1.0)"),
    ("a reduction that is misspelt", lambda: Likelihood(lambda f: Normal(f, 1.0), reduction="men"), ValueError,
     "reduction='men' is unknown: expected one of 'mean', 'sum'; did you mean 'mean'?"),
    # Targets
    ("a list of labels", lambda: fisher(data=(X, LABELS.tolist())), TypeError,
     "CrossEntropyLoss: target is a list of 8; expected a Tensor, as by torch.as_tensor(target)"),
    ("no labels", lambda: fisher(data=(X, None)), TypeError, "CrossEntropyLoss: target is None; expected a Tensor"),
    ("labels as floats", lambda: fisher(data=(X, LABELS.float())), ValueError,
     "CrossEntropyLoss: target has dtype torch.float32; expected class indices of dtype torch.int64 (target.long())"),
    ("labels on another device", lambda: fisher(data=(X, LABELS.to("meta"))), ValueError,
     "CrossEntropyLoss: target is on meta and output on cpu; expected one device: target.to('cpu')"),
    ("labels in a column", lambda: fisher(data=(X, LABELS[:, None])), ValueError,
     "CrossEntropyLoss: output has shape (8, 3) and target (8, 1); expected class indices of shape (8,)"),
    ("classes on the last axis, as language models have them",
     lambda: fisher(model=nn.Linear(4, 3), data=(torch.randn(2, 5, 4), torch.zeros(2, 5).long())), ValueError,
     "output has shape (2, 5, 3) and target (2, 5)", "classes are on axis 1", "output.movedim(-1, 1)"),
    ("classes in place of logits", lambda: fisher(forward=lambda m, b: (m(b[0]).argmax(1), b[1])), ValueError,
     "CrossEntropyLoss: output has shape (8,); expected (examples, classes, ...)", "logits and not classes"),
    ("a scalar output", lambda: fisher(ONE, nn.MSELoss(), forward=lambda m, b: (m(b[0]).mean(), X.mean())), ValueError,
     "MSELoss: output is a scalar; expected an axis of examples first: output.unsqueeze(0)"),
    ("complex targets", lambda: fisher(ONE, nn.MSELoss(), (X, X[:, :1] + 0j)), ValueError,
     "MSELoss: target has dtype torch.complex64; expected a real one, such as target.real"),
    ("complex counts", lambda: fisher(ONE, nn.PoissonNLLLoss(), (X, X[:, :1] + 0j)), ValueError,
     "PoissonNLLLoss: target has dtype torch.complex64; expected counts: a real one"),
    ("whole numbers as probabilities", lambda: fisher(ONE, nn.BCEWithLogitsLoss(), (X, LABELS[:, None])), ValueError,
     "BCEWithLogitsLoss: target has dtype torch.int64; expected a floating one: target.to(output.dtype)"),
    # Data
    ("no data", lambda: natgrad.fisher(net(), nn.CrossEntropyLoss(), None), ValueError, "data is None; ", PAIR),
    ("inputs alone", lambda: fisher(data=X), ValueError, "data is a Tensor of shape (8, 4); ", PAIR),
    ("a dictionary", lambda: fisher(data={"x": X, "y": LABELS}), ValueError, "data is a dict; ", PAIR),
    ("inputs and targets apart", lambda: natgrad.fisher(net(), nn.CrossEntropyLoss(), X, LABELS), TypeError,
     "structure is a Tensor; expected its name, and data as one pair: (model, loss, (input, target), structure)"),
    ("a generator without batches", lambda: fisher(data=(b for b in ())), ValueError,
     "data is empty: expected at least one (input, target) batch. A generator", "make a new one, or give a list"),
    ("an iterator that was read", read_twice, ValueError, "data is empty: ", "make a new one, or give a list"),
    ("batches of three", lambda: fisher(data=[(X, LABELS, LABELS)]), ValueError,
     "a batch is a tuple of 3; ", PAIR, OF_ANOTHER_FORM),
    ("batches of inputs", lambda: fisher(data=[X, X, X]), ValueError,
     "a batch is a Tensor of shape (8, 4); ", PAIR, OF_ANOTHER_FORM),
    ("arrays of NumPy", lambda: fisher(data=(X.numpy(), LABELS.numpy())), ValueError,
     "a batch is a NumPy array; ", PAIR),
    ("a forward that returns the output", lambda: fisher(forward=lambda m, b: m(b[0])), ValueError,
     "forward returned a Tensor of shape (8, 3); expected a pair (output, target)"),
    ("a forward that is none", lambda: fisher(forward=3), TypeError,
     "forward is an int; expected a function of the model and a batch that returns (output, target)"),
    # Options
    ("a structure that is misspelt", lambda: fisher(structure="kfacc"), ValueError,
     "structure='kfacc' is unknown: expected one of 'implicit', 'dense', ", "; did you mean 'kfac'?"),
    ("a structure in capitals", lambda: fisher(structure="EKFAC"), ValueError, "; did you mean 'ekfac'?"),
    ("a structure that is cut short", lambda: fisher(structure="diag"), ValueError, "; did you mean 'diagonal'?"),
    ("two structures", lambda: fisher(structure=["kfac", "dense"]), ValueError,
     "structure is a list of 2: expected one of 'implicit', "),
    ("a structure of the Hessian that is misspelt",
     lambda: natgrad.hessian(net(), nn.CrossEntropyLoss(), (X, LABELS), "implicti"), ValueError,
     "structure='implicti' is unknown: ", "; did you mean 'implicit'?"),
    ("an estimator that is misspelt", lambda: fisher(estimator="exakt"), ValueError,
     "estimator='exakt' is unknown: expected one of 'exact', 'mc', 'empirical'; did you mean 'exact'?"),
    ("a sharing that is misspelt", lambda: fisher(sharing="expnd"), ValueError,
     "sharing='expnd' is unknown: expected one of 'expand', 'reduce'; did you mean 'expand'?"),
    ("half a sample", lambda: fisher(estimator="mc", samples=0.5), ValueError,
     "samples=0.5 is not usable: expected a whole number, at least 1"),
    ("samples in quotes", lambda: fisher(estimator="mc", samples="1"), ValueError, "samples='1' is not usable: "),
    ("max_dim in quotes", lambda: fisher(max_dim="9"), ValueError,
     "max_dim='9' is not usable: expected a whole number of rows, at least 1"),
    ("centered in words", lambda: fisher(centered="no"), ValueError,
     "centered='no' is not usable: expected True or False"),
    ("a dtype in quotes", lambda: fisher(dtype="float64"), TypeError,
     "dtype='float64' is not usable: expected a floating torch.dtype, such as torch.float64"),
    ("a dtype of whole numbers", lambda: fisher(dtype=torch.int64), TypeError, "dtype=torch.int64 is not usable: "),
    ("a seed in place of a generator", lambda: fisher(estimator="mc", generator=0), TypeError,
     "generator is an int; expected a torch.Generator, such as torch.Generator().manual_seed(0)"),
    ("half a permutation", lambda: natgrad.residual(net(), nn.CrossEntropyLoss(), (X, LABELS), permutations=0.5),
     ValueError, "permutations=0.5 is not usable: expected a whole number, at least 0"),
    ("a layer that is misspelt", lambda: natgrad.residual(net(), nn.CrossEntropyLoss(), (X, LABELS))["00"], KeyError,
     "no layer is called '00'; expected one of '0', '2'; did you mean '0'?"),
]
