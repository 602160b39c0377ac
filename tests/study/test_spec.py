"""Reading a study's TOML file: what it means, and what is said of every mistake in it."""

import pytest

from natgrad.checks.errors import UserError
from natgrad.study.spec import SHIPPED, Job, load_spec, read_spec

GOOD = """
seeds = [3, 5]
steps = 20
tasks = ["curves"]
optimizers = ["KFAC"]
"""


def read(text):
    return read_spec("given", "given.toml", text)


def test_lists_of_names_and_defaults():
    spec = read(GOOD)
    assert spec.seeds == (3, 5)
    assert [t.name for t in spec.tasks] == ["curves"]
    assert spec.tasks[0].budget.steps == 20
    assert spec.optimizers[0].settings == {"curves": ({},)}
    assert (spec.title, spec.baseline, spec.threads, spec.measure.residual) == ("given", "KFAC", 1, False)


def test_tables_grids_and_overrides():
    spec = read("""
seconds = 3
batch = 50
baseline = "slow"
[tasks.curves]
[tasks.other]
use = "perceptron"
steps = 7
batch = 10
targets = [0.5, 1]
[optimizers.slow]
use = "SGD"
lr = [0.1, 0.2]
momentum = [0.5, 0.9]
[optimizers.slow.on.other]
lr = 0.3
[optimizers.Adam]
betas = [[0.9, 0.99]]
tasks = ["other"]
""")
    curves, other = spec.tasks
    assert (curves.budget.seconds, curves.batch, other.budget.steps, other.batch) == (3.0, 50, 7, 10)
    assert other.targets == (0.5, 1.0)
    slow, adam = spec.optimizers
    assert len(slow.settings["curves"]) == 4
    assert slow.settings["other"] == ({"lr": 0.3, "momentum": 0.5}, {"lr": 0.3, "momentum": 0.9})
    assert adam.settings == {"other": ({"betas": [0.9, 0.99]},)}
    assert spec.in_seconds


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_are_good(name):
    if name in ("peers", "language"):
        pytest.importorskip("pytorch_optimizer")
    spec = load_spec(name)
    assert spec.name == name
    assert len(spec.optimizers) > (name != "pinns")
    assert spec.in_seconds == (name in ("peers", "pinns", "pinns-long"))


def test_short_and_long_runs_of_physics_informed_networks_have_the_same_settings():
    short, long = (load_spec(name) for name in ("pinns", "pinns-long"))
    assert short.optimizers[0] == long.optimizers[0]
    budgets = {task.name: task.budget.seconds for task in long.tasks}
    assert all(task.budget.seconds < budgets[task.name] for task in short.tasks)


def test_the_clock_of_the_processor():
    spec = read(GOOD + '\nclock = "cpu"' if "[" not in GOOD else 'clock = "cpu"\n' + GOOD)
    plain = read(GOOD)
    job, its = (s.job(s.tasks[0], s.optimizers[0], {}, 3) for s in (spec, plain))
    assert (job.what()["clock"], its.clock) == ("cpu", "wall")
    assert "clock" not in its.what()
    with pytest.raises(UserError, match="'wall' or 'cpu'"):
        read('clock = "sun"\n' + GOOD)


def test_what_a_run_depends_on():
    spec = read(GOOD)
    job = spec.job(spec.tasks[0], spec.optimizers[0], {}, 3)
    assert isinstance(job, Job)
    more_steps = read(GOOD.replace("20", "30"))
    assert job.what() != more_steps.job(more_steps.tasks[0], more_steps.optimizers[0], {}, 3).what()
    more_seeds = read(GOOD.replace("[3, 5]", "[3, 5, 7]").replace('"KFAC"', '"KFAC", "Adam"'))
    assert job.what() == more_seeds.job(more_seeds.tasks[0], more_seeds.optimizers[0], {}, 3).what()


MISTAKES = {
    "TOML": ("steps 3\n", ["is not TOML", "line 1"]),
    "words without quotes": ("title = words", ["is not TOML", "quotes"]),
    "unknown key": (GOOD + "sedes = 3", []),
    "near key": ("step = 3\n" + GOOD, ["'step'", "did you mean 'steps'"]),
    "far key": ("qqq = 3\n" + GOOD, ["'qqq'", "take one of", "tasks"]),
    "no tasks": ('steps = 3\noptimizers = ["Adam"]', ["tasks is empty", "curves"]),
    "empty tasks": (GOOD.replace('["curves"]', "[]"), ["tasks is empty"]),
    "tasks of numbers": (GOOD.replace('["curves"]', "[1]"), ["tasks is [1]"]),
    "tasks as text": (GOOD.replace('["curves"]', '"curves"'), ['tasks is "curves"']),
    "tasks twice": (GOOD.replace('["curves"]', '["curves", "curves"]'), ["tasks", "'curves' twice"]),
    "a task that is no table": (GOOD.replace('tasks = ["curves"]', "") + "[tasks]\ncurves = 3", ["tasks.curves is 3"]),
    "unknown task": (GOOD.replace("curves", "curvse"), ["tasks.curvse", "did you mean 'curves'"]),
    "unknown use of a task": (
        GOOD.replace('tasks = ["curves"]', "") + '[tasks.a]\nuse = "mnits"',
        ["tasks.a.use", "'mnits'", "mnist"],
    ),
    "no optimizers": ('steps = 3\ntasks = ["curves"]', ["optimizers is empty", "KFAC"]),
    "unknown optimizer": (GOOD.replace("KFAC", "KFCA"), ["optimizers.KFCA", "did you mean 'KFAC'"]),
    "optimizer of its own name": (GOOD.replace("KFAC", "mine"), ["optimizers.mine", "take one of", 'use = "KFAC"']),
    "unknown option": (
        GOOD.replace('optimizers = ["KFAC"]', "") + "[optimizers.KFAC]\ncentred = false",
        ["no option 'centred'", "optimizers.KFAC", "'centered'"],
    ),
    "option of the wrong type": (
        GOOD.replace('optimizers = ["KFAC"]', "") + '[optimizers.KFAC]\ncentered = "no"',
        ["optimizers.KFAC.centered", '"no"', "true or false"],
    ),
    "option out of range": (
        GOOD.replace('optimizers = ["KFAC"]', "") + "[optimizers.KFAC]\ndecay = 2.0",
        ["optimizers.KFAC", "decay=2"],
    ),
    "option that the optimizer refuses": (
        GOOD.replace('optimizers = ["KFAC"]', "") + '[optimizers.KFAC]\nstructure = "kfca"',
        ["optimizers.KFAC", "structure", "kfac"],
    ),
    "no learning rate": (GOOD.replace("KFAC", "PRONG"), ["optimizers.PRONG", "lr"]),
    "empty grid": (GOOD.replace('optimizers = ["KFAC"]', "") + "[optimizers.Adam]\nlr = []", ["Adam.lr", "empty list"]),
    "batch of an optimizer": (
        GOOD.replace('optimizers = ["KFAC"]', "") + "[optimizers.Adam]\nbatch = 0",
        ["optimizers.Adam.batch", "at least 1"],
    ),
    "on no task": (
        GOOD.replace('optimizers = ["KFAC"]', "") + "[optimizers.Adam.on.mnist]\nlr = 1e-3",
        ["optimizers.Adam.on.mnist", "no task of the study"],
    ),
    "limited to no task": (
        GOOD.replace('optimizers = ["KFAC"]', "") + '[optimizers.Adam]\ntasks = ["curve"]',
        ["optimizers.Adam.tasks", "'curves'"],
    ),
    "no budget": ('tasks = ["curves"]\noptimizers = ["Adam"]', ["tasks.curves", "without a budget", "steps"]),
    "a misspelt budget": ("step = 60\n" + GOOD.replace("steps = 20\n", ""), ["no key 'step'", "did you mean 'steps'?"]),
    "a misspelt budget in seconds": (
        "second = 60\n" + GOOD.replace("steps = 20\n", ""),
        ["no key 'second'", "did you mean 'seconds'?"],
    ),
    "a misspelt budget of a task": (
        GOOD.replace("steps = 20\n", "").replace('tasks = ["curves"]', "") + "[tasks.curves]\nStep = 3",
        ["no key 'Step' in [tasks.curves]", "did you mean 'steps'?"],
    ),
    "misspelt tasks": (GOOD.replace("tasks", "task"), ["no key 'task'", "did you mean 'tasks'?"]),
    "misspelt optimizers": (GOOD.replace("optimizers", "optimisers"), ["no key 'optimisers'", "'optimizers'?"]),
    "two budgets": ("seconds = 3\n" + GOOD, ["steps", "together with seconds"]),
    "steps of the wrong type": (GOOD.replace("20", "2.5"), ["steps is 2.5", "whole number"]),
    "no steps": (GOOD.replace("20", "0"), ["steps is 0", "at least 1"]),
    "negative seconds": (GOOD.replace("steps = 20", "seconds = -1"), ["seconds is -1", "above 0"]),
    "seconds as text": (GOOD.replace("steps = 20", 'seconds = "soon"'), ['seconds is "soon"', "above 0"]),
    "endless seconds": (GOOD.replace("steps = 20", "seconds = inf"), ["seconds is inf", "above 0"]),
    "seeds of zero": (GOOD.replace("[3, 5]", "0"), ["seeds is 0", "how many"]),
    "no seeds": (GOOD.replace("[3, 5]", "[]"), ["seeds is []"]),
    "seeds twice": (GOOD.replace("[3, 5]", "[3, 3]"), ["seeds is [3, 3]", "different"]),
    "negative seeds": (GOOD.replace("[3, 5]", "[-1]"), ["seeds is [-1]"]),
    "true as seeds": (GOOD.replace("[3, 5]", "true"), ["seeds is true"]),
    "unknown baseline": ('baseline = "KAFC"\n' + GOOD, ["baseline", "'KFAC'"]),
    "title of the wrong type": ("title = 3\n" + GOOD, ["title is 3", "text"]),
    "evaluations": ("evaluations = 1\n" + GOOD, ["evaluations is 1", "at least 2"]),
    "threads": ("threads = 0\n" + GOOD, ["threads is 0"]),
    "measure as a key": ("measure = true\n" + GOOD, ["measure is true", "[measure]"]),
    "measure of the wrong type": (GOOD + '[measure]\nresidual = "yes"', ["measure.residual", '"yes"', "true or false"]),
    "unknown key of measure": (GOOD + "[measure]\nresiduals = true", ["'residuals'", "[measure]", "'residual'"]),
    "targets": (
        GOOD.replace('tasks = ["curves"]', "") + '[tasks.curves]\ntargets = ["low"]',
        ["tasks.curves.targets", "list of numbers"],
    ),
    "key of a task": (
        GOOD.replace('tasks = ["curves"]', "") + "[tasks.curves]\nstep = 3",
        ["'step'", "[tasks.curves]", "'steps'"],
    ),
}
MISTAKES["unknown key"] = (GOOD + "sedes = 3", ["'sedes'", "'seeds'"])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_file_and_key(name):
    text, words = MISTAKES[name]
    with pytest.raises(UserError) as error:
        read(text)
    message = str(error.value)
    assert message.startswith("given.toml"), message
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_task_that_nobody_runs_on():
    with pytest.raises(UserError, match=r"tasks\.mnist is a task that no optimizer runs on"):
        read('steps = 3\ntasks = ["curves", "mnist"]\n[optimizers.Adam]\ntasks = ["curves"]')


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="did you mean 'centering'"):
        load_spec("centring")
    with pytest.raises(UserError, match="is a folder"):
        load_spec(str(tmp_path))
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_spec(str(tmp_path / "bytes.toml"))


def test_peers_without_their_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match="pip install pytorch_optimizer"):
        read(GOOD.replace("KFAC", "SOAP"))
