"""Objectives of several terms: steps against matrices of the whole objective, figures against its value."""

import copy
import math

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, flatten, randn

N, D, H, C = 12, 3, 4, 3
TERMS = {"class": nn.CrossEntropyLoss(), "box": nn.MSELoss()}
X, Y, T = randn(N, D), torch.arange(N) % C, randn(N, 2, seed=1)
FIXED = {"lr": 0.1, "momentum": 0.0, "damping": 0.05}
EXACTLY = {"estimator": "exact", "statistics_share": 1.0, "decay": 0.0, "statistics_every": 1, "inverses_every": 1}
EXACTLY |= {"matmul_precision": None, "damping_style": "exact"}


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(D, H), nn.Tanh())
        self.logits, self.boxes = nn.Linear(H, C), nn.Linear(H, 2)
        self.double()

    def forward(self, x):
        h = self.trunk(x)
        return {"class": self.logits(h), "box": self.boxes(h)}


def one_forward(model, loss, weights, x=X, y=Y, t=T):
    out = model(x)
    return weights["class"] * loss["class"](out["class"], y) + weights["box"] * loss["box"](out["box"], t)


def two_forwards(model, loss, weights, x=X, y=Y, t=T):
    first = weights["class"] * loss["class"](model(x)["class"], y)
    return first + weights["box"] * loss["box"](model(x)["box"], t)


def in_microbatches(model, loss, weights, form):
    for rows in (slice(0, N // 2), slice(N // 2, N)):
        (0.5 * form(model, loss, weights, X[rows], Y[rows], T[rows])).backward()


FORMS = {
    "one forward": lambda *how: one_forward(*how).backward(),
    "two forwards": lambda *how: two_forwards(*how).backward(),
    "microbatches": lambda *how: in_microbatches(*how, one_forward),
    "microbatches of two forwards": lambda *how: in_microbatches(*how, two_forwards),
}
forms = pytest.mark.parametrize("form", FORMS)


def gradient_of(model, weights):
    """That of the objective, by autograd alone."""
    its = copy.deepcopy(model)
    one_forward(its, TERMS, weights).backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in its.named_parameters()}


def matrix(model, weights, structure):
    data = X, {"class": Y, "box": T}
    return natgrad.fisher(model, TERMS, data, structure, weights=weights)


@forms
@pytest.mark.parametrize("weights", [(1.0, 0.5), (1.0, 1.0), (0.25, 1.0)])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_a_step_is_that_of_the_whole_objectives_matrix(form, weights, structure):
    weights = dict(zip(TERMS, weights, strict=True))
    model = TwoHeads()
    start, g = flatten(dict(model.named_parameters())).clone(), gradient_of(model, weights)
    F = matrix(model, weights, "diagonal" if structure == "diagonal" else "kfac")  # which EKFAC begins with
    opt = natgrad.KFAC(model, TERMS, structure=structure, **FIXED, **EXACTLY)
    FORMS[form](model, opt.loss, weights)
    opt.step()
    style = {} if structure == "diagonal" else {"damping_style": "centered"}
    expected = start - FIXED["lr"] * flatten(F.solve(g, FIXED["damping"], **style))
    close(flatten(dict(model.named_parameters())), expected, 1e-8)
    assert opt.diagnostics["accepted"]


@forms
@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_an_exact_step_is_that_of_the_dense_matrix(form, solver):
    weights, model = {"class": 1.0, "box": 0.5}, TwoHeads()
    start, g = flatten(dict(model.named_parameters())).clone(), gradient_of(model, weights)
    F = matrix(model, weights, "dense")
    opt = natgrad.NaturalGradient(model, TERMS, lr=0.3, momentum=0.0, damping=0.05, solver=solver, tolerance=1e-12)
    FORMS[form](model, opt.loss, weights)
    opt.step()
    close(flatten(dict(model.named_parameters())), start - 0.3 * flatten(F.solve(g, 0.05)), 1e-7)


@pytest.mark.parametrize("make", [natgrad.KFAC, natgrad.NaturalGradient])
@forms
def test_the_adaptive_step_measures_the_whole_objective(make, form):
    weights, model = {"class": 1.0, "box": 2.0}, TwoHeads()
    opt = make(model, TERMS, **({"adapt_every": 1} if make is natgrad.KFAC else {}))

    def penalty():
        return 0.01 * model.trunk[0].weight.square().sum()

    def value():
        with torch.no_grad():
            return float(one_forward(model, TERMS, weights) + penalty())

    values = [value()]
    for _ in range(12):
        opt.zero_grad()
        FORMS[form](model, opt.loss, weights)
        opt.plus(penalty).backward()
        opt.step()
        values.append(value())
        assert opt.diagnostics["loss"] * 2.0 == pytest.approx(values[-2], rel=1e-9)  # in units of the heaviest mean
        if "loss_after" in opt.diagnostics and opt.diagnostics["accepted"]:
            assert opt.diagnostics["loss_after"] * 2.0 == pytest.approx(values[-1], rel=1e-7)
    assert values[-1] < 0.8 * values[0]


def test_a_term_that_is_not_asked_for_leaves_the_other_head_where_it_is():
    model = TwoHeads()
    opt = natgrad.KFAC(model, TERMS)
    for _ in range(3):
        opt.zero_grad()
        one_forward(model, opt.loss, {"class": 1.0, "box": 1.0}).backward()
        opt.step()
    before = model.boxes.weight.detach().clone()
    opt.zero_grad()
    opt.loss["class"](model(X)["class"], Y).backward()
    opt.step()
    close(model.boxes.weight, before, 0)
    assert opt.diagnostics["accepted"]
    assert opt.diagnostics["terms_left_out"] == ["box"]
    opt.zero_grad()
    one_forward(model, opt.loss, {"class": 1.0, "box": 1.0}).backward()
    opt.step()
    assert "terms_left_out" not in opt.diagnostics


@pytest.mark.parametrize("optimizer", [natgrad.KFAC, natgrad.NaturalGradient])
def test_a_mean_and_a_sum_make_one_objective(optimizer):
    """A term's reduction changes its weight and nothing else."""
    ends = []
    for box, weight in ((nn.MSELoss(), 1.0), (nn.MSELoss(reduction="sum"), 1 / T.numel())):
        model = TwoHeads()
        opt = optimizer(model, {"class": nn.CrossEntropyLoss(), "box": box}, estimator="exact")
        for _ in range(3):
            opt.zero_grad()
            one_forward(model, opt.loss, {"class": 1.0, "box": weight}).backward()
            opt.step()
        ends.append(flatten(dict(model.named_parameters())))
    close(ends[0], ends[1], 1e-9)


@pytest.mark.parametrize("maker", ["kfac", "exact"])
def test_a_policys_step_goes_to_the_bound_along_the_natural_gradient(maker):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).double()
    actions, advantages = torch.arange(N) % C, randn(N, seed=3)

    def surrogate(its):
        chosen = its(X).log_softmax(1)[range(N), actions]
        return -(advantages * chosen).mean()

    its = copy.deepcopy(model)
    surrogate(its).backward()
    g = {n: p.grad for n, p in its.named_parameters()}
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), (X, actions), "dense")
    if maker == "kfac":
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), max_kl=0.01, damping=0.1, **EXACTLY)
        K = natgrad.fisher(model, nn.CrossEntropyLoss(), (X, actions), "kfac")
        d = flatten(K.solve(g, 0.1, damping_style="centered"))
    else:
        opt = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), max_kl=0.01, damping=0.1, momentum=0.0)
        d = flatten(F.solve(g, 0.1))
    start = flatten(dict(model.named_parameters())).clone()
    logits = model(X)
    opt.predict(logits)
    opt.zero_grad()  # between prediction and backward, as in many loops
    surrogate(lambda _: logits).backward()
    opt.step()
    expected = start - math.sqrt(0.01 / (0.5 * float(d @ (F @ d)))) * d
    close(flatten(dict(model.named_parameters())), expected, 1e-7)
    assert opt.diagnostics["kl"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda opt, out: opt.loss(out["class"], Y), TypeError, "opt.loss has several terms, 'class', 'box'"),
        (lambda opt, out: opt.loss["boxes"](out["box"], T), KeyError, "no term is called 'boxes'.*'box'"),
        (lambda opt, out: opt.loss["class"](out["class"], T), ValueError, "^term 'class': CrossEntropyLoss"),
        (lambda opt, out: opt.loss["box"](out["class"], T), ValueError, "^term 'box': MSELoss: output has shape"),
    ],
    ids=["no name", "another name", "the other target", "the other head"],
)
def test_what_is_refused(call, error, said):
    model = TwoHeads()
    opt = natgrad.KFAC(model, TERMS)
    with pytest.raises(error, match=said):
        call(opt, model(X))


class Encoder(nn.Module):
    """Returns two tensors of one forward, with numbers of its own at each call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.runs = 0
        self.code, self.back = nn.Linear(D, 2 * H).double(), nn.Linear(H, D).double()

    def forward(self, x):
        self.runs += 1
        code = self.code(x)
        mean, log_variance = code.chunk(2, 1)
        return {"code": code, "x": self.back(mean + (log_variance / 2).exp() * torch.randn_like(mean))}


def divergence(code, prior):
    mean, log_variance = code.chunk(2, 1)
    return ((mean - prior["mean"] if prior else mean).square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def test_terms_of_one_forward_share_its_passes_and_a_function_needs_no_target():
    model = Encoder()
    opt = natgrad.KFAC(model, {"code": natgrad.losses.Convex(divergence), "x": nn.MSELoss()})
    runs = []
    for step in range(12):
        out = model(X)
        before = model.runs
        target = {"mean": torch.zeros(H, dtype=X.dtype)} if step % 2 else None
        loss = opt.loss["x"](out["x"], X) + 0.1 * opt.loss["code"](out["code"], target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        runs.append(model.runs - before)
        assert opt.diagnostics["accepted"]
    assert runs[5] == 1  # one pass with tangents for both terms, and none to measure


def test_a_target_within_a_dictionary_that_is_changed_in_place_is_noticed():
    model = Encoder()
    opt = natgrad.KFAC(model, {"code": natgrad.losses.Convex(divergence), "x": nn.MSELoss()}, adapt_every=1)
    prior = {"mean": torch.zeros(H, dtype=X.dtype)}
    out = model(X)
    (opt.loss["code"](out["code"], prior) + opt.loss["x"](out["x"], X)).backward()
    prior["mean"].add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        opt.step()


class Slope(nn.Module):
    """A residual made of derivatives, and a value that is read by layers."""

    def __init__(self, extra=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 1)).double()
        self.scale = nn.Parameter(torch.ones(D, dtype=torch.float64)) if extra else None

    def forward(self, x, y):
        x = x.clone().requires_grad_()
        u = self.net(x if self.scale is None else x * self.scale)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        return {"residual": ddu[:, 0] + u[:, 0] * du[:, 1], "value": self.net(y)}


@pytest.mark.parametrize("extra", [False, True], ids=["copies", "a pass for each example"])
def test_terms_with_and_without_derivatives_make_one_exact_step(extra):
    model, terms = Slope(extra), {"residual": nn.MSELoss(), "value": nn.MSELoss()}
    targets, y = {"residual": randn(N, seed=2), "value": randn(5, 1, seed=3)}, randn(5, D, seed=4)
    names = [n for n, _ in model.named_parameters()]

    def objective(model, loss):
        out = model(X, y)
        return loss["residual"](out["residual"], targets["residual"]) + 3 * loss["value"](
            out["value"], targets["value"]
        )

    its = copy.deepcopy(model)
    g = torch.autograd.grad(objective(its, terms), list(its.parameters()))
    F = 0
    for name, factor in (("residual", 1 / N), ("value", 3 / 5)):
        rows = []
        for f in its(X, y)[name].flatten():
            found = torch.autograd.grad(f, list(its.parameters()), retain_graph=True, allow_unused=True)
            pairs = zip(found, its.parameters(), strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).flatten() for r, p in pairs]))
        J = torch.stack(rows)
        F = F + 2 * factor * J.T @ J
    damping = 0.05 * 3  # in units of the heaviest term's mean
    expected = -0.3 * torch.linalg.solve(F + damping * torch.eye(len(F)), torch.cat([p.flatten() for p in g]))
    start = flatten(dict(model.named_parameters())).clone()
    opt = natgrad.NaturalGradient(model, terms, lr=0.3, momentum=0.0, damping=0.05, solver="primal")
    objective(model, opt.loss).backward()
    opt.step()
    assert names == list(dict(model.named_parameters()))
    close(flatten(dict(model.named_parameters())) - start, expected, 1e-8)


@pytest.mark.parametrize(
    ("losses", "message"),
    [({}, "loss is an empty dictionary"), ({"": nn.MSELoss()}, "name ''"), ({3: nn.MSELoss()}, "name 3")],
    ids=["no terms", "an empty name", "a number"],
)
def test_terms_need_names(losses, message):
    with pytest.raises(ValueError, match=message):
        natgrad.KFAC(nn.Linear(2, 1), losses)
