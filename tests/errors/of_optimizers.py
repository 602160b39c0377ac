"""What users get wrong about the optimizers, and about the order of their calls."""

import tempfile

import torch
from torch import nn

import natgrad
from of_data_and_losses import LABELS, X, net

CE = nn.CrossEntropyLoss()


def kfac(model: nn.Module | None = None, **options):
    return natgrad.KFAC(model or net(), CE, **options)


def prong(**options):
    return natgrad.PRONG(net(), **{"lr": 0.1, **options})


def natural(**options):
    return natgrad.NaturalGradient(net(), CE, **options)


def step(opt, x=X) -> None:
    loss = opt.loss(opt.model(x), LABELS)
    opt.zero_grad()
    loss.backward()
    opt.step()


def calls(*does):
    """An optimizer, and what is done with it, one after the other."""

    def run() -> None:
        opt = kfac()
        for do in does:
            do(opt)

    return run


def replace_layer(opt) -> None:
    opt.model[2] = nn.Linear(5, 3)


def load(state):
    return lambda opt: opt.load_state_dict(state())


def loss(opt):
    return opt.loss(opt.model(X), LABELS)


ORDER = "expected loss = opt.loss(model(x), y); loss.backward(); opt.step()"
WHOLE_STEPS = " is not usable: expected a whole number of steps, at least 1"

# fmt: off
ROWS = [
    # Options
    ("a step size in quotes", lambda: kfac(lr="0.1"), ValueError,
     "lr='0.1' is not usable: expected a number >= 0, or None"),
    ("a step size that is true", lambda: kfac(lr=True), ValueError, "lr=True is not usable: "),
    ("a step size as a tensor", lambda: kfac(lr=torch.tensor(0.1)), ValueError,
     "lr is a Tensor of shape (), which is not usable: expected a number >= 0, or None"),
    ("no weight decay", lambda: kfac(weight_decay=None), ValueError,
     "weight_decay=None is not usable: expected a number >= 0"),
    ("a damping of the wrong sign", lambda: kfac(damping=-1.0), ValueError,
     "damping=-1.0 is not usable: expected a number >= 0, or None"),
    ("a structure that the optimizer lacks", lambda: kfac(structure="block"), ValueError,
     "structure='block' is unknown: expected one of 'kfac', 'ekfac', 'input', 'diagonal', 'identity'"),
    ("a bias update that is misspelt", lambda: kfac(bias_update="simpel"), ValueError, "did you mean 'simple'?"),
    ("an estimator of KFAC that is misspelt", lambda: kfac(estimator="mcc"), ValueError, "did you mean 'mc'?"),
    ("a precision that is misspelt", lambda: kfac(matmul_precision="hihg"), ValueError,
     "matmul_precision='hihg' is unknown: expected one of 'highest', 'high', 'medium', or None; did you mean 'high'?"),
    ("half a step between statistics", lambda: kfac(statistics_every=0.5), ValueError,
     f"statistics_every=0.5{WHOLE_STEPS}"),
    ("no step between inverses", lambda: kfac(inverses_every=0), ValueError, f"inverses_every=0{WHOLE_STEPS}"),
    ("a share above one", lambda: kfac(statistics_share=2), ValueError,
     "statistics_share=2 is not usable: expected a number in (0, 1], or None"),
    ("a decay of one", lambda: kfac(decay=1.0), ValueError, "decay=1.0 is not usable: expected a number in [0, 1)"),
    ("a decay in quotes", lambda: kfac(decay="0.9"), ValueError, "decay='0.9' is not usable: "),
    ("a damping decay of zero", lambda: kfac(damping_decay=0), ValueError,
     "damping_decay=0 is not usable: expected a number in (0, 1]"),
    ("a damping floor below zero", lambda: kfac(damping_floor=-1.0), ValueError, "damping_floor=-1.0 is not usable: "),
    ("a bound of zero", lambda: kfac(max_kl=0), ValueError, "max_kl=0 is not usable: expected a number > 0, or None"),
    ("an average of one", lambda: kfac(average=1), ValueError, "average=1 is not usable: expected a number in [0, 1)"),
    ("centering in words", lambda: kfac(centered="yes"), ValueError, "centered='yes' is not usable: expected True or"),
    ("an output that is no function", lambda: kfac(output="logits"), TypeError,
     "output is a str; expected a function from what the model returns to what the loss takes"),
    ("a seed for KFAC", lambda: kfac(generator=0), TypeError, "generator is an int; expected a torch.Generator"),
    ("a bound without a model", lambda: kfac(structure="input", orthogonalize=True, lr=0.1, momentum=0.9, max_kl=1.0),
     ValueError, "max_kl with orthogonalize=True needs an adaptive step size; leave out lr, or max_kl"),
    ("PRONG without a step size", lambda: prong(lr=None), ValueError, "lr=None is not usable: expected a number >= 0"),
    ("a loss given to PRONG", lambda: natgrad.PRONG(net(), CE), ValueError, "lr is a CrossEntropyLoss, which is not"),
    ("PRONG's epsilon of zero", lambda: prong(epsilon=0), ValueError, "epsilon=0 is not usable: expected a number > 0"),
    ("PRONG's half a step", lambda: prong(every=0.5), ValueError, f"every=0.5{WHOLE_STEPS}"),
    ("a solver that is not there", lambda: natural(solver="gc"), ValueError,
     "solver='gc' is unknown: expected one of 'dual', 'primal', 'cg', or None"),
    ("a tolerance of one", lambda: natural(tolerance=1), ValueError,
     "tolerance=1 is not usable: expected a number in (0, 1), or None"),
    ("no iterations", lambda: natural(max_iterations=0), ValueError, "max_iterations=0 is not usable: "),
    ("a random matrix by products", lambda: natural(solver="cg", estimator="mc"), ValueError,
     "solver='cg' works only with estimator='exact'; got estimator='mc': leave one of them out"),
    # Calls
    ("a step at once", calls(lambda opt: opt.step()), RuntimeError, f"step() came before any loss: {ORDER}"),
    ("a step without backward", calls(loss, lambda opt: opt.step()), RuntimeError,
     f"step() came before loss.backward(): {ORDER}"),
    ("a loss of the module itself", calls(lambda opt: CE(opt.model(X), LABELS).backward(), lambda opt: opt.step()),
     RuntimeError, f"step() came before any loss that opt.loss gave: {ORDER}"),
    ("two steps of one loss", calls(step, lambda opt: opt.step()), RuntimeError,
     "step() came before any loss that opt.loss gave: "),
    ("a loss in evaluation", calls(lambda opt: opt.model.eval(), loss), RuntimeError,
     "opt.loss follows a forward of the model in training mode with gradients enabled", "call model.train()"),
    ("a detached output", calls(lambda opt: opt.loss(opt.model(X).detach(), LABELS)), ValueError,
     "opt.loss was given a tensor without a graph; expected the model's output: do not call detach() on it"),
    ("output and target swapped", calls(lambda opt: opt.loss(LABELS, opt.model(X))), ValueError,
     "CrossEntropyLoss: output has shape (8,); expected (examples, classes, ...)"),
    ("no output", calls(lambda opt: opt.model(X), lambda opt: opt.loss(None, LABELS)), ValueError,
     "opt.loss was given None; expected the tensor that the loss takes. Give it one of the tensors"),
    ("targets in a list", calls(lambda opt: opt.loss(opt.model(X), LABELS.tolist())), TypeError,
     "CrossEntropyLoss: target is a list of 8; expected a Tensor"),
    # A model that has changed
    ("a layer replaced", calls(step, replace_layer, step), RuntimeError,
     "the model's '2.weight' is another tensor than when this optimizer was made; make a new optimizer"),
    ("a model converted", calls(step, lambda opt: opt.model.double(), lambda opt: step(opt, X.double())), RuntimeError,
     "'0.weight' is torch.float64, but was torch.float32 at the first step; convert the model first"),
    # States
    ("a path in place of a state", calls(load(lambda: "run.pt")), TypeError,
     "state_dict is a str; expected what state_dict() gave, as by torch.load(path)"),
    ("an empty state", calls(load(dict)), ValueError,
     "the state has nothing and no 'kfac': it is not a KFAC optimizer's"),
    ("a model's state", calls(load(net().state_dict)), ValueError, "the state has '0.weight', '0.bias', ", "no 'kfac'"),
    ("a state without its figures", calls(load(lambda: kfac().state_dict() | {"kfac": {}})), ValueError,
     "the state has no 'steps' under 'kfac'; expected what state_dict() of this version gives"),
    ("a state of another structure", calls(load(kfac(structure="ekfac").state_dict)), ValueError,
     "the state is of structure='ekfac', and this optimizer has 'kfac'; make it with the same"),
    ("another optimizer's checkpoint", lambda: natgrad.load_checkpoint(prong(), tempfile.mkdtemp()), TypeError,
     "opt is a PRONG; expected a KFAC, NaturalGradient or NewtonMuon optimizer"),
    ("a folder without a checkpoint", lambda: natgrad.load_checkpoint(kfac(), tempfile.mkdtemp()), FileNotFoundError,
     "has no checkpoint (no file .metadata); expected a folder that torch.distributed.checkpoint.save has written to"),
    ("a file in place of a checkpoint", lambda: natgrad.load_checkpoint(kfac(), __file__), FileNotFoundError,
     "of_optimizers.py has no checkpoint (no file .metadata)"),
]
