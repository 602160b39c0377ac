"""Options in one object are those given one by one."""

import inspect

import pytest
import torch
from torch import nn

import natgrad
from natgrad import Damping, Intervals
from oracles import fit

SAME = [
    ({"damping": Damping(0.1)}, {"damping": 0.1}),
    ({"damping": Damping(0.1, style="exact"), "lr": 0.1}, {"damping": 0.1, "damping_style": "exact", "lr": 0.1}),
    ({"damping": Damping(decay=0.5, floor=0.2)}, {"damping_decay": 0.5, "damping_floor": 0.2}),
    ({"damping": Damping(decay=0.5), "damping_floor": 0.2}, {"damping_decay": 0.5, "damping_floor": 0.2}),
    ({"intervals": Intervals(1, 2, adapt=3)}, {"statistics_every": 1, "inverses_every": 2, "adapt_every": 3}),
    ({"intervals": Intervals(1), "inverses_every": 2}, {"statistics_every": 1, "inverses_every": 2}),
    ({"intervals": Intervals(bases=2), "structure": "ekfac"}, {"bases_every": 2, "structure": "ekfac"}),
    ({"damping": Damping(), "intervals": Intervals()}, {}),
]


def trained(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    opt = make(model)
    x = torch.randn(40, 4)
    fit(opt, model, x, x[:, :3].argmax(1), 12)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), opt.diagnostics["damping"]


@pytest.mark.parametrize(("together", "apart"), SAME)
def test_kfac(together, apart):
    a, b = (trained(lambda m, o=o: natgrad.KFAC(m, nn.CrossEntropyLoss(), **o)) for o in (together, apart))
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    assert a[1] == b[1]


def test_natural_gradient():
    a, b = (
        trained(lambda m, o=o: natgrad.NaturalGradient(m, nn.CrossEntropyLoss(), **o))
        for o in ({"damping": Damping(decay=0.5)}, {"damping_decay": 0.5})
    )
    assert a[1] == b[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": Damping(decay=0.5), "damping_decay": 0.5}, r"Damping\(decay=0.5\) and damping_decay=0.5 .* twice"),
        ({"damping": Damping(style="exact"), "damping_style": "factored"}, "given twice; leave one of them out"),
        ({"intervals": Intervals(adapt=2), "adapt_every": 3}, r"Intervals\(adapt=2\) and adapt_every=3"),
        ({"intervals": 5}, r"intervals is .*5.*; expected natgrad.Intervals"),
        ({"intervals": Damping(1.0)}, "expected natgrad.Intervals"),
        ({"damping": Intervals(1)}, r"expected a number, natgrad.Damping"),
        ({"damping": Damping(-1.0)}, "damping"),
        ({"damping": Damping(floor=-1.0)}, "damping_floor"),
        ({"damping": Damping(style="odd")}, "damping_style"),
        ({"intervals": Intervals(statistics=0)}, "statistics_every"),
    ],
)
def test_what_is_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(natgrad.KFAC.__init__)(
            natgrad.KFAC.__new__(natgrad.KFAC), nn.Linear(2, 2), nn.MSELoss(), **options
        )


def test_options_that_the_exact_step_has_not():
    with pytest.raises(ValueError, match=r"Damping\(floor=0.1\) is not an option of NaturalGradient"):
        natgrad.NaturalGradient(nn.Linear(2, 2), nn.MSELoss(), damping=Damping(floor=0.1))
