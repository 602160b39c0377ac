"""The gallery's scripts: each runs as a user would start it, draws its picture, and its result bears out its claim."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = "equal_time"
SCRIPTS = [p for p in sorted((ROOT / "examples" / "gallery").glob("*.py")) if p.stem != SHARED]
MOST_LINES = 70
PAGES = ("gallery.md", "pinns-beyond.md")
SHOWN_CODE = runpy.run_path(str(ROOT / "docs" / "shown_code.py"))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The line that a script prints; each runs once."""
    lines: dict[str, str] = {}

    def run(name: str) -> str:
        if name not in lines:
            pytest.importorskip("sklearn")
            folder = tmp_path_factory.mktemp(name)
            done = subprocess.run(
                [sys.executable, ROOT / "examples" / "gallery" / f"{name}.py", folder],
                env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert [f.name for f in folder.iterdir()] == [f"{name}.png"]
            (lines[name],) = done.stdout.splitlines()
        return lines[name]

    return run


def number(pattern, line):
    """The number after a pattern."""
    found = re.search(pattern + r" ?(-?[\d.]+(?:e[-+]?\d+)?)", line)
    assert found, line
    return float(found[1])


@pytest.mark.long
def test_kfac_gets_further_than_adamw_in_as_many_steps(result):
    line = result("train")
    assert number("steps: KFAC", line) < 0.7 * number(r"AdamW", line)
    assert number("accuracy: KFAC", line) > 0.95


@pytest.mark.long
def test_the_posterior_is_unsure_in_the_gap_alone(result):
    gap, data, noise = result("laplace").split(";")
    assert number("kfac", gap) > 3 * number("kfac", data)
    assert number("dense", gap) > 5 * number("dense", data)
    assert number("diagonal", gap) < 2 * number("diagonal", data)  # it does not see the gap
    assert number("kfac", gap) < number("dense", gap)
    assert abs(number("noise", noise) / 0.15 - 1) < 0.2


@pytest.mark.long
def test_influences_are_what_training_again_finds(result):
    line = result("influence")
    assert number("correlation", line) > 0.85
    assert 0.3 < number("found are", line) < 1.5


@pytest.mark.long
def test_pruning_by_kfac_keeps_the_accuracy(result):
    line = result("pruning")
    assert number("kfac", line) > number("all", line) - 0.05
    assert number("kfac", line) > number("diagonal", line) + 0.05
    assert number("kfac", line) > number("magnitude", line) + 0.03


@pytest.mark.long
def test_merging_by_fisher_matrices_beats_the_average(result):
    line = result("merging")
    assert number("diagonal", line) > number("average", line) + 0.05
    assert number("K-FAC", line) > number("average", line) + 0.05


@pytest.mark.long
def test_the_first_task_is_forgotten_less_with_kfac(result):
    line = result("continual")
    assert number("diagonal", line) > number("penalty", line) + 0.05
    assert number("K-FAC", line) > number("diagonal", line) + 0.03


def test_the_equation_is_solved(result):
    assert number("steps:", result("pinn")) < 1e-3


AGAINST_ADAM = {
    "vae": (r"KFAC", 1.0),
    "detection": (r"KFAC", 0.5),
    "distillation": (r"KFAC", 1.0),
    "burgers": (r"NaturalGradient", 0.01),
    "diffusion": (r"KFAC", 1.0),
    "contrastive": (r"KFAC", 1.0),
}


@pytest.mark.long
@pytest.mark.parametrize("name", AGAINST_ADAM)
def test_natgrad_is_ahead_of_tuned_adam_at_equal_processor_time(result, name):
    ours, share = AGAINST_ADAM[name]
    line = result(name)
    assert number(f"s: {ours}", line) < share * number("Adam", line)


@pytest.mark.long
def test_poles_stay_up_longer_with_kfac(result):
    line = result("actor_critic")
    assert number("KFAC", line) > 1.1 * number("Adam", line)


@pytest.mark.long
def test_the_networks_solution_is_burgers_equations(result):
    assert number("u:", result("burgers")) < 1e-2


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "figure", "most"),
    [
        ("shock", "steps:", 1e-3),
        ("helmholtz", "steps:", 1e-2),
        ("inverse", "coefficient", 0.1),
        ("inverse", ", u", 0.01),
        ("navier_stokes", "velocity", 1e-4),
        ("navier_stokes", "pressure", 1e-3),
    ],
)
def test_harder_equations_are_solved(result, name, figure, most):
    assert number(figure, result(name)) < most


@pytest.mark.long
def test_momentum_helps_where_a_step_has_fewer_states_than_parameters(result):
    line = result("spin_chain")
    assert number("momentum", line) < 0.5 * number("gradient", line)
    assert number("gradient", line) < 0.1 * number("best of 4", line)


@pytest.mark.long
def test_the_critic_is_level_with_adams(result):
    line = result("critic")
    assert number("s: NaturalGradient", line) < number("Adam", line) + 0.02


def test_every_script_has_a_test_of_its_claim():
    here = Path(__file__).read_text(encoding="utf-8")
    assert [p.stem for p in SCRIPTS if f'result("{p.stem}")' not in here and f'"{p.stem}"' not in here] == []
    assert len(SCRIPTS) == 20


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_is_short_says_its_goal_and_is_on_the_page(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= MOST_LINES
    assert lines[0].startswith('"""')
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES]
    (page,) = [text for text in pages if f"](../examples/gallery/{script.name})" in text]
    own = dict(SHOWN_CODE["shown"](page))[f"examples/gallery/{script.name}"]
    assert own == script.read_text(encoding="utf-8"), "python docs/shown_code.py puts the script's code on the page"
    assert f"](images/gallery/{script.stem}.png)" in page
    assert (ROOT / "docs" / "images" / "gallery" / f"{script.stem}.png").exists()


def test_code_on_a_page_is_renewed():
    old = "See [it](../examples/gallery/train.py)\n\n```python\nx = 1\n\ny = 2\n```\n\nand on\n"
    code = (ROOT / "examples" / "gallery" / "train.py").read_text(encoding="utf-8")
    assert SHOWN_CODE["renewed"](old) == old.replace("x = 1\n\ny = 2\n", code)
    assert SHOWN_CODE["renewed"]("no script\n\n```python\nx\n```\n") == "no script\n\n```python\nx\n```\n"


@pytest.mark.parametrize("page", SHOWN_CODE["pages"](), ids=lambda p: p.name)
def test_no_page_needs_the_site_to_show_its_code(page):
    text = page.read_text(encoding="utf-8")
    assert "--8<--" not in text
    assert SHOWN_CODE["renewed"](text) == text, "python docs/shown_code.py puts scripts' code on pages"
