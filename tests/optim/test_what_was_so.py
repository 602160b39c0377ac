"""What was so at the forward is so at the step: modes, inputs, targets, parameters; or users are told."""

import copy

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, randn

D, C = 5, 3
X, Y = randn(40, D), torch.arange(40) % C
CE = nn.CrossEntropyLoss()


def model_of(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), middle, nn.Tanh(), nn.Linear(8, C)).double()


MAKE = {
    "KFAC": lambda m: natgrad.KFAC(m, CE, adapt_every=1),
    "numbers": lambda m: natgrad.KFAC(m, CE, lr=0.05, momentum=0.9, adapt_every=1),
    "NaturalGradient": lambda m: natgrad.NaturalGradient(m, CE, solver="cg"),
}


class TestModes:
    # RReLU differs from Dropout in what it draws, not in when.
    @pytest.mark.parametrize(
        "middle",
        [nn.Dropout(0.5), nn.BatchNorm1d(8), pytest.param(nn.RReLU(), marks=pytest.mark.long)],
        ids=lambda m: type(m).__name__,
    )
    @pytest.mark.parametrize("make", MAKE)
    def test_evaluation_between_backward_and_step_changes_nothing(self, make, middle):
        models = [model_of(copy.deepcopy(middle)) for _ in range(2)]
        opts = [MAKE[make](m) for m in models]
        for i in range(4):
            for evaluates, model, opt in zip((False, True), models, opts, strict=True):
                torch.manual_seed(i)
                model.train()
                loss = opt.loss(model(X), Y)
                opt.zero_grad()
                loss.backward()
                if evaluates:
                    model.eval()
                    with torch.no_grad():
                        model(X[:5])
                opt.step()
                assert model.training is not evaluates
        for p, q in zip(*(m.state_dict().values() for m in models), strict=True):
            assert torch.equal(p, q)
        assert opts[0].diagnostics["damping"] == opts[1].diagnostics["damping"]

    def test_a_part_that_is_in_evaluation_stays_so(self):
        model = model_of(nn.BatchNorm1d(8))
        model[1].eval()
        opt = natgrad.KFAC(model, CE, adapt_every=1)
        loss = opt.loss(model(X), Y)
        loss.backward()
        model.train()
        opt.step()
        assert model[1].training
        assert opt.diagnostics["loss"] == pytest.approx(loss.item())


class TestInPlace:
    @pytest.mark.parametrize("make", MAKE)
    def test_an_input_that_changes_before_the_step_is_refused(self, make):
        model = model_of(nn.Identity())
        opt, x = MAKE[make](model), X.clone()
        opt.loss(model(x), Y).backward()
        x.mul_(2)
        with pytest.raises(RuntimeError, match=r"an input of the model, of shape \(40, 5\), was changed in place"):
            opt.step()

    def test_a_target_that_changes_before_the_step_is_refused(self):
        model = model_of(nn.Identity())
        opt, y = natgrad.KFAC(model, CE, adapt_every=1), Y.clone()
        opt.loss(model(X), y).backward()
        y.zero_()
        with pytest.raises(RuntimeError, match=r"the target, of shape \(40,\), was changed in place"):
            opt.step()

    def test_nobody_minds_where_no_forward_is_run_again(self):
        model = model_of(nn.Identity())
        opt, x = natgrad.KFAC(model, CE, lr=0.1, momentum=0.9, damping=0.1), X.clone()
        opt.loss(model(x), Y).backward()
        x.mul_(2)
        opt.step()
        assert opt.diagnostics["accepted"]

    def test_parameters_that_change_before_the_step_have_their_loss_measured_again(self):
        model = model_of(nn.Identity())
        opt = natgrad.KFAC(model, CE, adapt_every=1)
        opt.loss(model(X), Y).backward()
        with torch.no_grad():
            model[0].weight.mul_(0.5)
            here = CE(model(X), Y).item()
        opt.step()
        assert opt.diagnostics["loss"] == pytest.approx(here)


class TestForwards:
    """Losses find their own forward among several."""

    @pytest.mark.parametrize("make", MAKE)
    @pytest.mark.parametrize("order", ["first", "last"])
    def test_the_other_forward_is_not_taken_for_it(self, make, order):
        steps = []
        for others in (False, True):
            model = model_of(nn.Identity())
            opt = MAKE[make](model)
            for _ in range(3):
                if order == "last" and others:
                    other = model(X[:7] + 1)
                output = model(X)
                if order == "first" and others:
                    other = model(X[:7] + 1)
                if others:
                    model.eval()
                    with torch.no_grad():
                        model(X[:3])
                    model.train()
                loss = opt.loss(output, Y)
                opt.zero_grad()
                loss.backward()
                opt.step()
            steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            if others:
                del other
        assert torch.equal(*steps)

    def test_two_losses_of_two_forwards_are_one_of_both(self):
        model, twin = model_of(nn.Identity()), model_of(nn.Identity())
        options = {"lr": 0.1, "momentum": 0.0, "damping": 0.1, "estimator": "exact", "statistics_share": 1.0}
        opt, whole = (natgrad.KFAC(m, CE, **options) for m in (model, twin))
        one, two = model(X[:20]), model(X[20:])
        (0.5 * opt.loss(one, Y[:20]) + 0.5 * opt.loss(two, Y[20:])).backward()
        whole.loss(twin(X), Y).backward()
        opt.step()
        whole.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-10)

    def test_an_output_of_both_is_refused(self):
        model = model_of(nn.Identity())
        opt = natgrad.KFAC(model, CE, lr=0.1, momentum=0.0, damping=0.1)
        one, two = model(X), model(X + 1)
        with pytest.raises(ValueError, match="a tensor that comes from 2 forwards of the model"):
            opt.loss(one + two, Y)

    def test_a_tensor_of_no_forward_is_refused(self):
        model = model_of(nn.Identity())
        opt = natgrad.KFAC(model, CE, lr=0.1, momentum=0.0, damping=0.1)
        model(X)
        with pytest.raises(RuntimeError, match="comes from none since the last step"):
            opt.loss(nn.Linear(D, C).double()(X), Y)

    def test_outputs_that_nobody_uses_are_not_kept(self):
        import gc
        import weakref

        model = model_of(nn.Identity())
        opt = natgrad.KFAC(model, CE)
        output = model(X)
        gone = weakref.ref(output)
        del output
        kept = model(X)
        gc.collect()
        assert gone() is None
        assert len(opt.tracker.watch.forwards) == 1
        opt.loss(kept, Y)


EXACTLY = {"lr": 0.02, "momentum": 0.0, "damping": 0.01, "estimator": "exact", "statistics_share": 1.0, "decay": 0.0}
EXACTLY |= {"inverses_every": 1, "matmul_precision": None, "damping_style": "exact"}


class TestFrozen:
    @pytest.mark.parametrize("every", [1, 50])
    @pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight", "1.bias"])
    @pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
    def test_what_is_left_of_a_layer_takes_the_block_of_itself(self, structure, frozen, every):
        model = model_of(nn.LayerNorm(8))
        x = X.abs() + 1
        opt = natgrad.KFAC(model, CE, structure=structure, statistics_every=every, **EXACTLY)
        first = copy.deepcopy(model)
        for i in range(4):
            if i == 2:
                model.get_parameter(frozen).requires_grad_(False)
            start = copy.deepcopy(model)
            loss = opt.loss(model(x), Y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        assert torch.equal(model.get_parameter(frozen), start.get_parameter(frozen))
        left = {"weight": "bias", "bias": "weight"}[frozen[2:]]
        left = frozen[:2] + left
        assert not torch.equal(model.get_parameter(left), start.get_parameter(left))
        if structure != "ekfac":
            # Against the matrix of what is left, where the statistics are from, with the same damping.
            F = natgrad.fisher(start if every == 1 else first, CE, (x, Y), structure, params=[left])
            step = F.solve({left: model.get_parameter(left).grad}, damping=0.01)[left]
            moved = (start.get_parameter(left) - model.get_parameter(left)).detach() / 0.02
            close(moved, step, 1e-6)

    def test_frozen_and_trainable_again(self):
        model = model_of(nn.Identity())
        opt = natgrad.KFAC(model, CE, statistics_every=5)
        for i in range(30):
            model[0].weight.requires_grad_(not 5 <= i < 15)
            before = model[0].weight.detach().clone()
            loss = opt.loss(model(X), Y)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            if i not in (15,) and opt.diagnostics["accepted"]:
                assert torch.equal(before, model[0].weight) is (5 <= i < 15)
        assert loss.item() < 1.1

    def test_trainable_alone_is_told_once(self, recwarn):
        model = model_of(nn.Identity())
        model[0].requires_grad_(False)
        opt = natgrad.KFAC(model, CE)
        model[0].requires_grad_(True)
        for _ in range(5):
            loss = opt.loss(model(X), Y)
            model.zero_grad()
            loss.backward()
            opt.step()
        (told,) = [str(w.message) for w in recwarn if "were frozen" in str(w.message)]
        assert told.startswith("2 parameters (such as '0.bias') were frozen when KFAC was made")

    def test_left_to_another_optimizer_nothing_is_told(self, recwarn):
        model = model_of(nn.Identity())
        opt = natgrad.KFAC(model, CE, params=lambda n: n.startswith("3"))
        opt.loss(model(X), Y).backward()
        opt.step()
        assert not [w for w in recwarn if "were frozen" in str(w.message)]
        assert model[0].weight.dtype == f64


ZEROED = {
    "opt": lambda model, opt: opt.zero_grad(),
    "model": lambda model, opt: model.zero_grad(),
    "in place": lambda model, opt: model.zero_grad(set_to_none=False),
    "by hand": lambda model, opt: [p.grad.mul_(0) for p in model.parameters()],
}


class TestZeroedBeforeBackward:
    """A batch whose step was skipped is gone with its gradients, however and whenever these are zeroed."""

    @pytest.mark.parametrize("way", ZEROED)
    @pytest.mark.parametrize(
        "options", [{}, {"lr": 0.05, "momentum": 0.9}, {"lr": 0.05, "momentum": 0.9, "damping": 0.1}]
    )
    def test_between_loss_and_backward(self, options, way):
        models = [model_of(nn.Identity()) for _ in range(2)]
        for skips, model in zip((False, True), models, strict=True):
            opt = natgrad.KFAC(model, CE, estimator="exact", adapt_every=1, **options)
            if skips:
                opt.loss(model(X[:30]), Y[:30]).backward()
            loss = opt.loss(model(X), Y)
            ZEROED[way](model, opt) if skips else opt.zero_grad()
            loss.backward()
            opt.step()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            close(p.detach(), q.detach(), 1e-9)

    @pytest.mark.parametrize("way", ZEROED)
    def test_a_loss_may_come_again(self, way):
        models = [model_of(nn.Identity()) for _ in range(2)]
        for twice, model in zip((False, True), models, strict=True):
            opt = natgrad.KFAC(model, CE, estimator="exact", lr=0.1, momentum=0.0, damping=0.1)
            loss = opt.loss(model(X), Y)
            if twice:
                (3 * loss).backward(retain_graph=True)
                ZEROED[way](model, opt)
            loss.backward()
            opt.step()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            close(p.detach(), q.detach(), 1e-9)
