"""Which forward passes an optimizer records, and that it leaves no function mode and no hook behind."""

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.overrides import _get_current_function_mode, _len_torch_function_stack

import natgrad
import natgrad.optim.tracking.watch as watch_module
from natgrad.capture.recorder import Recorder
from oracles import Power, close, f64, net, randn
from traced import LABELS, C, D, N, Scaled, Stumbling, Tied, step, torch_state_is_clean

FIXED = {"lr": 0.01, "momentum": 0.9, "damping": 0.1}


class TestOptimizer:
    @pytest.fixture
    def recorders(self, monkeypatch):
        """Every recorder that the optimizers make, in order."""
        made = []

        class Listed(Recorder):
            def __init__(self, parameters):
                super().__init__(parameters)
                made.append(self)

        monkeypatch.setattr(watch_module, "Recorder", Listed)
        return made

    def no_mode(self):
        return _get_current_function_mode() is None and _len_torch_function_stack() == 0

    def test_a_forward_in_training_mode_is_recorded(self, recorders):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(opt, model)
        assert [len(r.uses) for r in recorders] == [2]
        assert self.no_mode()

    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_nothing_is_recorded_in_eval_mode_or_without_gradients(self, recorders, options):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
        model.eval()
        model(randn(N, D))
        model.train()
        with torch.no_grad():
            model(randn(N, D))
        with torch.inference_mode():
            model(randn(N, D))
        assert recorders == []
        with pytest.raises(RuntimeError, match="training mode with gradients enabled"):
            opt.loss(randn(N, C), LABELS)

    def test_with_fixed_numbers_only_the_steps_with_statistics_are_recorded(self, recorders):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), statistics_every=3, **FIXED)
        counts = []
        for _ in range(7):
            step(opt, model)
            counts.append(len(recorders))
        assert counts == [1, 1, 1, 2, 2, 2, 3]

    def test_the_steps_own_forwards_are_not_recorded(self, recorders):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), adapt_every=1)
        for _ in range(4):
            step(opt, model)
        assert len(recorders) == 4

    @pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt("half-way")], ids=repr)
    @pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
    def test_a_forward_that_raises_leaves_no_mode_and_the_next_step_works(self, options, error):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), statistics_every=1, **options)
        for _ in range(2):
            model.error = error
            with pytest.raises(type(error), match="half-way"):
                model(randn(N, D))
            model.error = None
            if isinstance(error, KeyboardInterrupt):  # torch calls no hook then: the next forward ends the mode
                model.eval()(randn(N, D))
                model.train()
            assert self.no_mode()
            with pytest.raises(RuntimeError, match=r"opt\.loss follows a forward"):
                opt.loss(randn(N, C), LABELS)
            before = model.one.weight.detach().clone()
            step(opt, model)
            assert opt.diagnostics["accepted"]
            assert not torch.equal(model.one.weight, before)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_hook_of_the_user_that_raises_leaves_no_mode(self, when):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())

        def fail(*_):
            raise RuntimeError("my hook")

        handle = (model.register_forward_pre_hook if when == "before" else model.register_forward_hook)(fail)
        with pytest.raises(RuntimeError, match="my hook"):
            model(randn(N, D))
        assert self.no_mode()
        handle.remove()
        step(opt, model)

    def test_a_refused_parameter_leaves_no_mode(self):
        model = Scaled(Power(D))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        with pytest.raises(NotImplementedError, match=r"'other\.exponent'"):
            step(opt, model)
        assert self.no_mode()

    @pytest.mark.parametrize("style", ["factored", "exact"])
    def test_a_bias_with_a_block_of_its_own(self, style):
        model = Tied()
        F = natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS))
        bias = F.blocks["one.bias"].to_dense() + 0.1 * torch.eye(D, dtype=f64)
        close(F.inverse(0.1, damping_style=style).blocks["one.bias"].to_dense(), torch.linalg.inv(bias))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), damping_style=style)
        step(opt, model)
        assert opt.diagnostics["accepted"]

    def test_a_model_that_calls_itself_leaves_no_mode(self):
        class Recursive(Stumbling):
            def forward(self, x, depth=1):
                return super().forward(x if depth == 0 else x + self(x, depth - 1).mean(1, keepdim=True))

        model = Recursive()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        model(randn(N, D))
        assert self.no_mode()
        step(opt, model)

    @pytest.mark.parametrize("after_a_step", [False, True])
    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),
            lambda m: torch.load(saved(m), weights_only=False),
            lambda m: loaded(Stumbling(), torch.load(saved(m.state_dict()))),
        ],
        ids=["deepcopy", "pickle", "torch.save", "state_dict"],
    )
    def test_a_copy_of_the_model_is_equal_and_records_nothing(self, recorders, copied, after_a_step):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        if after_a_step:
            step(opt, model)
        already = len(recorders)
        twin = copied(model)
        assert torch.equal(twin(randn(N, D)), twin.train()(randn(N, D)))
        assert len(recorders) == already
        with pytest.raises(RuntimeError, match=r"opt\.loss follows a forward"):
            opt.loss(twin(randn(N, D)), LABELS)
        close(twin(randn(N, D)), model(randn(N, D)), 0)
        step(opt, model)
        assert opt.diagnostics["accepted"]
        assert not torch.equal(twin.one.weight, model.one.weight)

    def test_a_copy_takes_an_optimizer_of_its_own(self, recorders):
        model = Stumbling()
        _first = natgrad.KFAC(model, nn.CrossEntropyLoss())
        twin = copy.deepcopy(model)
        step(natgrad.KFAC(twin, nn.CrossEntropyLoss()), twin)
        assert len(recorders) == 1

    def test_without_the_optimizer_the_model_has_no_hooks(self):
        model = Stumbling()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(opt, model)
        del opt
        gc.collect()
        assert torch_state_is_clean(model)

    def test_fisher_on_a_model_with_an_optimizer(self):
        model = net(D, 6, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        data = (randn(N, D), LABELS)
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), data).to_dense()
        assert self.no_mode()
        close(matrix, natgrad.fisher(copy.deepcopy(model), nn.CrossEntropyLoss(), data).to_dense(), 1e-13)
        step(opt, model)


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


def loaded(model, state):
    model.load_state_dict(state)
    return model
