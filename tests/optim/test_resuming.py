"""Saving and resuming in the middle of a run."""

import copy
import io

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import C, D, made, step
from oracles import net, parameter_vector

FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


class TestResuming:
    @pytest.mark.parametrize("options", [{}, FIXED, {"centered": False}, {"damping_style": "exact"}], ids=str)
    def test_state_dict_resumes_bit_for_bit(self, options):
        intervals = {"statistics_every": 3, "inverses_every": 4, "adapt_every": 2}
        model, opt = made(**options, **intervals)
        for _ in range(6):
            step(model, opt)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        torch.manual_seed(7)
        other = net(D, 4, C)
        resumed = natgrad.KFAC(other, nn.CrossEntropyLoss(), **options, **intervals)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["opt"])
        for _ in range(7):
            assert torch.equal(step(model, opt), step(other, resumed))
            assert torch.equal(parameter_vector(model), parameter_vector(other))
        assert opt.diagnostics == resumed.diagnostics

    def test_a_state_from_another_kind_of_device_has_random_numbers_of_another_kind(self):
        model, opt = made()
        step(model, opt)
        saved = copy.deepcopy(opt.state_dict())
        saved["kfac"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # as CUDA's are
        resumed = []
        for _ in range(2):
            twin = copy.deepcopy(model)
            again = natgrad.KFAC(twin, nn.CrossEntropyLoss(), generator=torch.Generator().manual_seed(9))
            again.load_state_dict(saved)
            for _ in range(3):
                step(twin, again)
            resumed.append(parameter_vector(twin))
        assert torch.equal(*resumed)
        assert torch.isfinite(resumed[0]).all()

    def test_before_the_first_step(self):
        _, opt = made()
        other, fresh = made()
        fresh.load_state_dict(opt.state_dict())
        step(other, fresh)
        assert fresh.diagnostics["accepted"]

    def test_the_state_of_another_optimizer(self):
        model, opt = made()
        with pytest.raises(ValueError, match="no 'kfac': it is not a KFAC optimizer's"):
            opt.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())

    def test_the_state_of_another_model(self):
        model, opt = made()
        step(model, opt)
        other = natgrad.KFAC(nn.Linear(2, 2), nn.MSELoss())
        with pytest.raises(ValueError, match=r"the first that differs is '0\.weight' there and 'weight' here"):
            other.load_state_dict(opt.state_dict())
