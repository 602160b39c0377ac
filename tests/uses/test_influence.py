"""Influence scores against brute force: every gradient by autograd, the damped matrix inverted whole."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import natgrad
from models import MODELS
from natgrad.uses.scores import Scores
from oracles import close, dense_curvature, f64, net, randn

DAMPING = 0.05
STRUCTURES = ["dense", "block", "kfac", "ekfac", "low_rank", "diagonal", "implicit"]


def problem(loss=None):
    torch.manual_seed(0)
    train, query = (randn(20, 4), torch.arange(20) % 3), (randn(5, 4, seed=7), torch.arange(5) % 3)
    return net(4, 6, 3).eval(), loss or nn.CrossEntropyLoss(), train, query


def gradients(model, loss, data, params=None):
    """`(n, size)`: of every example's own loss."""
    leaves = [p for n, p in model.named_parameters() if params is None or params(n)]
    x, y = data
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, leaves, strict=True)])
        )
    return torch.stack(rows)


def brute(matrix, model, loss, train, query, damping=DAMPING):
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=f64))
    return gradients(model, loss, query) @ inverse @ gradients(model, loss, train).mT


LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "its sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 0.5], dtype=f64)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_the_scores_of_the_whole_matrix_are_those_of_brute_force(structure, name):
    model, loss, train, query = problem(LOSSES[name])
    found = natgrad.influence(model, loss, train, query, structure, damping=DAMPING)
    matrix = dense_curvature(model, loss, [train])
    close(found, brute(matrix, model, loss, train, query), 1e-8)


class Odd(nn.Module):
    """A parameter that no layer kind covers: its rows come from autograd alone."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(randn(4, 3))

    def forward(self, x):
        return (x @ self.a.exp()).sin()


@pytest.mark.parametrize("model", [Odd(), net(4, 6, 3)], ids=["autograd", "layers"])
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_examples_whose_target_is_ignored_have_a_score_of_zero(structure, model):
    _, loss, (x, y), query = problem(nn.CrossEntropyLoss(reduction="sum"))
    y = y.clone()
    y[[0, 7, 8]] = -100
    found = natgrad.influence(model.eval(), loss, (x, y), query, structure, damping=DAMPING)
    close(found, brute(dense_curvature(model, loss, [(x, y)]), model, loss, (x, y), query), 1e-8)
    close(found[:, [0, 7, 8]], torch.zeros(5, 3, dtype=f64), 0)


def test_squared_errors_likewise():
    model, loss = net(4, 6, 3).eval(), nn.MSELoss()
    train, query = (randn(20, 4), randn(20, 3, seed=2)), (randn(5, 4, seed=7), randn(5, 3, seed=3))
    found = natgrad.influence(model, loss, train, query, "dense", damping=DAMPING)
    close(found, brute(dense_curvature(model, loss, [train]), model, loss, train, query), 1e-9)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structures_scores_are_those_of_its_own_matrix(structure, centered):
    model, loss, train, query = problem()
    found = natgrad.influence(model, loss, train, query, structure, damping=DAMPING, centered=centered)
    F = natgrad.fisher(model, loss, train, structure, centered=centered)
    close(found, brute(F.to_dense(), model, loss, train, query), 1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_example_with_itself(structure):
    model, loss, train, _ = problem()
    both = natgrad.influence(model, loss, train, train, structure, damping=DAMPING)
    close(natgrad.influence(model, loss, train, structure=structure, damping=DAMPING), both.diagonal(), 1e-8)
    assert both.diagonal().min() > 0


def test_batches_change_nothing():
    model, loss, (x, y), (a, b) = problem()
    expected = natgrad.influence(model, loss, (x, y), (a, b))
    found = natgrad.influence(model, loss, iter([(x[:7], y[:7]), (x[7:], y[7:])]), [(a[:2], b[:2]), (a[2:], b[2:])])
    close(found, expected)


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_refined_they_come_to_those_of_the_exact_matrix(structure):
    model, loss, (x, y), query = problem()
    train = [(x[:9], y[:9]), (x[9:], y[9:])]
    exact = natgrad.influence(model, loss, train, query, "dense", damping=DAMPING)
    errors = []
    for steps in (0, 2, 100):
        found = natgrad.influence(model, loss, train, query, structure, damping=DAMPING, refine=steps)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[2] < 2e-3 < errors[1] < errors[0]
    itself = natgrad.influence(model, loss, train, structure=structure, damping=DAMPING, refine=100)
    exact = natgrad.influence(model, loss, train, structure="dense", damping=DAMPING)
    close(itself, exact, 2e-3 * float(exact.max()))


def test_query_gradients_of_low_rank():
    model, loss, train, query = problem()
    whole = natgrad.influence(model, loss, train, query, damping=DAMPING)
    errors = [
        float((natgrad.influence(model, loss, train, query, damping=DAMPING, rank=r) - whole).norm() / whole.norm())
        for r in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-10


def tagger():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.mid(self.embed(x)).tanh()).transpose(1, 2)

    y = torch.randint(3, (8, 6))
    y[2, :3] = -100
    return Tagger().double().eval(), (torch.randint(7, (8, 6)), y)


def test_tokens_share_out_their_examples_score():
    model, data = tagger()
    query, loss, linear = (
        (data[0][:3], data[1][:3]),
        nn.CrossEntropyLoss(),
        ["mid.weight", "mid.bias", "head.weight", "head.bias"],
    )
    how = {"damping": DAMPING, "params": linear}
    by_token = natgrad.influence(model, loss, data, query, per="token", **how)
    assert by_token.shape == (3, 8, 6)
    close(by_token.sum(2), natgrad.influence(model, loss, data, query, **how))
    assert not by_token[:, 2, :3].any()  # there every gradient is zero
    with pytest.raises(ValueError, match="layer 'embed' has no inputs by position where others have 6"):
        natgrad.influence(model, loss, data, query, per="token")


@pytest.mark.parametrize("tied", [False, True])
def test_query_gradients_of_embeddings_of_low_rank(tied):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.out.weight = self.words.weight if tied else self.out.weight

        def forward(self, x):
            return self.out(self.words(x).tanh()).mT

    torch.manual_seed(0)
    model, loss, x = Words().double(), nn.CrossEntropyLoss(), torch.randint(11, (12, 5))
    queries = [(x[:2], x[:2]), (x[2:3], x[2:3])]
    whole = natgrad.influence(model, loss, (x, x), queries, damping=0.1)
    errors = [(natgrad.influence(model, loss, (x, x), queries, damping=0.1, rank=r) - whole).norm() for r in (1, 3, 4)]
    assert errors[0] > errors[1] > 1e-3 * whole.norm()
    assert errors[2] < 1e-12 * whole.norm()


class Sometimes(nn.Module):
    """A network whose middle layer some batches do not use."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        z = self.first(x).tanh()
        return self.last(self.middle(z).tanh() if x[0, 0] > 0 else z)


@pytest.mark.parametrize("rank", [None, 2, 6])
@pytest.mark.parametrize("first", ["uses it", "does not"])
def test_a_layer_that_some_batches_do_not_use(rank, first):
    torch.manual_seed(0)
    model, loss, x = Sometimes().double(), nn.CrossEntropyLoss(), randn(20, 4)
    batches = [(part, torch.arange(len(part)) % 3) for part in (x[x[:, 0] > 0], x[x[:, 0] <= 0])]
    batches = batches if first == "uses it" else batches[::-1]
    g = torch.cat([gradients(model, loss, batch) for batch in batches])
    F = natgrad.fisher(model, loss, batches, "ekfac").to_dense()
    expected = g @ torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=f64), g.mT)
    found = natgrad.influence(model, loss, batches, batches, damping=0.1, rank=rank)
    close(found, expected, 1e-10 if rank != 2 else 0.05)
    if rank is None:
        dense = natgrad.fisher(model, loss, batches, "dense").to_dense() + 0.1 * torch.eye(len(F), dtype=f64)
        refined = natgrad.influence(model, loss, batches, batches, "diagonal", damping=0.1, refine=60)
        close(refined, g @ torch.linalg.solve(dense, g.mT), 5e-3)


@pytest.mark.parametrize("query", [True, False])
def test_training_targets_that_are_no_numbers_are_named(query):
    model, x, y = net(4, 6, 3), randn(10, 4), randn(10, 3, seed=1)
    y[7, 1] = torch.nan
    with pytest.raises(ValueError, match=r"the scores of 1 training examples are not finite.* first is example 7"):
        natgrad.influence(model, nn.MSELoss(), (x, y), (x[:2], y[:2]) if query else None)


def test_any_measure_of_a_query():
    model, loss, train, query = problem()
    found = natgrad.influence(model, loss, train, query, "dense", damping=DAMPING, measure=lambda f, y: -f[:, 0])
    matrix = dense_curvature(model, loss, [train])
    inverse = torch.linalg.inv(matrix + DAMPING * torch.eye(len(matrix), dtype=f64))
    wanted = gradients(model, lambda f, y: -f[0, 0], query)
    close(found, wanted @ inverse @ gradients(model, loss, train).mT)


def test_a_measure_of_no_query_is_refused():
    model, loss, train, _ = problem()
    with pytest.raises(ValueError, match="measure= is of the queries, and there are none; give query="):
        natgrad.influence(model, loss, train, measure=lambda f, y: f[:, 0])


def test_factors_are_used_again(tmp_path):
    model, loss, train, query = problem()
    F = natgrad.fisher(model, loss, train, "ekfac")
    F.save(tmp_path / "factors.safetensors")
    found = natgrad.influence(model, loss, train, query, factors=natgrad.load(tmp_path / "factors.safetensors"))
    assert torch.equal(found, natgrad.influence(model, loss, train, query))
    with pytest.raises(ValueError, match=r"factors are of another model or of other parameters: '0.weight' has shape"):
        natgrad.influence(net(4, 7, 3), loss, train, query, factors=F)
    with pytest.raises(ValueError, match="give the matrix of this model, and the same params="):
        natgrad.influence(model, loss, train, query, factors=F, params=["0.weight"])


def test_leaving_an_example_out_changes_the_loss_by_its_score():
    """A linear model, where the first order is nearly all: retrained without an example."""
    torch.manual_seed(0)
    model, loss, n = nn.Linear(3, 1).double().eval(), nn.MSELoss(), 60
    x, y = randn(n, 3), randn(n, 1, seed=1)
    decay = 0.1

    def solution(kept):
        X = torch.cat([x[kept], torch.ones(len(kept), 1, dtype=f64)], 1)
        A = 2 * X.mT @ X / n + decay * torch.eye(4, dtype=f64)
        return torch.linalg.solve(A, 2 * X.mT @ y[kept] / n)[:, 0]

    def put(theta):
        with torch.no_grad():
            model.weight.copy_(theta[None, :3])
            model.bias.copy_(theta[3:])

    query = randn(4, 3, seed=5), randn(4, 1, seed=6)
    put(solution(torch.arange(n)))
    scores = natgrad.influence(model, loss, (x, y), query, "dense", damping=decay)
    before = (model(query[0]) - query[1]).square()[:, 0].detach()
    for i in (0, 3, 11):
        put(solution(torch.tensor([j for j in range(n) if j != i])))
        after = (model(query[0]) - query[1]).square()[:, 0].detach()
        found, predicted = after - before, scores[:, i].as_subclass(torch.Tensor) / n
        assert (found - predicted).norm() < 0.2 * predicted.norm()


def test_the_largest_scores():
    scores = Scores(torch.tensor([[0.1, -2.0, 0.7], [3.0, 1.0, 2.0]]))
    assert scores.top(2).indices.tolist() == [[2, 0], [0, 2]]
    assert scores.top(1, against=True).values.tolist() == [[-2.0], [1.0]]
    with pytest.raises(ValueError, match="at most the 3 training examples"):
        scores.top(4)


@pytest.mark.parametrize("name", ["GPT-2", "ViT", "ResNet", "LoRA"])
def test_models_that_people_have(name):
    torch.manual_seed(0)
    example = MODELS[name]()
    example.model.eval()
    loss, query = nn.CrossEntropyLoss(), [(example.x[:2], example.y[:2])]
    found = natgrad.influence(example.model, loss, example.data, query, forward=example.forward)
    assert found.shape == (2, len(example.x))
    if name == "LoRA":
        return

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = example.model

        def forward(self, x):
            return example.forward(self.inner, (x, None))[0]

    g = gradients(Read().double(), loss, (example.x if name == "GPT-2" else example.x.double(), example.y))
    own = natgrad.influence(
        example.model, loss, [(example.x if name == "GPT-2" else example.x.double(), example.y)], structure="diagonal",
        damping=1e6, forward=example.forward,
    )  # fmt: skip
    close(1e6 * own, g.square().sum(1), 1e-3)  # all but F + λ = λ


def test_a_query_without_a_gradient_is_named():
    model, data = tagger()
    y = data[1][:3].clone()
    y[1] = -100
    with pytest.raises(ValueError, match="query 1 has no gradient"):
        natgrad.influence(model, nn.CrossEntropyLoss(), data, (data[0][:3], y))
    with pytest.raises(ValueError, match="query 0 has no gradient"):
        natgrad.influence(model, nn.CrossEntropyLoss(), data, data, measure=lambda f, y: torch.zeros(len(f), dtype=f64))


def test_an_indefinite_matrix_is_said():
    model, loss, train, query = problem()
    H = -1 * natgrad.hessian(model, loss, train, "dense")
    with pytest.raises(ValueError, match="singular or indefinite"):
        natgrad.influence(model, loss, train, query, factors=H, damping=1e-3)


def test_factors_that_do_not_fit_are_said():
    model, loss, train, query = problem()
    F = natgrad.fisher(model, loss, train)
    with pytest.raises(ValueError, match=r"factors are torch.float32 on cpu.*factors.to\('cpu', torch.float64\)"):
        natgrad.influence(model, loss, train, query, factors=F.to(torch.float32))
    with pytest.raises(TypeError, match="factors is a dict; expected a matrix"):
        inspect.unwrap(natgrad.influence)(model, loss, train, query, factors={})
    for structure in ("dense", "implicit"):
        H = natgrad.hessian(model, loss, train, structure)
        with pytest.raises((ValueError, RuntimeError), match=r"indefinite|not positive definite"):
            natgrad.influence(model, loss, train, query, factors=H, damping=1e-6)


def test_factors_of_other_weights_are_refused(tmp_path):
    model, loss, train, query = problem()
    for structure in ("kfac", "dense"):
        F = natgrad.fisher(model, loss, train, structure)
        F.save(tmp_path / "factors.safetensors")
        other = net(4, 6, 3)  # of the same shapes
        for factors in (F, natgrad.load(tmp_path / "factors.safetensors"), F.to("cpu")):
            with pytest.raises(ValueError, match=r"computed at other weights of the model: '0.weight' has changed"):
                natgrad.influence(other, loss, train, query, factors=factors)
        assert natgrad.influence(other, loss, train, query, factors=1.0 * F).shape == (5, 20)
    H = natgrad.hessian(model, loss, train, "dense")
    with pytest.raises(ValueError, match="computed at other weights"):
        natgrad.influence(other, loss, train, query, factors=H)


class Shuffled:
    """Batches in another order at each pass."""

    def __init__(self, x, y):
        self.batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, len(x), 5)]

    def __iter__(self):
        self.batches = self.batches[1:] + self.batches[:1]
        return iter(self.batches)


class Mixed:
    """A batch sampler that says nothing of its order."""

    def __iter__(self):
        return iter(torch.randperm(20).view(5, 4).tolist())

    def __len__(self):
        return 5


def test_data_in_a_random_order_are_refused():
    model, loss, train, query = problem()
    data = TensorDataset(*train)
    drawn, mixed = BatchSampler(RandomSampler(data), 4, False), Mixed()
    for many in (
        DataLoader(data, 4, shuffle=True),
        DataLoader(data, batch_sampler=drawn),
        DataLoader(data, batch_sampler=mixed),
        Shuffled(*train),
    ):
        with pytest.raises(ValueError, match=r"(first batch of train|train is a DataLoader that shuffles)"):
            natgrad.influence(model, loss, many, query)
        with pytest.raises(ValueError, match=r"(first batch of query|query is a DataLoader that shuffles)"):
            natgrad.influence(model, loss, train, many)
    found = natgrad.influence(model, loss, DataLoader(TensorDataset(*train), 7), query)
    close(found, natgrad.influence(model, loss, train, query))


def test_a_model_in_training_mode_is_warned_of():
    _, loss, train, query = problem()
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.warns(RuntimeWarning, match="'1' \\(Dropout\\) is in training mode"):
        natgrad.influence(model, loss, train, query)
