"""`fisher` and `gauss_newton` against autograd's Jacobians and Hessians."""

import copy

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, dense_curvature, f64, net, numel, randn

N, CLASSES = 7, 3


def indices(*shape, seed=0):
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(seed))


def binary(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).to(f64)


WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=f64)
# Each loss with a target of N examples.
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), indices(N)),
    "weight": (nn.CrossEntropyLoss(weight=WEIGHT), indices(N)),
    "ignore_index": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), indices(N)),
    "ignore -100": (nn.CrossEntropyLoss(), indices(N).index_fill(0, torch.tensor([0, 3]), -100)),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2, weight=WEIGHT), indices(N)),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), randn(N, CLASSES).softmax(1)),
    "mse": (nn.MSELoss(), randn(N, CLASSES, seed=5)),
    "bce": (nn.BCEWithLogitsLoss(), randn(N, CLASSES).sigmoid()),
    "bce weight": (nn.BCEWithLogitsLoss(weight=WEIGHT), randn(N, CLASSES).sigmoid()),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), binary(N, CLASSES)),
}


@pytest.fixture(params=list(LOSSES))
def loss_and_target(request):
    return LOSSES[request.param]


def with_reduction(loss, reduction):
    loss = copy.deepcopy(loss)
    loss.reduction = reduction
    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dense_is_the_curvature_of_autograd(loss_and_target, reduction):
    loss, y = loss_and_target
    loss, model, x = with_reduction(loss, reduction), net(4, 5, CLASSES), randn(N, 4)
    expected = dense_curvature(model, loss, [(x, y)])
    close(natgrad.fisher(model, loss, (x, y), "dense").to_dense(), expected, 1e-10)
    close(natgrad.gauss_newton(model, loss, (x, y), "dense").to_dense(), expected, 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_implicit_is_the_dense_matrix(loss_and_target, reduction):
    loss, y = loss_and_target
    loss, model, x = with_reduction(loss, reduction), net(4, 5, CLASSES), randn(N, 4)
    expected = dense_curvature(model, loss, [(x, y)])
    F, v = natgrad.fisher(model, loss, (x, y), "implicit"), randn(numel(model), seed=1)
    close(F @ v, expected @ v, 1e-10)
    close(F.quadratic(v), v @ expected @ v, 1e-10)
    damped = expected + 0.1 * torch.eye(len(v), dtype=f64)
    close(F.solve(v, 0.1), torch.linalg.solve(damped, v), 1e-8)
    close(F.to_dense(), expected, 1e-10)


def test_a_vector_comes_back_in_its_own_form():
    model, data = net(4, 5, CLASSES), (randn(N, 4), indices(N))
    v = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    flat = torch.cat([t.flatten() for t in v.values()])
    for structure in ("implicit", "dense", "kfac"):
        F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure)
        shuffled = dict(reversed(v.items()))
        out = F @ shuffled
        assert list(out) == list(v)
        close(torch.cat([out[n].flatten() for n in v]), F @ flat, 1e-12)


@pytest.mark.pairs
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
def test_several_batches_are_one(loss_and_target, structure, reduction):
    loss, y = loss_and_target
    loss, model, x = with_reduction(loss, reduction), net(4, 5, CLASSES), randn(N, 4) + 2
    whole = natgrad.fisher(model, loss, (x, y), structure)
    parts = natgrad.fisher(model, loss, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])], structure)
    close(parts.to_dense(), whole.to_dense(), 1e-10)


@pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
def test_data_may_be_an_iterator(structure):
    model, loss, x, y = net(4, CLASSES), nn.CrossEntropyLoss(), randn(N, 4), indices(N)
    F = natgrad.fisher(model, loss, iter([(x[:3], y[:3]), (x[3:], y[3:])]), structure)
    close(F.to_dense(), natgrad.fisher(model, loss, (x, y), structure).to_dense(), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_is_the_hessian_of_a_linear_model(loss_and_target, reduction):
    loss, y = loss_and_target
    loss, model, x = with_reduction(loss, reduction), net(4, CLASSES), randn(N, 4)
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def objective(flat):
        pieces = flat.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return loss(torch.func.functional_call(model, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(objective, flat)
    close(natgrad.gauss_newton(model, loss, (x, y), "dense").to_dense(), hessian, 1e-10)


# Draws in one call and over calls come from the same columns, so that few calls tell what 400 do.
@pytest.mark.parametrize(
    ("samples", "calls"), [(400, 1), (40, 10), *(pytest.param(n, 400 // n, marks=pytest.mark.long) for n in (1, 4))]
)
@pytest.mark.parametrize("structure", ["dense", "kfac"])
def test_the_expectation_of_mc_is_the_exact_matrix(loss_and_target, structure, samples, calls):
    loss, y = loss_and_target
    model, x = net(4, CLASSES), randn(N, 4)
    exact = natgrad.fisher(model, loss, (x, y), structure).to_dense()
    options = {"estimator": "mc", "samples": samples, "generator": torch.Generator().manual_seed(0)}
    draws = [natgrad.fisher(model, loss, (x, y), structure, **options).to_dense() for _ in range(calls)]
    assert (torch.stack(draws).mean(0) - exact).norm() < 0.2 * exact.norm()


def test_empirical_is_the_gradients_outer_products():
    model, loss, x, y = net(4, 5, CLASSES), nn.CrossEntropyLoss(), randn(N, 4), indices(N)
    rows = []
    for i in range(N):
        grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    S = torch.stack(rows)
    F = natgrad.fisher(model, loss, (x, y), "dense", estimator="empirical")
    close(F.to_dense(), S.mT @ S / N, 1e-10)


@pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
def test_some_parameters(structure):
    model, loss, data = net(4, 5, CLASSES), nn.CrossEntropyLoss(), (randn(N, 4), indices(N))
    names = ["2.weight", "2.bias"]
    by_name = natgrad.fisher(model, loss, data, structure, params=names)
    by_predicate = natgrad.fisher(model, loss, data, structure, params=lambda n: n.startswith("2."))
    assert torch.equal(by_name.to_dense(), by_predicate.to_dense())
    if structure != "kfac":
        close(by_name.to_dense(), dense_curvature(model, loss, [data], names), 1e-10)
    else:
        whole = natgrad.fisher(model, loss, data)
        close(by_name.to_dense(), whole.blocks["2"].to_dense(), 1e-10)
    assert list(by_name @ {n: randn(*model.get_parameter(n).shape) for n in names}) == names


@pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
def test_frozen_parameters_are_not_part_of_it(structure):
    model, loss, data = net(4, 5, CLASSES), nn.CrossEntropyLoss(), (randn(N, 4), indices(N))
    expected = natgrad.fisher(model, loss, data, structure, params=["2.weight", "2.bias"]).to_dense()
    model[0].requires_grad_(False)
    assert torch.equal(natgrad.fisher(model, loss, data, structure).to_dense(), expected)


@pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
def test_batches_of_another_form(structure):
    model, loss, x, y = net(4, 5, CLASSES), nn.CrossEntropyLoss(), randn(N, 4), indices(N)
    batches = [{"x": x, "labels": y}]
    F = natgrad.fisher(model, loss, batches, structure, forward=lambda m, batch: (m(batch["x"]), batch["labels"]))
    assert torch.equal(F.to_dense(), natgrad.fisher(model, loss, (x, y), structure).to_dense())


@pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
def test_the_model_is_left_as_it_was(structure):
    model, loss, data = net(4, 5, CLASSES), nn.CrossEntropyLoss(), (randn(N, 4), indices(N))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    F = natgrad.fisher(model, loss, data, structure)
    F @ randn(numel(model))
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


class TestBadInput:
    model = net(4, 5, CLASSES)
    data = (randn(N, 4), indices(N))

    def fisher(self, loss=None, data=None, **options):
        return natgrad.fisher(self.model, loss or nn.CrossEntropyLoss(), self.data if data is None else data, **options)

    @pytest.mark.parametrize("structure", ["dense", "kfac"])
    def test_nan_in_the_batch(self, structure):
        x = self.data[0].clone()
        x[1, 2] = float("nan")
        with pytest.raises(ValueError, match=r"3 of 21 entries.*not finite"):
            self.fisher(data=(x, self.data[1]), structure=structure)

    def test_nan_in_the_batch_of_an_implicit_matrix(self):
        x = self.data[0].clone()
        x[1, 2] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            self.fisher(data=(x, self.data[1]), structure="implicit") @ randn(numel(self.model))

    @pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
    def test_nothing_but_ignored_targets(self, structure):
        with pytest.raises(ValueError, match="every target is ignored"):
            self.fisher(data=(self.data[0], torch.full((N,), -100)), structure=structure) @ randn(numel(self.model))

    @pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
    def test_no_data(self, structure):
        with pytest.raises(ValueError, match="data is empty"):
            self.fisher(data=[], structure=structure) @ randn(numel(self.model))

    @pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
    def test_an_empty_batch(self, structure):
        with pytest.raises(ValueError, match="batch is empty"):
            self.fisher(data=(self.data[0][:0], self.data[1][:0]), structure=structure) @ randn(numel(self.model))

    def test_a_target_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"\(7, 3\).*\(6,\)"):
            self.fisher(data=(self.data[0], self.data[1][:6]))
        with pytest.raises(ValueError, match=r"\(7, 3\).*\(7,\)"):
            self.fisher(loss=nn.MSELoss(), data=(self.data[0], randn(N)))

    @pytest.mark.parametrize(
        ("option", "value"), [("structure", "kfca"), ("estimator", "MC"), ("sharing", "expnd"), ("samples", 0)]
    )
    def test_an_option_that_is_unknown(self, option, value):
        with pytest.raises(ValueError, match=f"{option}=.?{value}"):
            self.fisher(**{option: value})

    def test_a_loss_class(self):
        with pytest.raises(TypeError, match="CrossEntropyLoss"):
            self.fisher(loss=nn.CrossEntropyLoss)

    def test_a_loss_that_is_not_supported(self):
        with pytest.raises(TypeError, match=r"MultiLabelMarginLoss.*CrossEntropyLoss"):
            self.fisher(loss=nn.MultiLabelMarginLoss())

    def test_a_loss_without_reduction(self):
        with pytest.raises(ValueError, match="reduction='none'"):
            self.fisher(loss=nn.CrossEntropyLoss(reduction="none"))

    def test_parameters_that_do_not_exist(self):
        with pytest.raises(ValueError, match=r"3\.weight.*0\.weight"):
            self.fisher(params=["3.weight"])
        with pytest.raises(ValueError, match="no trainable parameter"):
            self.fisher(params=lambda n: False)

    @pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
    def test_vectors_that_do_not_fit(self, structure):
        F = self.fisher(structure=structure)
        v = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        with pytest.raises(ValueError, match=r"lacks '0.bias' and has unknown 'bias'"):
            F @ {("bias" if n == "0.bias" else n): t for n, t in v.items()}
        with pytest.raises(ValueError, match=r"0.weight has shape \(4, 5\), expected \(5, 4\)"):
            F @ {**v, "0.weight": v["0.weight"].T}
        with pytest.raises(ValueError, match=r"a tensor of shape \(42,\).*43"):
            F @ torch.zeros(42, dtype=f64)

    @pytest.mark.parametrize("structure", ["implicit", "dense", "kfac"])
    def test_damping_that_is_no_damping(self, structure):
        with pytest.raises(ValueError, match=r"damping=-0.1.*>= 0"):
            self.fisher(structure=structure).solve(torch.zeros(43, dtype=f64), damping=-0.1)

    def test_batches_of_an_unknown_form(self):
        with pytest.raises(ValueError, match="forward=lambda"):
            self.fisher(data=[{"x": self.data[0]}])


@pytest.mark.parametrize("structure", ["kfac", "block", "dense", "implicit"])
def test_batch_normalization_is_left_as_it_was(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    before = {n: b.clone() for n, b in model.named_buffers()}
    buffers = {n: id(b) for n, b in model.named_buffers()}
    data = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure=structure)
    F @ torch.ones(F.space.size, dtype=torch.float64)
    for n, b in model.named_buffers():
        assert torch.equal(b, before[n]), n
        assert id(b) == buffers[n]
