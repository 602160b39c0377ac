"""The benchmark's problems: their solutions solve them, their points are where they should be; published curves."""

import math

import pytest
import torch
from torch import Generator

from natgrad.pde import Derivatives
from natgrad.study.beside import HEADINGS, beside_rows, draw_beside, has_published
from natgrad.study.equations import LogFokkerPlanck
from natgrad.study.pinns import SETTINGS, batches, objective, pinn
from natgrad.study.published import Curve, fastest, own, published, source
from natgrad.study.spec import TaskEntry
from natgrad.study.summary import Group, TaskSummary
from natgrad.study.tasks import TASKS
from natgrad.study.training import Budget
from oracles import close, f64


def derivatives_of(equation, x):
    """Those of the solution, by autograd."""
    x = x.clone().requires_grad_(True)
    u = equation.solution(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    over = equation.over or range(equation.d)
    parts = [torch.autograd.grad(g[:, i].sum(), x, retain_graph=True, allow_unused=True)[0] for i in over]
    laplacian = sum(p[:, i : i + 1] for p, i in zip(parts, over, strict=True) if p is not None)
    return Derivatives(u, g.unsqueeze(2), laplacian + torch.zeros_like(u))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_solution_has_no_residual(name):
    setting = SETTINGS[name]
    equation = setting.equation(setting.d)
    x = equation.interior(20, Generator().manual_seed(0))
    residual = equation.residual(derivatives_of(equation, x), x)
    close(residual, torch.zeros(20, 1, dtype=f64), 1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_sizes_are_those_in_the_name_and_published_curves_are_there(name):
    setting, task = SETTINGS[name], pinn(name)
    assert sum(p.numel() for p in task.make_model(0).parameters()) == int(name.rsplit("-", 1)[1])
    (inside, conditions), (zero, values) = next(batches(setting, 0))
    assert (len(inside), len(conditions)) == (setting.interior, setting.conditions)
    assert not zero.any()
    assert values.shape == (setting.conditions, 1)
    assert len(published(name)) >= 6
    assert name in TASKS


def test_points_of_heat_are_half_at_the_start_and_half_on_the_faces():
    equation = SETTINGS["heat4d-449"].equation(4)
    x = equation.conditions(1000, Generator().manual_seed(0))
    at_start = x[:, 0] == 0
    assert at_start.sum() == 500
    assert ((x[~at_start][:, 1:] == 0) | (x[~at_start][:, 1:] == 1)).any(1).all()
    assert not ((x[at_start][:, 1:] == 0) | (x[at_start][:, 1:] == 1)).any()


def test_points_of_fokker_planck_are_in_its_box():
    equation = LogFokkerPlanck(9)
    x = equation.interior(500, Generator().manual_seed(0))
    assert 0 <= float(x[:, 0].min()) <= float(x[:, 0].max()) <= 1
    assert float(x[:, 1:].min()) < -4.5 < 4.5 < float(x[:, 1:].max())
    assert not equation.conditions(9, Generator().manual_seed(0))[:, 0].any()


def test_points_stay_as_many_steps_as_is_said():
    def first(name, steps):
        it = batches(SETTINGS[name], 0)
        return [next(it)[0][0][0, 0].item() for _ in range(steps)]

    assert len(set(first("poisson2d-257", 5))) == 1
    assert len(set(first("poisson5d-449", 5))) == 5
    changes = first("heat4d-449", 201)
    assert changes[0] == changes[99] != changes[100] == changes[199] != changes[200]


def test_the_objective_is_half_the_mean_squares():
    task = pinn("heat1d-257")
    model = task.make_model(0)
    x, y = task.sample(7)
    residual, misfit = model(x[0], residual=True), model(x[1]) - y[1]
    expected = 0.5 * residual.square().mean() + 0.5 * misfit.square().mean()
    close(objective(task.loss, model, x, y), expected, 1e-12)


def test_the_figure_is_the_error_itself():
    task = pinn("poisson2d-257")
    model = task.make_model(0)
    x = SETTINGS["poisson2d-257"].equation(2).interior(9000, Generator().manual_seed(5))
    error = model(x) - (math.pi * x).sin().prod(1, keepdim=True)
    assert task.evaluate(model)["error"] == pytest.approx(float(error.square().mean().sqrt()))


def test_the_first_time_at_an_error_and_who_was_first():
    curves = [Curve("a", 1e-7, [(1.0, 1e-3), (9.0, 1e-7)]), Curve("b", 1e-4, [(2.0, 1e-4), (3.0, 1e-2)])]
    assert curves[0].first(1e-5) == 9.0
    assert curves[1].first(1e-5) is None
    assert fastest(curves, 1e-4) == (2.0, "b")
    assert fastest(curves, 1e-8) is None
    assert "arXiv:2405.15603" in source()


def summary_of(name):
    points = [{"step": i, "seconds": 1.0 + i, "error": 10.0**-i} for i in range(6)]
    result = {"task": name, "optimizer": "mine", "setting": {}, "seed": 0, "status": "finished", "figure": "error"}
    groups = [Group("mine", {}, [{**result, "curve": points}], 1)]
    return TaskSummary(TaskEntry(name, name, Budget(seconds=10.0)), "error", groups, [], [])


def test_a_table_and_a_picture_beside_the_published_ones(tmp_path):
    task = summary_of("poisson2d-257")
    mine, theirs = beside_rows(task)
    assert len(mine) == len(theirs) == len(HEADINGS)
    assert mine == ("mine, 1 seed", "5 s", "6 s", "–", "1e-05")
    assert theirs[2] == "59 s (ENGD, by layers)"
    assert has_published(task)
    assert not has_published(summary_of("pinn"))
    draw_beside(task, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert own("x", task.groups[0].results[0]).best == 1e-5


def points(batch):
    (inside, conditions), (zero, values) = batch
    assert zero.shape == inside[:, :1].shape
    assert values.shape == conditions[:, :1].shape
    return inside, conditions


def test_mini_batches_go_round_the_set_and_the_set_changes_when_it_should():
    fixed = batches(SETTINGS["poisson2d-257"], 0, 300)
    every, conditions = points(next(batches(SETTINGS["poisson2d-257"], 0)))
    rounds = [[points(next(fixed)) for _ in range(3)] for _ in range(2)]
    for its in rounds:
        for whole, parts in zip((every, conditions), zip(*its, strict=True), strict=True):
            assert len({len(p) for p in parts}) == 1
            close(torch.cat(parts).sort(0).values, whole.sort(0).values, 0)
    assert not torch.equal(rounds[0][0][0], rounds[1][0][0])
    new = batches(SETTINGS["poisson5d-449"], 0, 500)
    (first, at), (second, _) = points(next(new)), points(next(new))
    assert (len(first), len(at)) == (500, 83)
    assert not set(first[:, 0].tolist()) & set(second[:, 0].tolist())
    with pytest.raises(ValueError, match="from 1 to 900"):
        next(batches(SETTINGS["poisson2d-257"], 0, 901))
