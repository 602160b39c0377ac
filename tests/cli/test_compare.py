"""The command `natgrad compare`: what it tries, what it advises, its errors and what it writes."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from natgrad.checks.errors import UserError
from natgrad.cli import main
from natgrad.cli.compare import rows
from natgrad.study.comparison import Contestant, Outcome, Problem, advice, contestants, run
from natgrad.study.split import split
from natgrad.study.training import Budget

PROBLEM = """
import torch
from torch import nn

def problem():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(200, 4)
    return model, nn.CrossEntropyLoss(), (x, x[:, :3].argmax(1))

def of_dicts():
    model, loss, (x, y) = problem()
    data = [{"x": a, "y": b} for a, b in zip(x.split(20), y.split(20))]
    return model, loss, data, lambda model, batch: (model(batch["x"]), batch["y"])

class Absolute(nn.Module):
    def forward(self, output, target):
        return (output - target).abs().mean()

def own_loss():
    model, _, (x, y) = problem()
    return model, Absolute(), (x, x[:, :3])

def frozen():
    model, loss, data = problem()
    return model.requires_grad_(False), loss, data

def one_value():
    return problem()[:2]

def broadcast():
    return nn.Linear(3, 1), nn.MSELoss(), (torch.randn(40, 3), torch.randn(40))


def shapes():
    return problem()[0], nn.CrossEntropyLoss(), (torch.randn(9, 7), torch.zeros(9, dtype=torch.long))

def unequal():
    return problem()[0], nn.CrossEntropyLoss(), (torch.randn(9, 4), torch.zeros(8, dtype=torch.long))

def once():
    model, loss, data = problem()
    return model, loss, iter([data])

def nothing():
    model, loss, _ = problem()
    return model, loss, []

def number():
    model, loss, _ = problem()
    return model, loss, 3
"""
NAMES = [
    "AdamW 0.0003",
    "AdamW 0.001",
    "AdamW 0.003",
    "Muon",
    "NewtonMuon",
    "NewtonMuon, both sides",
    "NewtonMuon, decay 0.5",
    "KFAC",
]
NAMES += ["NaturalGradient"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module in it that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(PROBLEM)
    yield tmp_path
    sys.modules.pop("mine", None)


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", *arguments])
    code = exit_info.value.code
    assert isinstance(code, int)
    return code


def test_it_writes_a_report_and_gives_advice(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    assert run_command("mine:problem", "--seconds", "0.2", "--out", str(out)) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", "curves.png"}
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [r["optimizer"] for r in found["runs"]] == NAMES
    firsts = {(r["curve"][0]["training"], r["curve"][0]["held-out"]) for r in found["runs"]}
    assert len(firsts) == 1  # the same weights
    for r in found["runs"]:
        assert r["status"] == "finished"
        assert r["steps"] >= 1
        assert r["seconds"] >= 0.2
        assert r["curve"][-1]["step"] == r["steps"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    assert page.count("data:image/png;base64,") == 1
    printed = capfd.readouterr().out
    assert found["advice"].endswith(".")
    assert found["advice"] in printed
    assert found["advice"][:30] in page
    assert "AdamW steps" in printed


def test_batches_of_another_form(folder: Path) -> None:
    assert run_command("mine:of_dicts", "--seconds", "0.02") == 0
    found = json.loads((folder / "natgrad-compare" / "results.json").read_text(encoding="utf-8"))
    assert {r["status"] for r in found["runs"]} == {"finished"}
    assert found["runs"][0]["curve"][0]["held-out"] is not None


def test_a_loss_that_kfac_does_not_know_leaves_it_out(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("mine:own_loss", "--seconds", "0.02") == 0
    found = json.loads((folder / "natgrad-compare" / "results.json").read_text(encoding="utf-8"))
    status = {r["optimizer"]: r["status"] for r in found["runs"]}
    assert status == {n: "refused" if n in ("KFAC", "NaturalGradient") else "finished" for n in NAMES}
    assert "KFAC: left out: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine"], ["'mine'", "MODULE:FUNCTION"]),
        (["mine:nope"], ["'nope' does not exist"]),
        (["mine:one_value"], ["returned a tuple of 2"]),
        (["mine:shapes"], ["what mine:shapes returned cannot be trained", "9x7"]),
        (["mine:broadcast"], ["different shapes", "target.view_as(output)"]),
        (["mine:unequal"], ["9 inputs and 8 targets"]),
        (["mine:once"], ["can be read only once"]),
        (["mine:nothing"], ["an empty list"]),
        (["mine:number"], ["the data are a int", "DataLoader"]),
        (["mine:frozen"], ["no optimizer can train", "does not require grad"]),
        (["mine:problem", "--seconds", "0"], ["--seconds", "above 0"]),
        (["mine:problem", "--seconds", "nan"], ["--seconds", "nan"]),
        (["mine:problem", "--batch", "0"], ["--batch", "at least 1"]),
        (["mine:problem", "--seed", "-1"], ["--seed", "-1"]),
        ([], ["MODULE:FUNCTION", "natgrad compare --help"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(
    arguments: list[str], words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments, "--out", str(folder / "new")) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors


def outcome(name: str, training: float, held_out: float, cost: float = 1.0, status: str = "finished") -> Outcome:
    kind = Contestant(name, f"make({name})", lambda model, loss: None)
    curve = [{"step": 1.0, "seconds": 1.0, "training": training, "held-out": held_out}]
    return Outcome(kind, status, "", curve, 1, 1.0, [cost])


class TestAdvice:
    def test_the_best_on_held_out_data_is_advised(self) -> None:
        its = [outcome("AdamW 0.001", 0.5, 0.6), outcome("KFAC", 0.1, 0.7), outcome("Muon", 0.4, 0.5, cost=1.5)]
        said = advice(its, held_out=True)
        assert said == (
            "Use make(Muon): in the same time its held-out loss reaches 0.5, against 0.6 with AdamW at 0.001, and a "
            "step takes 1.5 times as long as AdamW's."
        )
        assert advice(its, held_out=False).startswith("Use make(KFAC): in the same time its training loss reaches 0.1")

    def test_adamw_is_kept_unless_another_is_better_by_more_than_two_percent(self) -> None:
        its = [outcome("AdamW 0.001", 0.5, 0.6), outcome("AdamW 0.003", 0.5, 0.5), outcome("KFAC", 0.1, 0.495)]
        assert advice(its, held_out=True).startswith("Keep make(AdamW 0.003): no other optimizer")
        its[-1] = outcome("KFAC", 0.1, 0.48)
        assert advice(its, held_out=True).startswith("Use make(KFAC)")

    def test_losses_below_zero(self) -> None:
        its = [outcome("AdamW 0.001", -1.0, -1.0), outcome("KFAC", -1.01, -1.01)]
        assert advice(its, held_out=True).startswith("Keep")
        its[-1] = outcome("KFAC", -1.1, -1.1)
        assert advice(its, held_out=True).startswith("Use make(KFAC)")

    def test_what_diverged_is_not_advised(self) -> None:
        its = [outcome("AdamW 0.001", math.nan, math.nan, status="diverged"), outcome("Muon", 1.0, 2.0)]
        assert "AdamW's is not finite" in advice(its, held_out=True)
        assert advice(its[:1], held_out=True).startswith("No optimizer reached a finite loss")
        assert rows(its)[0][0] == "Muon"
        assert rows(its)[1][0] == "AdamW 0.001 (diverged)"


class TestSplit:
    def test_no_example_that_is_held_out_is_trained_on(self) -> None:
        x = torch.arange(50.0)[:, None]
        for data in (
            (x, x),
            list(zip(x.split(2), x.split(2), strict=True)),
            DataLoader(TensorDataset(x, x), batch_size=4),
            DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True),
        ):
            divided = split(data, 8)
            held = {v for b, _ in divided.held_out for v in b.flatten().tolist()}
            batches = divided.training(0)
            seen = {v for _ in range(60) for v in next(batches)[0].flatten().tolist()}
            assert not held & seen
            assert 4 <= len(held) <= 6
            assert len(held | seen) == 50

    def test_batches_are_the_same_for_every_optimizer(self) -> None:
        x = torch.arange(50.0)[:, None]
        divided = split(DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True), 8)
        one, other = divided.training(3), divided.training(3)
        assert all(torch.equal(next(one)[0], next(other)[0]) for _ in range(30))

    def test_a_sampler_of_the_users_own_stays(self) -> None:
        x = torch.arange(20.0)[:, None]
        sampler = WeightedRandomSampler([1.0] * 5 + [0.0] * 15, 8)
        divided = split(DataLoader(TensorDataset(x, x), batch_size=4, sampler=sampler), 8)
        assert not divided.held_out
        batches = divided.training(0)
        assert {v for _ in range(20) for v in next(batches)[0].flatten().tolist()} <= {0.0, 1.0, 2.0, 3.0, 4.0}

    def test_a_data_set_without_a_whole_batch(self) -> None:
        x = torch.zeros(5, 1)
        divided = split(DataLoader(TensorDataset(x, x), batch_size=9, shuffle=True, drop_last=True), 8)
        with pytest.raises(UserError, match="no complete batch"):
            next(divided.training(0))


def small_problem(loss: nn.Module) -> Problem:
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    return Problem(model, loss, split((x, x[:, :2]), 16), lambda model, batch: (model(batch[0]), batch[1]))


def test_the_model_that_was_given_is_not_changed() -> None:
    problem = small_problem(nn.MSELoss())
    before = [p.clone() for p in problem.model.parameters()]
    for entry in contestants(problem.model):
        outcome = run(entry, problem, Budget(seconds=0.01))
        assert outcome.status == "finished", outcome.error
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in problem.model.parameters())


def test_figures_are_means_over_examples_in_evaluation() -> None:
    mean, total = (small_problem(nn.MSELoss(reduction=r)) for r in ("mean", "sum"))
    model = mean.model.eval()
    x, y = (torch.cat(its) for its in zip(*mean.data.held_out, strict=True))
    expected = (model(x) - y).square().mean().item()
    model.train()
    assert mean.figure(model, mean.data.held_out) == pytest.approx(expected, rel=1e-5)
    assert total.figure(total.model, total.data.held_out) == pytest.approx(2 * expected, rel=1e-5)  # two outputs
    assert model.training


@pytest.mark.parametrize("options", [{"weight": torch.tensor([5.0, 1.0])}, {"ignore_index": 1}], ids=str)
def test_figures_are_those_of_all_examples_as_one_batch(options: dict[str, Any]) -> None:
    """Also if batches have other shares of the classes, or nothing but ignored targets."""
    loss, model = nn.CrossEntropyLoss(**options), nn.Linear(3, 2)
    x, y = torch.randn(12, 3), torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    batches = list(zip(x.split(4), y.split(4), strict=True))
    data = split(batches, 4)
    problem = Problem(model, loss, data, lambda m, batch: (m(batch[0]), batch[1]))
    assert problem.figure(model, batches) == pytest.approx(loss(model(x), y).item(), rel=1e-5)


def test_a_loss_with_a_state_starts_anew_for_every_optimizer() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return (output - target).square().mean() * self.count

    problem = small_problem(Counts())
    found = [run(entry, problem, Budget(steps=3)).curve for entry in contestants(problem.model)[:2]]
    assert problem.loss.count == 0
    assert found[0][0]["training"] == found[1][0]["training"]


def test_a_held_out_part_with_nan_is_told_from_a_diverged_run() -> None:
    outcome = Outcome(contestants(nn.Linear(2, 2))[0], curve=[{"training": 1.0, "held-out": math.nan}])
    assert "NaN in the held-out data" in advice([outcome], held_out=True)


def test_a_run_that_diverges_says_so() -> None:
    entry = Contestant("SGD", "", lambda model, loss: torch.optim.SGD(model.parameters(), lr=1e20))
    found = run(entry, small_problem(nn.MSELoss()), Budget(seconds=0.2))
    assert found.status == "diverged"
    assert found.last("training") == math.inf


def test_the_natural_gradient_is_tried_on_small_models_alone() -> None:
    assert [c.name for c in contestants(nn.Linear(4, 4))] == NAMES
    assert [c.name for c in contestants(nn.Linear(100, 100))] == NAMES[:-1]
