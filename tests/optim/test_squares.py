import copy
import torch
from torch import nn
from natgrad.optim.optimizer import CurvatureOptimizer
from natgrad.optim.preconditioner.squares import Squares
from natgrad.optim.rules.damping import DampingControl, LevenbergMarquardt
from oracles import close, net, randn, f64


class Sq(CurvatureOptimizer):
    def __init__(self, model, loss, lr=None, momentum=None, damping=None):
        super().__init__(model, loss, defaults={"lr": lr, "momentum": momentum}, damping=damping)
        self._assemble(Squares(self.parameters, 0.9), DampingControl(damping, LevenbergMarquardt(0.5, 0.01)))


def test_step():
    model, x, y = net(4, 3), randn(8, 4), torch.arange(8) % 3
    loss = nn.CrossEntropyLoss()
    opt = Sq(model, loss, lr=0.1, momentum=0.0, damping=0.3)
    before = copy.deepcopy(model)
    opt.loss(model(x), y).backward()
    opt.step()
    for p, q in zip(model.parameters(), before.parameters()):
        g = p.grad
        close(p.detach(), (q - 0.1 * g / (g.square() + 0.3)).detach(), 1e-12)


def test_adaptive_and_resume():
    model, x, y = net(4, 3), randn(8, 4), torch.arange(8) % 3
    opt = Sq(model, nn.CrossEntropyLoss())
    def go(m, o, k):
        for _ in range(k):
            l = o.loss(m(x), y); o.zero_grad(); l.backward(); o.step()
        return l.item()
    a = go(model, opt, 5)
    m2 = copy.deepcopy(model); o2 = Sq(m2, nn.CrossEntropyLoss()); o2.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert go(model, opt, 5) == go(m2, o2, 5) < a
