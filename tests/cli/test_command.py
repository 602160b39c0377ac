"""The command itself: its version, its help, and what it says to what it does not know."""

import os
import subprocess
import sys

import pytest

import natgrad
from natgrad.cli import main
from natgrad.cli.patience import wait_asleep


def run_command(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    code = exit_info.value.code
    assert isinstance(code, int)
    return code, *capfd.readouterr()


def test_it_says_its_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(capfd, "--version") == (0, f"natgrad {natgrad.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("-h",), ("demo", "-h"), ("inspect", "--help"), ("plan", "--help")])
def test_every_help_fits_80_columns(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, output, errors = run_command(capfd, *arguments)
    assert (code, errors) == (0, "")
    assert "--help" in output
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspct",), "there is no command 'inspct'; expected one of "),
        (("inspct",), "did you mean 'inspect'?\n"),
        (("--verzion",), "there is no option --verzion; did you mean '--version'? `natgrad --help`"),
        (("demo", "--sedonds", "3"), "did you mean '--seconds'? `natgrad demo --help` lists the options.\n"),
        (
            ("demo", "--task", "mnst"),
            "--task was 'mnst'; expected --task curves or --task mnist; did you mean",
        ),
        (("inspect", "a:b", "--estimator", "exat"), "; did you mean 'exact'?"),
        (("plan", "gpt2smal"), "; did you mean 'gpt2-small'?"),
        (("inspect",), "Missing argument 'MODULE:FUNCTION'. `natgrad inspect --help`"),
    ],
)
def test_what_it_does_not_know_gives_one_line_with_what_is_near(
    arguments: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, output, errors = run_command(capfd, *arguments)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert words in errors


def test_timed_commands_start_with_threads_that_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spinning threads would count as processor time, on a busy machine many times that of the work."""
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append((path, arguments)))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_asleep(["study", "demo"])
    wait_asleep([])
    assert not started
    wait_asleep(["demo", "--seconds", "3"])
    assert started == [(sys.executable, [sys.executable, "-m", "natgrad", "demo", "--seconds", "3"])]
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_asleep(["demo"])
    assert len(started) == 1
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.skipif(os.name != "posix", reason="there the process is not started anew")
def test_a_demo_that_is_started_anew_passes_on_what_it_is_told() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-m", "natgrad", "demo", "--seconds", "-1"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "--seconds was -1" in ran.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["study", "centering", "--print"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "natgrad", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "could not be written (No space left on device)" in done.stderr
