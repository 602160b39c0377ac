"""What is predicted for influence scores, against a hand's computation and against what a matrix holds."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.curvature.problem import Problem
from natgrad.curvature.structures import KfacStructure
from natgrad.distributed.plan import Machine
from natgrad.distributed.scoring import EIGEN, Scoring, predict_influence
from natgrad.distributed.sizes import MODELS, Size, sizes_of
from test_plan import planned

ONE = Machine(flops=1.0, inverse_flops=1.0, bandwidth=1.0, latency=0.0)


def test_one_layer_by_hand():
    layer = Size.affine("fc", 3, 2, cases=5)  # 8 parameters, factors 9 + 4
    p = predict_influence([layer], 1, ONE, Scoring(train=10, queries=4, batch=2))
    products, outer = 5 * 2 * 6, 5 * 2 * 13
    assert p.seconds["factors"] == 10 * (5 * products + 2 * outer)
    assert p.seconds["eigenbases"] == EIGEN * (27 + 8)
    assert p.seconds["queries"] == 4 * (3 * products + 2 * 2 * 6 * 5)
    assert p.seconds["scores"] == 10 * (3 * products + 4 * 2 * 8)
    assert p.sending == 0
    assert p.held == 4 * (8 + 2 * 5 * 5 + 2 * 4 * 8 + 2 * 8 + 2 * 13)
    low = predict_influence([layer], 1, ONE, Scoring(train=10, queries=4, rank=1, batch=2))
    assert low.seconds["scores"] == 10 * (2 * products + 5 * 2 * 4 * 5)
    assert low.held == 4 * (8 + 2 * 5 * 5 + 4 * 5 + 2 * 2 * 8 + 2 * 8 + 2 * 13)


def test_the_matrix_is_as_large_as_planned():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    data = torch.randn(20, 6), torch.arange(20) % 3
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "ekfac", centered=False, params=["0.weight", "2.weight"])
    held = sum(t.numel() for _, t in tensors(F.state_dict()))
    structure = KfacStructure()
    problem = Problem(model, nn.CrossEntropyLoss(), data, params=["0.weight", "2.weight"])
    structure.add(next(iter(problem.cases())))
    sizes = sizes_of(structure.moments, problem.parameters, 20)
    factors = sum(a * b for s in sizes for a, b in s.shapes)
    assert held == factors + sum(s.parameters for s in sizes)  # two bases, and the eigenvalues


def tensors(state, name=""):
    if isinstance(state, torch.Tensor):
        yield name, state
    for key, value in (
        state.items() if isinstance(state, dict) else enumerate(state if isinstance(state, (list, tuple)) else ())
    ):
        yield from tensors(value, f"{name}.{key}")


def test_ranks_share_the_training_data():
    layers = MODELS["gpt2-small"]()
    one, two = (predict_influence(layers, n, Machine(), Scoring(100_000, rank=8)) for n in (1, 2))
    assert two.seconds["scores"] == one.seconds["scores"] / 2
    assert two.time < 0.51 * one.time
    assert two.held == one.held


def test_the_command_plans_influence(capsys):
    code, said = planned(capsys, "gpt2-small", "--influence", "100000", "--ranks", "1,8")
    assert code == 0
    assert "124.4M parameters" in said.out
    assert said.out.count("does not fit") == 2
    assert "Gradients of low rank take less memory" in said.out
    code, said = planned(capsys, "gpt2-small", "--influence", "100000", "--rank", "8", "--ranks", "1,8")
    assert code == 0
    assert "does not fit" not in said.out


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--influence", "0"], "--influence was 0; expected a number of examples, at least 1"),
        (["--influence", "10", "--queries", "-1"], "--queries was -1; expected a number of examples"),
        (["--influence", "10", "--rank", "0"], "--rank was 0; expected the rank of query gradients"),
    ],
)
def test_mistakes_of_a_plan_of_influence_are_one_line(capsys, option, words):
    code, said = planned(capsys, "gpt2-small", *option)
    assert code == 2
    assert words in said.err
