"""What a residual report says in words."""

import math

import torch
from torch import nn

import natgrad
from natgrad.report.advice import advice
from natgrad.report.residual import Condition, LayerResidual


def layer(relative=0.05, unlimited=None, A=100.0, C=50.0):
    """A layer whose block has norm 1; `unlimited` is the residual on unlimited data, by default all of it."""
    left = relative if unlimited is None else unlimited
    return LayerResidual(relative, relative, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, left**2, 0.01, Condition(A, C), 50)


def said(**layers):
    return [(a.kind, a.text) for a in advice(layers)]


def kinds(**layers):
    return [kind for kind, _ in said(**layers)]


def test_a_good_layer_needs_nothing():
    assert kinds(fc=layer(0.05)) == ["good", "do"]
    assert "nothing" in said(fc=layer(0.05))[-1][1]
    assert "layer fc" in said(fc=layer(0.05))[0][1]


def test_a_bad_one_is_named_with_what_to_do():
    found = said(good=layer(0.05), usable=layer(0.3), poor=layer(0.8))
    assert [kind for kind, _ in found] == ["good", "fair", "bad", "do"]
    assert all(name in text for name, (_, text) in zip(("good", "usable", "poor", "poor"), found, strict=True))
    assert "ekfac" in found[-1][1]
    assert "above 1" not in found[2][1]
    assert "the zero matrix is nearer" in said(poor=layer(1.2))[0][1]


def test_a_residual_of_few_cases_is_no_verdict():
    (bad, do) = said(fc=layer(0.8, unlimited=0.1))
    assert bad[0] == "bad"
    assert "more data" in do[1]
    assert "ekfac" not in do[1]
    # What is not known is taken as it is.
    assert "ekfac" in said(fc=layer(0.8, unlimited=math.nan))[-1][1]


def test_condition_numbers():
    texts = [t for _, t in said(fc=layer(A=math.inf, C=math.inf))]
    assert any("singular" in t for t in texts)
    assert any("damping above 0" in t for t in texts)
    texts = [t for _, t in said(fc=layer(A=1e9, C=1e8))]
    assert any("float32" in t for t in texts)
    assert any("torch.float64" in t for t in texts)
    assert any("centering" in t and "10 times" in t for t in texts)
    texts = [t for _, t in said(fc=layer(A=1e9, C=10.0))]
    assert not any("float32" in t for t in texts), "the covariance is what is inverted"
    # A layer without a bias has no covariance, one without a weight no factor at all.
    assert any("float32" in t for _, t in said(fc=layer(A=1e9, C=None)))
    assert kinds(fc=layer(A=None, C=None)) == ["good", "do"]


def test_many_layers_are_counted():
    some = {f"fc{i}": layer() for i in range(20)}
    assert "at all 20 layers" in said(**some)[0][1]
    assert "at 20 of 21 layers (fc0, fc1" in said(**some, poor=layer(0.9))[0][1]


def test_a_real_report():
    """A linear network with squared error, of which K-FAC is exact; and inputs that say how certain the output is, of
    which it is not."""
    x, y = torch.randn(200, 3), torch.randn(200, 2)
    report = natgrad.residual(nn.Sequential(nn.Linear(3, 2)), nn.MSELoss(), (x, y), permutations=0)
    assert {a.kind for a in advice(report)} == {"good", "do"}
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.constant_(model[0].weight, 0.0)
    with torch.no_grad():
        model[0].weight[0] = 9.0
    report = natgrad.residual(model, nn.CrossEntropyLoss(), (x, y[:, 0].gt(0).long()), permutations=0)
    assert "bad" in {a.kind for a in advice(report)}
