"""Between steps, an optimizer keeps only the forward passes whose outputs are still in use, and frees their losses."""

import gc
import weakref

import torch
from torch import nn

import natgrad
from oracles import net, randn

X, Y = randn(6, 3), torch.arange(6) % 2


class WithLoss(nn.Module):
    """A model that computes its own loss."""

    def __init__(self):
        super().__init__()
        self.net = net(3, 4, 2)

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_forward_is_dropped_once_its_output_is_gone():
    torch.manual_seed(0)
    model = net(3, 4, 2)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    kept = []
    for _ in range(3):
        output = model(X)
        opt.loss(output, Y).backward()
        opt.step()
        opt.zero_grad()
        kept.append(len(opt.tracker.watch.forwards))
        del output
    assert kept == [1, 1, 1]  # that of this step's output


def test_a_models_own_loss_is_freed_though_its_logits_are_in_use():
    torch.manual_seed(0)
    model = WithLoss()
    opt = natgrad.KFAC(model, "model")
    returned = model(X, labels=Y)
    returned["loss"].backward()
    opt.step()
    logits, gone = returned["logits"], weakref.ref(returned.pop("loss"))
    gc.collect()
    assert gone() is None
    assert len(logits) == len(X)


def test_newton_muon_keeps_the_uses_only_until_it_knows_the_routes():
    torch.manual_seed(0)
    model = net(3, 4, 2)
    opt = natgrad.NewtonMuon(model, refresh_every=1)
    kept = []
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        kept.append(len(opt._forwards._recent) + len(opt._forwards._shown.uses))
        opt.step()
    assert kept[0] > 0
    assert kept[1:] == [0, 0]
