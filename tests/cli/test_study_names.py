"""Studies with odd names, damaged folders and mistakes: each is shown as it is, run again, or one line of error."""

import errno
import importlib
import json
import re
import sys
import warnings
from pathlib import Path

import pytest

from natgrad.cli import main
from natgrad.study.keeping import key, pending
from natgrad.study.pool import Event
from natgrad.study.run import perform

MODULE = """
import sys
import torch
from torch import nn

def problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), nn.CrossEntropyLoss(), (x, x[:, :3].argmax(1))

def figures():
    return *problem(), lambda m: {"[b]$\\\\loss$\\x1b[2J": 1.5, "_": 2.0}

def leaves(): sys.exit(3)
def misfit(): return problem()[0], nn.CrossEntropyLoss(), (torch.ones(5, 9), torch.zeros(5, dtype=torch.long))
def fails_to_evaluate(): return *problem(), lambda m: 1 / 0
def no_figure(): return *problem(), lambda m: {}
def called_step(): return *problem(), lambda m: {"step": 1.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a task; runs are performed in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("odd_task", "odd_package"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "odd_task.py").write_text(MODULE)
    monkeypatch.setattr(importlib.import_module("natgrad.cli.study"), "run_study", one_after_the_other)
    return tmp_path


def one_after_the_other(spec, results, processes, stopped):
    while waiting := pending(spec, results):
        yield Event(waiting[0], 0)
        result = perform(waiting[0])
        results[key(waiting[0])] = result
        yield Event(waiting[0], 0, result=result)


def quoted(name: str) -> str:
    return json.dumps(name)


def study(
    task: str = "t", optimizer: str = "Adam", use: str = "odd_task:problem", title: str = "", more: str = ""
) -> str:
    named = f"title = {quoted(title)}\n" if title else ""
    return (
        f"{named}seeds = 1\nsteps = 3\nevaluations = 2\n{more}[tasks.{quoted(task)}]\nuse = {quoted(use)}\n"
        f'[optimizers.{quoted(optimizer)}]\nuse = "Adam"\n[optimizers.SGD]\nlr = 0.1\n'
    )


def run(text: str) -> int:
    Path("s.toml").write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of letters that the font lacks
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with pytest.raises(SystemExit) as exit_info:
            main(["study", "s.toml", "--out", "out", "--processes", "1"])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


NAMES = {
    "an opening tag": "[red]",
    "a closing tag": "a [/b]",
    "a link": "[link=http://x]y[/link]",
    "a formula that is none": "$\\foo$",
    "a dollar": "5$",
    "escape codes": "\x1b[2J\x1b]0;owned\x07",
    "a line end and a tab": "a\nb\tc",
    "text from right to left": "a\u202eb",
    "400 characters": "n" * 400,
    "400 letters of three bytes": "語" * 400,
    "a path": "../../a/b",
    "dots": "..",
    "a slash": "/",
    "a backslash": "a\\",
    "an underscore": "_hidden",
    "markup of HTML": "<script>alert(1)</script>{{ 7 * 7 }}",
    "a NUL": "a\x00b",
}


@pytest.mark.parametrize("where", ["task", "optimizer", "title"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_is_shown_as_it_is(name: str, where: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(study(**{where: name})) == 0, capfd.readouterr().err
    output, errors = capfd.readouterr()
    assert not errors
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", output)
    if len(name) < 30:
        assert name.encode("unicode_escape").decode().replace("\\\\", "\\") in output
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "<script>alert" not in page
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["title" if where == "title" else "study"] == (name if where == "title" else "s")
    assert set(results["tasks"]) == {name if where == "task" else "t"}
    assert len(list((folder / "out").glob("curves-*.png"))) == 1
    assert {p.name for p in folder.iterdir()} <= {"out", "s.toml", "odd_task.py", "__pycache__"}
    assert run(study(**{where: name})) == 0
    assert "2 runs are finished" in capfd.readouterr().out


def test_figures_may_have_any_name(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(study(use="odd_task:figures")) == 0
    output, errors = capfd.readouterr()
    assert not errors
    assert "[b]$\\loss$\\x1b[2J" in output
    assert "\x1b" not in output


@pytest.mark.parametrize(
    "names", [("a b", "a-b"), ("a/b", "a\\b"), ("Task", "task"), ("x" * 90 + "1", "x" * 90 + "2"), ("é", "ü")], ids=str
)
def test_names_that_would_be_one_file_have_a_picture_each(names: tuple[str, str], folder: Path) -> None:
    tasks = "".join(f'[tasks.{quoted(name)}]\nuse = "odd_task:problem"\n' for name in names)
    assert run(f"seeds = 1\nsteps = 3\nevaluations = 2\n{tasks}[optimizers.Adam]\n[optimizers.SGD]\nlr = 0.1\n") == 0
    pictures = [p.name.casefold() for p in (folder / "out").glob("curves-*.png")]
    assert len(set(pictures)) == 2
    assert len({p.name.casefold() for p in (folder / "out" / "runs").iterdir()}) == 4


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "nested": lambda text: "[" * 100_000,
    "no numbers": lambda text: re.sub(r'"seconds": [\d.e-]+', '"seconds": NaN', text),
    "without a curve": lambda text: text.replace('"curve"', '"curv"'),
    "an empty curve": lambda text: json.dumps({**json.loads(text), "curve": []}),
    "a curve of numbers": lambda text: json.dumps({**json.loads(text), "curve": [1, 2]}),
    "a curve without its figure": lambda text: json.dumps({**json.loads(text), "curve": [{"step": 1, "seconds": 2}]}),
    "a figure in words": lambda text: re.sub(r'"loss": [\d.]+', '"loss": "low"', text),
    "another status": lambda text: text.replace('"finished"', '"furnished"'),
    "what is not a table": lambda text: json.dumps({**json.loads(text), "what": 3}),
    "a machine that is not one": lambda text: json.dumps({**json.loads(text), "machine": 3}),
    "another run's": lambda text: json.dumps({**json.loads(text), "optimizer": "SGD", "setting": {"lr": 0.1}}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_named_and_run_again(damage, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(study()) == 0
    (path,) = (folder / "out" / "runs").glob("t Adam*.json")
    whole = json.loads(path.read_text())
    path.write_text(damage(path.read_text()))
    capfd.readouterr()
    assert run(study()) == 0
    output, errors = capfd.readouterr()
    assert not errors
    assert [line for line in output.splitlines() if "is damaged" in line] == [
        f"{Path('out') / 'runs' / path.name} is damaged, or holds another run; t, Adam, seed 0 is run again."
    ]
    again = json.loads(path.read_text())
    assert [p["loss"] for p in again["curve"]] == [p["loss"] for p in whole["curve"]]


def test_a_run_that_is_no_text(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(study()) == 0
    (path,) = (folder / "out" / "runs").glob("t Adam*.json")
    path.write_bytes(b"\xff\xfe\x00{")
    assert run(study()) == 0
    assert "is damaged" in capfd.readouterr().out


def test_a_folder_in_the_place_of_a_run_is_one_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(study()) == 0
    (path,) = (folder / "out" / "runs").glob("t Adam*.json")
    path.unlink()
    path.mkdir()
    capfd.readouterr()
    assert run(study()) == 2
    assert one_line(capfd).startswith("natgrad: --out was 'out', but writing failed (")


@pytest.mark.parametrize("name", ["results.json", "report.html", "runs"])
def test_a_full_disk_is_one_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import natgrad.cli.report
    import natgrad.study.keeping
    from natgrad.checks.files import write_whole

    def full(path, pieces):
        if name in Path(path).parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, pieces)

    monkeypatch.setattr(natgrad.cli.report, "write_whole", full)
    monkeypatch.setattr(natgrad.study.keeping, "write_whole", full)
    assert run(study()) == 2
    assert "writing failed (No space left on device)" in one_line(capfd)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.import_module("natgrad.cli.study"), "run_study", one_after_the_other)
    assert run(study()) == 0  # goes on from there


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    return errors


USES = {
    "a number": ("3", "use is 3; expected text in quotes"),
    "a list": ('["odd_task:problem"]', "expected text in quotes"),
    "truth": ("true", "use is true; expected text in quotes"),
    "a date": ("1979-05-27", "expected text in quotes"),
    "nothing": ('""', "expected text in quotes"),
    "an optimizer": ('"KFAC"', "'KFAC', which is no task"),
    "markup": ('"[red]x[/b]"', "which is no task"),
    "escape codes": ('"\\u001b[2J"', "'\\x1b[2J', which is no task"),
    "400 characters": (f'"{"n" * 400}"', "which is no task"),
    "a colon": ('":"', "has no function name"),
    "no module": ('":problem"', "has no function name"),
    "no function": ('"odd_task:"', "has no function name"),
    "three parts": ('"odd_task:a:b"', "has no function name"),
    "a module that is not there": ('"nowhere:problem"', "there is no module 'nowhere'"),
    "a path": ('"../odd_task.py:problem"', "odd_task"),
    "dots": ('"..:problem"', "importing module '..' raised"),
    "an absolute path": ('"/tmp/x:problem"', "/tmp/x"),
    "a NUL": ('"a\\u0000b:problem"', "a\\x00b"),
    "a function that is not there": ('"odd_task:none"', "'none' does not exist"),
    "a module of its": ('"odd_task:torch"', "'torch' is not a function"),
    "one that leaves": ('"odd_task:leaves"', "odd_task:leaves raised SystemExit: 3"),
    "a model that does not fit its data": (
        '"odd_task:misfit"',
        "evaluating its model, the result of odd_task:misfit raised",
    ),
    "an evaluation that fails": ('"odd_task:fails_to_evaluate"', "raised ZeroDivisionError"),
    "an evaluation without a figure": ('"odd_task:no_figure"', "returned no figure"),
    "a figure called step": ('"odd_task:called_step"', "a figure called step"),
}


@pytest.mark.parametrize(("use", "words"), USES.values(), ids=USES)
def test_a_mistake_in_use_is_one_line(use: str, words: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(study().replace('"odd_task:problem"', use)) == 2
    errors = one_line(capfd)
    assert words in errors
    assert "\x1b" not in errors
    assert len(errors) < 700
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("3", "optimizers.Adam.use is 3; expected text in quotes"),
        ('"odd_task:problem"', "which is no optimizer"),
        ('"adm"', "did you mean 'Adam'"),
        ('"[/b]"', "'[/b]', which is no optimizer"),
        ("{}", "use is a table"),
    ],
)
def test_a_mistake_in_an_optimizers_use_is_one_line(
    use: str, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(study().replace('use = "Adam"', f"use = {use}")) == 2
    assert words in one_line(capfd)


@pytest.mark.parametrize("value", ["nan", "inf", "1979-05-27", "[0.1, nan]", "{a = 1}", '"[/b]"'])
def test_a_setting_that_a_run_cannot_keep_is_one_line(
    value: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(study().replace("lr = 0.1", f"lr = {value}")) == 2
    assert "optimizers.SGD" in one_line(capfd)
