"""What goes wrong at any step: the run stays alive, and the weights finite."""

import copy
import math
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import natgrad
from natgrad.curvature.moments import AffineMoments
from natgrad.linalg import CenteredKronecker
from natgrad.optim.preconditioner.ladder import Ladder
from oracles import net, randn, rejected

N, D, C = 24, 5, 3
X, LABELS = randn(N, D), torch.arange(N) % C
FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


def made(**options):
    torch.manual_seed(0)
    model = net(D, 4, C)
    return model, natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)


def step(model, opt, x=X, spoil=lambda model: None):
    loss = opt.loss(model(x), LABELS)
    opt.zero_grad()
    loss.backward()
    spoil(model)
    opt.step()
    return loss.detach()


def reject(model, opt, count):
    """So many rejected steps in a row."""
    for _ in range(count):
        step(model, opt, X * math.nan)


def spoil_inputs(model, opt, monkeypatch):
    step(model, opt, X.index_fill(0, torch.tensor(3), math.nan))


def spoil_gradients(model, opt, monkeypatch):
    step(model, opt, spoil=lambda m: m[2].weight.grad.fill_(math.nan))


def spoil_statistics(model, opt, monkeypatch):
    add = AffineMoments.add_gradients
    with monkeypatch.context() as patch:
        patch.setattr(AffineMoments, "add_gradients", lambda self, g: add(self, g * math.nan))
        step(model, opt)


def spoil_factor(model, opt, monkeypatch):
    for m in opt.recipe.preconditioner.running.total.moments.values():
        for t in (t for v in vars(m).values() for t in (v if isinstance(v, tuple) else (v,))):
            t.fill_(math.nan)
    step(model, opt)


@pytest.mark.pairs
@pytest.mark.parametrize("spoil", [spoil_inputs, spoil_gradients, spoil_statistics, spoil_factor])
@pytest.mark.parametrize("when", [0, 1, 4, 5])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "input", "diagonal", "identity"])
@pytest.mark.parametrize("options", [{}, FIXED], ids=["adaptive", "fixed"])
def test_a_nan_anywhere_at_any_step(spoil, when, structure, options, monkeypatch):
    model, opt = made(structure=structure, statistics_every=2, inverses_every=2, adapt_every=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(when):
            step(model, opt)
        spoil(model, opt, monkeypatch)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        losses = [step(model, opt) for _ in range(40)]
    assert opt.diagnostics["accepted"]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]


class TestBuffers:
    """Batch normalization has taken in a batch before anything can be said of its loss."""

    @pytest.fixture
    def made(self):
        model = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C)).double()
        return model, natgrad.KFAC(model, nn.CrossEntropyLoss(), adapt_every=2)

    @staticmethod
    def spoiled(model, opt):
        spoil_inputs(model, opt, None)
        rejected(opt)
        assert not opt.diagnostics["accepted"]

    @pytest.mark.parametrize("when", [0, 1, 4])
    def test_are_as_before_a_batch_that_is_not_finite(self, made, when):
        model, opt = made
        for _ in range(when):
            step(model, opt)
        before = copy.deepcopy(dict(model.named_buffers()))
        self.spoiled(model, opt)
        for n in ("1.running_mean", "1.running_var"):
            assert torch.equal(model.get_buffer(n), before[n])
        step(model, opt)
        assert not torch.equal(model.get_buffer("1.running_mean"), before["1.running_mean"])

    def test_are_as_before_the_first_of_several_microbatches(self, made):
        model, opt = made
        before = copy.deepcopy(dict(model.named_buffers()))
        for x in (X * math.nan, X):
            opt.loss(model(x), LABELS).backward()
        opt.step()
        rejected(opt)
        assert torch.equal(model.get_buffer("1.running_var"), before["1.running_var"])

    def test_that_were_loaded_come_back_as_they_were_loaded(self, made):
        model, opt = made
        step(model, opt)
        model.load_state_dict({n: torch.full_like(t, 2) for n, t in model.state_dict().items()})
        self.spoiled(model, opt)
        assert torch.equal(model.get_buffer("1.running_mean"), torch.full((6,), 2.0, dtype=torch.float64))

    def test_that_are_none_or_whole_numbers_do_not_matter(self):
        model = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, C)).double()
        model.register_buffer("calls", torch.zeros((), dtype=torch.long))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(model, opt)
        self.spoiled(model, opt)
        step(model, opt)
        assert opt.diagnostics["accepted"]


def test_of_many_rejected_steps_in_a_row_a_few_are_told():
    model, opt = made()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reject(model, opt, 9)
    told = [str(w.message) for w in caught if "rejected" in str(w.message)]
    assert [("in a row" in line, line.split(":")[0]) for line in told] == [
        (True, "KFAC rejected step 1 (2 in a row)"),
        (True, "KFAC rejected step 3 (4 in a row)"),
        (True, "KFAC rejected step 7 (8 in a row)"),
    ]
    assert opt.diagnostics["faults"] == {"rejected": 9}


class TestLadder:
    def test_more_damping_where_that_helps(self, monkeypatch):
        model, opt = made(**FIXED)
        inverse = CenteredKronecker.inverse

        def fails_below(self, damping=0.0, **options):
            if damping < 5:
                raise ValueError("the factor A is singular")
            return inverse(self, damping, **options)

        monkeypatch.setattr(CenteredKronecker, "inverse", fails_below)
        with pytest.warns(RuntimeWarning, match="layer '0': the factor A is singular; it was damped 100 times as much"):
            step(model, opt)
        assert opt.diagnostics["accepted"]
        assert opt.diagnostics["faults"] == {"more_damping": 2}

    def test_else_the_last_inverse_is_kept(self, monkeypatch):
        model, opt = made(**FIXED, inverses_every=1)
        step(model, opt)
        kept = opt.recipe.preconditioner.inverse["0"].operator

        def fails(self, damping=0.0, **options):
            raise ValueError("the factor A is singular")

        monkeypatch.setattr(CenteredKronecker, "inverse", fails)
        with pytest.warns(RuntimeWarning, match="its last inverse is kept"):
            step(model, opt)
        assert opt.diagnostics["accepted"]
        assert opt.recipe.preconditioner.inverse["0"].operator is kept
        assert opt.diagnostics["faults"] == {"kept_inverse": 2}

    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
        ids=["device", "python", "cpu"],
    )
    def test_without_memory_the_diagonal_is_inverted_and_said(self, error, monkeypatch):
        model, opt = made(**FIXED)

        def fails(self, damping=0.0, **options):
            raise error

        monkeypatch.setattr(CenteredKronecker, "inverse", fails)
        with pytest.warns(RuntimeWarning, match="its diagonal is inverted instead"):
            step(model, opt)
        assert opt.diagnostics["faults"] == {"diagonal_for_memory": 2}
        assert opt.diagnostics["accepted"]

    def test_other_errors_are_not_hidden(self):
        def fails(operator, damping):
            raise RuntimeError("a bug")

        from collections import Counter

        with pytest.raises(RuntimeError, match="a bug"):
            Ladder(fails, Counter()).inverse("0", CenteredKronecker(
                covariance=torch.eye(2), mean=torch.zeros(2), output=torch.eye(2)
            ), 0.1, None)  # fmt: skip

    def test_faults_are_counted_over_the_run_and_saved(self):
        model, opt = made()
        step(model, opt)
        reject(model, opt, 3)
        rejected(opt)
        state = copy.deepcopy(opt.state_dict())
        assert opt.diagnostics["faults"] == {"rejected": 3}
        _, resumed = made()
        resumed.load_state_dict(state)
        with pytest.warns(RuntimeWarning, match="4 in a row"):
            step(resumed.model, resumed, X * math.nan)
        assert resumed.diagnostics["faults"] == {"rejected": 4}


TRAINING = """
import os, sys, torch
from pathlib import Path
from torch import nn
import natgrad

path, steps, last = Path(sys.argv[1]), 30, int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
first = 0
if path.exists():
    saved = torch.load(path)
    model.load_state_dict(saved["model"]); opt.load_state_dict(saved["opt"]); first = saved["step"]
for i in range(first, steps):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(32, 5, generator=g); y = (x[:, 0] > 0).long()
    loss = opt.loss(model(x), y)
    opt.zero_grad(); loss.backward(); opt.step()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": i + 1}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    if i == last:
        os.kill(os.getpid(), 9)
torch.save(model.state_dict(), path.with_suffix(".end"))
"""


@pytest.mark.long  # three processes; `test_resuming.py` resumes within one
@pytest.mark.parametrize("last", [6, 13])
def test_a_run_that_was_killed_ends_as_one_that_was_not(last, tmp_path):
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(TRAINING))

    def run(name, last):
        return subprocess.run([sys.executable, str(script), str(tmp_path / name), str(last)], check=False).returncode

    assert run("whole.pt", -1) == 0
    assert run("killed.pt", last) == -signal.SIGKILL
    assert not (tmp_path / "killed.end").exists()
    assert run("killed.pt", -1) == 0
    whole, resumed = (torch.load(tmp_path / f"{n}.end") for n in ("whole", "killed"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
