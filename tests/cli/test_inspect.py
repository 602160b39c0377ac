"""The command `natgrad inspect`: what it reads, its errors and what it writes."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from natgrad.cli import main
from natgrad.cli.device import moved, on_device

PROBLEM = """
import torch
from torch import nn

def problem():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    return model, nn.CrossEntropyLoss(), list(zip(x.split(16), y.split(16)))

number = 3

def needs(argument): ...

def nothing(): ...

def pair():
    return problem()[:2]

def of_batches():
    model, loss, data = problem()
    return model, loss, [{"x": x, "y": y} for x, y in data], lambda model, batch: (model(batch["x"]), batch["y"])

def four():
    return *problem(), "forward"

def string():
    return "model", nn.MSELoss(), ()

def function_as_loss():
    return problem()[0], nn.functional.mse_loss, ()

def unknown_loss():
    return problem()[0], nn.MultiLabelMarginLoss(), (torch.randn(4, 4), torch.randn(4, 3))

def other_width():
    return problem()[0], nn.CrossEntropyLoss(), (torch.randn(5, 7), torch.zeros(5, dtype=torch.long))

def raises():
    raise FileNotFoundError("no file\\ncalled data.pt")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with modules in it that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "given.py").write_text(PROBLEM)
    for name in ("my-problem.py", "json.py"):
        (tmp_path / name).write_text(PROBLEM)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "needy.py").write_text("import no_such_package_at_all")
    before = set(sys.modules)
    yield tmp_path
    for name in {"given", "broken", "needy"} & (set(sys.modules) - before):
        del sys.modules[name]


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", *arguments])
    code = exit_info.value.code
    assert isinstance(code, int)
    return code


def results(out: Path) -> dict[str, dict[str, dict[str, object]]]:
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_it_writes_a_report(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "a" / "b"
    assert run_command("given:problem", "--out", str(out), "--permutations", "19") == 0
    names = {"results.json", "report.html", "residuals.png", "spreads.png", "conditioning.png", "spectrum.png"}
    assert {path.name for path in out.iterdir()} == names
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    assert page.count("data:image/png;base64,") == 4
    found = results(out)
    assert {"target": "given:problem", "estimator": "exact", "seed": 0, "permutations": 19}.items() <= found.items()
    assert list(found["layers"]) == ["0", "2"]
    printed = capfd.readouterr().out
    for layer in found["layers"].values():
        share = f"{layer['relative']:.3f}"
        assert share in printed
        assert f"<td>{share}</td>" in page
    assert str(out / "report.html") in printed


def test_the_function_may_be_named_by_its_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "in_folder.py").write_text(PROBLEM)
    named = ("given:problem", "given.py:problem", "inner/in_folder.py:problem", f"{folder}/given.py:problem")
    layers = []
    for i, target in enumerate(named):
        assert run_command(target, "--out", str(folder / str(i)), "--permutations", "0") == 0
        layers.append(results(folder / str(i))["layers"])
    assert all(found == layers[0] for found in layers)
    sys.modules.pop("in_folder")


def test_it_says_in_words_what_is_good_and_bad_and_what_to_do(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("given:problem", "--out", str(folder / "out"), "--permutations", "0") == 0
    printed = capfd.readouterr().out
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    said = results(folder / "out")["advice"]
    assert {a["kind"] for a in said} <= {"good", "fair", "bad", "do"}
    assert any(a["kind"] == "do" for a in said)
    for a in said:
        assert a["text"] in printed
    assert "% of the curvature (the trace) is in " in printed
    spectrum = results(folder / "out")["spectrum"]
    assert 0 < spectrum["most"] <= spectrum["eigenvalues"] == 48
    assert "What to do:" in printed
    assert "What to do:</strong>" in page


def test_device(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tensors of pairs, of batches of any form and of mappings go to the device; here there is one only."""
    for target in ("given:problem", "given:of_batches"):
        assert run_command(target, "--out", str(folder / target[6:]), "--permutations", "0", "--device", "cpu") == 0
    x = torch.ones(2)
    batch = {"x": x, "more": [x, (x, "word")], "n": 3}
    found = moved(batch, torch.device("meta"))
    assert (found["x"].device.type, found["more"][0].device.type, found["more"][1][0].device.type) == ("meta",) * 3
    assert (found["more"][1][1], found["n"]) == ("word", 3)
    lazy = on_device([(x, x), (x, x), (x, x)], torch.device("meta"))
    assert len(lazy) == 3
    assert all(t.device.type == "meta" for _ in range(2) for pair in lazy for t in pair)
    once = on_device(iter([(x, x)]), torch.device("meta"))
    assert len(list(once)) == len(list(once)) == 1
    assert on_device((x, x), torch.device("meta"))[0].device.type == "meta"


def test_batches_may_be_of_another_form(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for target in ("given:problem", "given:of_batches"):
        assert run_command(target, "--out", str(folder / target[6:]), "--permutations", "0") == 0
    assert results(folder / "of_batches")["layers"] == results(folder / "problem")["layers"]
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "given:of_batches", "--ranks", "1"])
    assert exit_info.value.code == 0
    assert "in 2 layers" in capfd.readouterr().out


def test_the_seed_fixes_everything(folder: Path) -> None:
    def layers(seed: int) -> object:
        arguments = ("--estimator", "mc", "--seed", str(seed), "--permutations", "9", "--out", str(folder / "out"))
        assert run_command("given:problem", *arguments) == 0
        return results(folder / "out")["layers"]

    first = layers(1)
    assert layers(1) == first
    assert layers(2) != first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["given"], ["'given'", "MODULE:FUNCTION"]),
        (["given:"], ["'given:'", "MODULE:FUNCTION"]),
        (["given:a:b"], ["'given:a:b'", "MODULE:FUNCTION"]),
        (["nowhere:problem"], ["no module 'nowhere'", "PYTHONPATH"]),
        (["given.inner:problem"], ["no module 'given.inner'"]),
        (["broken:problem"], ["'broken'", "ZeroDivisionError", "division by zero"]),
        (["needy:problem"], ["'needy'", "'no_such_package_at_all'", "not installed"]),
        (["given:nope"], ["'nope' does not exist", "'given'"]),
        (["given:number"], ["'number' is not a function"]),
        (["given:needs"], ["given:needs raised TypeError", "argument"]),
        (["given:raises"], ["given:raises raised FileNotFoundError", "no file called data.pt"]),
        (["given:nothing"], ["returned a NoneType", "(model, loss, data)"]),
        (["given:pair"], ["returned a tuple of 2", "(model, loss, data)"]),
        (["given:four"], ["a str as its forward", "forward(model, batch)"]),
        (["given:string"], ["a str as its model", "torch.nn.Module"]),
        (["given:function_as_loss"], ["a function as its loss", "torch.nn.Module"]),
        (["given:problem", "--estimator", "best"], ["--estimator", "'best'", "exact, mc, empirical"]),
        (["given:problem", "--permutations", "-1"], ["--permutations", "-1"]),
        (["given:problem", "--seed", "-1"], ["--seed", "-1"]),
        (["given:problem", "--device", "gpu"], ["--device", "'gpu'", "cpu", "leave it out"]),
        (["given:problem", "--device", "meta"], ["--device", "'meta'", "cannot be used"]),
        (["nowhere.py:problem"], ["no file 'nowhere.py'", "FILE.py:FUNCTION"]),
        (["my-problem.py:problem"], ["'my-problem' is not a Python name", "rename"]),
        (["json.py:problem"], ["another module 'json'", "rename"]),
        (["given:problem", "--bogus"], ["--bogus", "natgrad inspect --help"]),
        ([], ["MODULE:FUNCTION", "natgrad inspect --help"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(
    arguments: list[str], words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*arguments, "--out", str(folder / "new")) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [("unknown_loss", ["MultiLabelMarginLoss", "MultiLabelSoftMarginLoss"]), ("other_width", ["5x7", "4x6"])],
)
def test_what_cannot_be_inspected_gives_one_line(
    function: str, words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(f"given:{function}", "--out", str(folder / "new")) == 2
    _, errors = capfd.readouterr()
    assert errors.count("\n") == 1
    assert all(word in errors for word in [f"given:{function}", *words]), errors


def test_out_that_cannot_be_written(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("kept")
    assert run_command("given:problem", "--out", str(folder / "file")) == 2
    _, errors = capfd.readouterr()
    assert errors.count("\n") == 1
    assert "file" in errors
    assert "--out" in errors
    assert (folder / "file").read_text() == "kept"
