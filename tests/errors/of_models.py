"""What users get wrong about models and their parameters."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import natgrad
from natgrad.checks.parameters import check_parameters
from natgrad.checks.values import check_generator
from of_data_and_losses import LABELS, X, fisher, net

CE = nn.CrossEntropyLoss()


def kfac(model):
    return natgrad.KFAC(model, CE)


def with_weight(change) -> nn.Module:
    """A model whose weight is made of one by `change`."""
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(change(model.weight.data))
    return model


def partly_frozen() -> nn.Module:
    model = net()
    model[0].weight.requires_grad_(False)
    return model


def on_two_devices():
    with FakeTensorMode():
        check_parameters({"a": torch.empty(2, device="cpu"), "b": torch.empty(2, device="cuda")})


def sparse_gradients():
    model = nn.Sequential(nn.Embedding(9, 2, sparse=True), nn.Flatten(), nn.Linear(4, 3))
    opt = natgrad.PRONG(model, lr=0.1)
    CE(model(torch.arange(16).view(8, 2) % 9), LABELS).backward()
    opt.step()


PARAMETERS = "model is a generator; expected an instance of torch.nn.Module: give the model itself, not its parameters"

# fmt: off
ROWS = [
    ("a class of models", lambda: fisher(nn.Linear), TypeError,
     "model is the class Linear; expected an instance of torch.nn.Module: write its parentheses"),
    ("a function as model", lambda: fisher(lambda x: x), TypeError,
     "model is a function; expected an instance of torch.nn.Module: give the model itself"),
    ("parameters in place of the model", lambda: fisher(net().parameters()), TypeError, PARAMETERS, "params="),
    ("parameters given to KFAC", lambda: natgrad.KFAC(net().parameters(), CE), TypeError, PARAMETERS),
    ("parameters given to NaturalGradient", lambda: natgrad.NaturalGradient(net().parameters(), CE), TypeError,
     PARAMETERS),
    ("parameters given to PRONG", lambda: natgrad.PRONG(net().parameters(), 0.1), TypeError, PARAMETERS),
    # Parameters that nothing can be done with
    ("a model without parameters", lambda: fisher(nn.Tanh()), ValueError,
     "no trainable parameter is selected; expected a model with some, and it has none, trainable or not: ",
     "give another model"),
    ("a frozen model", lambda: kfac(net().requires_grad_(False)), ValueError,
     "no trainable parameter is selected; ", "all of its 4 are frozen: call model.requires_grad_(True)"),
    ("complex parameters", lambda: kfac(with_weight(lambda w: w + 0j)), ValueError,
     "parameter 'weight' is complex (torch.complex64); expected a real one"),
    ("sparse parameters", lambda: fisher(with_weight(torch.Tensor.to_sparse)), ValueError,
     "parameter 'weight' is sparse (torch.sparse_coo); expected a dense one: .to_dense()"),
    ("parameters of eight bits", lambda: kfac(with_weight(lambda w: w.to(torch.float8_e5m2))), ValueError,
     "parameter 'weight' has dtype torch.float8_e5m2; expected float32, float64, bfloat16 or float16: model.float()"),
    ("a model on meta", lambda: kfac(net().to("meta")), ValueError,
     "parameter '0.weight' is on the meta device and has no values; ", "model.to_empty(device=...)"),
    ("a lazy model", lambda: kfac(nn.LazyLinear(3)), ValueError,
     "parameter 'weight' has no shape yet, as its layer is lazy; ", "run the model on a batch first"),
    ("a model on two devices", on_two_devices, ValueError,
     "parameter 'a' is on cpu and 'b' on cuda:0; expected one device: model.to(device), or select"),
    ("a generator of another device", lambda: check_generator(torch.Generator(), torch.device("cuda:1")), ValueError,
     "generator is on cpu and the model on cuda:1; expected one device: torch.Generator('cuda:1')"),
    ("gradients of a sparse embedding", sparse_gradients, ValueError,
     "the gradient of '0.weight' is sparse; expected a dense one: make its layer with sparse=False"),
    # Which parameters
    ("a predicate that selects nothing", lambda: fisher(params=lambda n: "fc" in n), ValueError,
     "params selects no trainable parameter of the model; expected some of 0.weight, 0.bias, 2.weight, 2.bias"),
    ("a name that is misspelt", lambda: fisher(params=["0.wieght"]), ValueError,
     "params names '0.wieght', which is not a trainable parameter of the model; ", "; did you mean '0.weight'?"),
    ("a module's name", lambda: fisher(params="2"), ValueError,
     "params names '2', ", "; for all of that module: params=lambda name: name.startswith('2.')"),
    ("a frozen parameter's name", lambda: fisher(partly_frozen(), params=["0.weight"]), ValueError,
     "params names '0.weight', which is frozen; call requires_grad_(True) on it, or leave it out"),
    ("tensors in place of names", lambda: fisher(params=list(net().parameters())), TypeError,
     "params holds a Parameter of shape (5, 4); expected names of parameters"),
    ("a number of parameters", lambda: fisher(params=3), TypeError,
     "params is an int; expected names of parameters, or a predicate on names"),
    ("a number of parameters for KFAC", lambda: natgrad.KFAC(net(), CE, params=3), TypeError,
     "params is an int; expected parameters of the model, their names, a predicate on names, or groups of them"),
    ("parameters of another model", lambda: natgrad.KFAC(net(), CE, params=net().parameters()), ValueError,
     "params has a tensor of shape (5, 4) that is not a parameter of the model; expected some of 0.weight, "),
    ("a group without parameters", lambda: natgrad.KFAC(net(), CE, params=[{"lr": 0.1}]), ValueError,
     "a group has 'lr' and no 'params'; expected its parameters under that key"),
    ("a group's setting that is misspelt",
     lambda: natgrad.KFAC(net(), CE, params=[{"params": lambda n: True, "weight_decey": 0.1}]), ValueError,
     "a group has 'weight_decey'; expected settings among lr, momentum, ", "; did you mean 'weight_decay'?"),
    # What the model returns
    ("a model that returns NaN", lambda: fisher(data=(X * torch.nan, LABELS)), ValueError,
     "24 of 24 entries of the model's output are not finite; look for NaN or inf in the batch or in the parameters"),
    ("an output that depends on nothing", lambda: fisher(forward=lambda m, b: (m(b[0]).detach(), b[1])), ValueError,
     "the output does not depend on any trainable parameter; expected"),
]
