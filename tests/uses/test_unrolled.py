"""Influence through checkpoints of the training, against dense matrix exponentials and against training itself,
differentiated step by step."""

import math

import pytest
import safetensors.torch
import torch
from torch import nn

import natgrad
from oracles import close, f64, net, randn
from test_influence import gradients, problem

DECAY = 0.05
STRUCTURES = ["dense", "block", "kfac", "ekfac", "low_rank", "diagonal"]


def states_of(model, count, seed=3):
    """Some states near a model's weights."""
    return [
        {n: t + 0.1 * randn(*t.shape, seed=seed + 10 * i + j) for j, (n, t) in enumerate(model.state_dict().items())}
        for i in range(count)
    ]


def at(model, state):
    other = net(4, 6, 3).eval()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_formula_by_dense_matrix_exponentials(structure):
    """Segments of one checkpoint each: `∇_q Σ S_L ⋯ S_ℓ+1 (I − S_ℓ) H_ℓ⁻¹ ∇_i,ℓ`."""
    model, loss, train, query = problem()
    states, times = states_of(model, 3), [2.0, 5.0, 1.0]
    found = natgrad.influence(
        model, loss, train, query, structure, damping=DECAY, checkpoints=states, times=times, centered=False
    )
    left, total = gradients(model, loss, query), 0.0
    for state, time in zip(reversed(states), reversed(times), strict=True):
        there = at(model, state)
        F = natgrad.fisher(there, loss, train, structure, centered=False).to_dense()
        H = F + DECAY * torch.eye(len(F), dtype=f64)
        S = torch.linalg.matrix_exp(-time * H)
        total = total + left @ (torch.eye(len(F)) - S) @ torch.linalg.inv(H) @ gradients(there, loss, train).mT
        left = left @ S
    close(found, total, 1e-8)


@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
def test_a_segments_matrix_and_gradients_are_means_over_its_checkpoints(structure):
    model, loss, train, query = problem()
    states = states_of(model, 2)
    found = natgrad.influence(
        model, loss, train, query, structure, damping=DECAY, checkpoints=states, times=1.5, segments=1
    )
    theirs = [at(model, s) for s in states]
    F = sum(natgrad.fisher(m, loss, train, structure).to_dense() for m in theirs) / 2
    H = F + DECAY * torch.eye(len(F), dtype=f64)
    gained = (torch.eye(len(F)) - torch.linalg.matrix_exp(-3.0 * H)) @ torch.linalg.inv(H)
    mean = sum(gradients(m, loss, train) for m in theirs) / 2
    close(found, gradients(model, loss, query) @ gained @ mean.mT, 1e-8)


def test_kfacs_factors_are_means_over_the_checkpoints():
    """A layer's own A and B at every checkpoint, averaged; the loss's mean and its sum alike."""
    model, loss, train, query = problem()
    states = states_of(model, 2)
    theirs = [natgrad.fisher(at(model, s), loss, train, "kfac", centered=False) for s in states]
    blocks = []
    for name in theirs[0].layers:
        A, B = (sum(getattr(F.layers[name].operator.stacked, x) for F in theirs) / 2 for x in "AB")
        blocks.append(natgrad.linalg.Homogeneous(natgrad.linalg.Kronecker(A, B)).to_dense())
    how = {"damping": DECAY, "checkpoints": states, "times": math.inf, "segments": 1}
    mean = sum(gradients(at(model, s), loss, train) for s in states) / 2
    H = torch.block_diag(*blocks)
    H = H + DECAY * torch.eye(len(H), dtype=f64)
    expected = gradients(model, loss, query) @ torch.linalg.inv(H) @ mean.mT
    close(natgrad.influence(model, loss, train, query, "kfac", **how), expected, 1e-8)
    summed, n = nn.CrossEntropyLoss(reduction="sum"), len(train[0])
    how["damping"] = n * DECAY
    close(n * natgrad.influence(model, summed, train, query, "kfac", **how), expected, 1e-8)


def test_one_checkpoint_and_infinite_time_are_the_influence_function():
    model, loss, train, query = problem()
    for structure in STRUCTURES:
        found = natgrad.influence(
            model, loss, train, query, structure, damping=DECAY, checkpoints=[model.state_dict()], times=math.inf
        )
        close(found, natgrad.influence(model, loss, train, query, structure, damping=DECAY, centered=False), 1e-9)


def test_a_short_time_is_tracin():
    """`t ∇_q · ∇_i`, to first order in the time; and over several checkpoints their sum."""
    model, loss, train, query = problem()
    states, t = states_of(model, 3), 1e-6
    found = natgrad.influence(model, loss, train, query, damping=0.0, checkpoints=states, times=t)
    left = gradients(model, loss, query)
    close(found / t, sum(left @ gradients(at(model, s), loss, train).mT for s in states), 1e-4)


def unrolled(x, y, theta, rate, steps, decay):
    """Least squares by gradient descent, and `−dθ/dε_i` of an example's weight `1/N + ε_i/N`, step by step."""
    n, d = x.shape
    H = 2 * x.mT @ x / n + decay * torch.eye(d, dtype=f64)
    change, states = torch.zeros(d, n, dtype=f64), []
    for _ in range(steps):
        states.append(theta)
        residual = x @ theta - y
        change = change - rate * (H @ change) + rate * (2 * residual[:, None] * x).mT
        theta = theta - rate * (2 * x.mT @ residual / n + decay * theta)
    return theta, change, states


@pytest.mark.parametrize("steps", [20, 400])
def test_against_training_that_is_differentiated_step_by_step(steps):
    """Of a linear model, whose Hessian is the same at all steps. What remains is the change of the gradients within a
    segment, which falls with the number of segments, and the difference of `(1 − ηh)^K` and `e^(−ηKh)`, with `η`."""
    x, y, query, wanted = randn(30, 4), randn(30, seed=1), randn(5, 4, seed=2), randn(5, seed=3)
    total, decay = 2.0, 0.1
    rate = total / steps
    theta, change, states = unrolled(x, y, randn(4, seed=4), rate, steps, decay)
    model = nn.Linear(4, 1, bias=False).double().eval()
    model.weight.data = theta[None].clone()
    left = 2 * (query @ theta - wanted)[:, None] * query
    expected, errors = left @ change, []
    for every in (steps // 2, steps // 4, steps // 20):
        middle = [{"weight": s[None]} for s in states[every // 2 :: every]]
        found = natgrad.influence(
            model, nn.MSELoss(), (x, y[:, None]), (query, wanted[:, None]), "dense", damping=decay,
            checkpoints=middle, times=rate * every,
        )  # fmt: skip
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < {20: 0.15, 400: 0.01}[steps]
    plain = natgrad.influence(model, nn.MSELoss(), (x, y[:, None]), (query, wanted[:, None]), "dense", damping=decay)
    assert float((plain - expected).norm() / expected.norm()) > 2 * errors[0]


def test_files_low_rank_tokens_and_measures(tmp_path):
    model, loss, train, query = problem()
    states = states_of(model, 2)
    torch.save(states[0], tmp_path / "one.pt")
    safetensors.torch.save_file(states[1], tmp_path / "two.safetensors")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = natgrad.influence(model, loss, train, query, checkpoints=states, times=2.0)
    files = [tmp_path / "one.pt", str(tmp_path / "two.safetensors")]
    found = natgrad.influence(model, loss, train, query, checkpoints=files, times=(2, 2))
    assert torch.equal(found, expected)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    close(natgrad.influence(model, loss, train, query, checkpoints=states, times=2.0, rank=4), expected, 1e-8)
    by_token = natgrad.influence(model, loss, train, query, checkpoints=states, times=2.0, per="token")
    close(by_token.sum(2), expected)
    assert found.top(3).indices.shape == (5, 3)


def test_large_layers_have_eigenbases_by_their_structure():
    model, loss = net(60, 50, 3).eval(), nn.CrossEntropyLoss()
    train, query = (randn(20, 60), torch.arange(20) % 3), (randn(2, 60, seed=5), torch.arange(2))
    for structure in ("kfac", "ekfac", "diagonal"):
        how = {"damping": DECAY, "checkpoints": [model.state_dict()], "times": math.inf}
        found = natgrad.influence(model, loss, train, query, structure, **how)
        close(found, natgrad.influence(model, loss, train, query, structure, damping=DECAY, centered=False), 1e-8)
    with pytest.raises(TypeError, match="without a known eigenbasis"):
        natgrad.influence(model, loss, train, query, "ekfac", centered=True, **how)


def test_what_does_not_fit_is_said(tmp_path):
    model, loss, train, query = problem()
    own = model.state_dict()

    def ask(checkpoints, times=1.0, query=query, **options):
        return natgrad.influence(model, loss, train, query, checkpoints=checkpoints, times=times, **options)

    with pytest.raises(ValueError, match="checkpoints= needs times="):
        ask([own], None)
    with pytest.raises(ValueError, match="with one for each of the 2 checkpoints"):
        ask([own, own], [1.0])
    with pytest.raises(ValueError, match=r"times has 0; expected numbers above zero"):
        ask([own, own], [1.0, 0])
    with pytest.raises(ValueError, match="3 checkpoints cannot be divided into segments=2 equal parts"):
        ask([own] * 3, segments=2)
    with pytest.raises(
        ValueError, match=r"checkpoints\[1\] is of another model: '0.weight' is .* expected a state dict"
    ):
        ask([own, net(4, 7, 3).state_dict()])
    with pytest.raises(ValueError, match=r"checkpoints\[0\] is of another model: '0.bias' is not in it"):
        ask([{n: t for n, t in own.items() if n != "0.bias"}])
    with pytest.raises(ValueError, match=r"entries of '0.weight' that are not finite"):
        ask([own | {"0.weight": own["0.weight"] * torch.nan}])
    with pytest.raises(FileNotFoundError, match=r"checkpoints\[0\] is .*, and there is no such file"):
        ask([tmp_path / "nothing.pt"])
    (tmp_path / "text.pt").write_text("mine")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        ask([tmp_path / "text.pt"])
    with pytest.raises(ValueError, match="after infinite time the matrix must be positive definite"):
        ask([own], math.inf, damping=0.0, structure="dense")
    with pytest.raises(ValueError, match="there is no self-influence; give query="):
        ask([own], query=None)
    with pytest.raises(ValueError, match="refine=3 works with one matrix"):
        ask([own], refine=3)
    with pytest.raises(ValueError, match="leave factors out"):
        ask([own], factors=natgrad.fisher(model, loss, train))
    with pytest.raises(ValueError, match="structure='implicit' has no eigenvectors"):
        ask([own], structure="implicit")
    with pytest.raises(ValueError, match="times= and segments= need checkpoints="):
        natgrad.influence(model, loss, train, query, times=1.0)


class Failing(Exception):
    pass


def test_the_model_keeps_its_weights_if_something_fails_on_the_way():
    model, loss, train, query = problem()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    calls = []

    def forward(m, batch):
        calls.append(1)
        if len(calls) == 4:
            raise Failing
        return m(batch[0]), batch[1]

    with pytest.raises(Failing):
        natgrad.influence(model, loss, train, query, checkpoints=states_of(model, 4), times=1.0, forward=forward)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
