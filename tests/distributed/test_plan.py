"""What is predicted, against a hand's computation and against what ranks send and hold."""

import json
import math

import pytest
import torch

import rank_messages
from natgrad.cli import main
from natgrad.distributed.plan import Machine, Prediction, Settings, best, predict
from natgrad.distributed.sizes import MODELS, Size, sizes_of


@pytest.mark.parametrize("adaptive", [True, False])
def test_bytes_sent_are_those_of_a_run(ranks, adaptive):
    """The moments go round once in the first step, and each inverse once from one rank to the others."""
    came = ranks(2, rank_messages.planned, adaptive)
    sizes, _, _ = came[0]
    assert all(sent["the moments"] == sum(s.moments_sent(8) for s in sizes) + 16 for _, sent, _ in came)
    assert sum(sent["the inverses"] for _, sent, _ in came) == sum(s.inverse_sent(8) for s in sizes)


def test_bytes_held_are_those_of_a_run(ranks):
    for sizes, _, held in ranks(2, rank_messages.planned, False):
        assert held == sum(s.held(8) for s in sizes)


def test_sizes_of_a_layer_by_hand():
    fc = Size.affine("fc", 3, 2, cases=5)
    assert fc.parameters == 8
    assert fc.moments_sent(4) == 8 * (3 + 1) + 4 * (6 + 3 + 1)
    assert fc.inverse_sent(4) == 4 * (6 + 3 + 3 + 3)
    assert fc.held(4) == 4 * ((9 + 4 + 3 + 2) + (9 + 4 + 4 + 3))
    assert fc.inverse_flops() == 27 + 8 + 8
    assert fc.direction_flops() == 2 * 2 * 3 * (2 + 3)
    assert fc.moments_flops() == 2 * (9 + 4)
    tokens = Size.embedding("tokens", 100, 2, 5)
    assert tokens.inverse_sent(4) == 4 * (100 + 3)
    assert tokens.direction_flops() == 2 * 200 * (1 + 2)


@pytest.mark.parametrize("scheme", ["replicated", "sharded"])
def test_one_rank_sends_nothing(scheme):
    p = predict(MODELS["gpt2-small"](), 1, scheme, Machine(), Settings())
    assert p.sending == 0 < p.time


def test_the_models_have_the_parameters_that_are_published():
    """124M, and 6.7B (Touvron et al. 2023, table 2)."""
    count = {name: sum(s.parameters for s in sizes()) for name, sizes in MODELS.items()}
    assert count["gpt2-small"] == 124_439_808
    assert round(count["llama-7b"] / 1e9, 1) == 6.7


def test_shards_take_less_memory_on_more_ranks():
    held = [predict(MODELS["llama-7b"](), n, "sharded", Machine(), Settings()).held for n in (1, 2, 8, 64, 1024)]
    assert held == sorted(held, reverse=True)
    assert held[2] < 1.1 * held[0] / 8


def test_an_all_reduce_by_hand():
    m = Machine(bandwidth=100.0, latency=1.0)
    assert m.all_reduce(400, 4) == pytest.approx(2 * (300 / 100 + 2))
    assert m.spread(400, 4, messages=3) == pytest.approx(300 / 100 + 2 + 2)


def test_the_best_is_the_fastest_that_fits():
    slow, fast = (Prediction("x", 1, held, {"a": s}) for held, s in ((1.0, 2.0), (3.0, 1.0)))
    assert best([slow, fast], 4.0) is fast
    assert best([slow, fast], 2.0) is slow
    assert best([slow, fast], 0.5) is None


def test_no_such_scheme():
    with pytest.raises(ValueError, match="scheme='both' is unknown: expected one of 'replicated', 'sharded'"):
        predict([], 1, "both", Machine(), Settings())


def planned(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    return stopped.value.code, capsys.readouterr()


def test_the_command_says_what_to_use(capsys):
    code, said = planned(capsys, "llama-7b", "--ranks", "1,8")
    assert code == 0
    assert "6,738.4M parameters" in said.out
    rows = [line.split() for line in said.out.splitlines() if line.strip()[:1] in "18"]
    assert [row[:2] for row in rows] == [[n, s] for n in "18" for s in ("replicated", "sharded")]
    assert ["use" in row for row in rows] == [False, False, False, True]


def test_the_command_plans_for_a_model_of_ones_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "own_for_plan.py").write_text(
        "import torch\n"
        "def problem():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))\n"
        "    return model, torch.nn.CrossEntropyLoss(), (torch.randn(9, 3), torch.zeros(9, dtype=torch.long))\n"
    )
    monkeypatch.chdir(tmp_path)
    constants = tmp_path / "machine.json"
    constants.write_text(json.dumps({"flops": 1e9, "latency": 1e-3}))
    code, said = planned(capsys, "own_for_plan:problem", "--ranks", "2", "--machine", str(constants))
    assert code == 0
    assert "in 2 layers" in said.out
    code, faster = planned(
        capsys, "own_for_plan:problem", "--ranks", "2", "--machine", str(constants), "--latency", "1"
    )
    first, second = (float(s.out.split("replicated")[1].split()[0]) for s in (said, faster))
    assert second < first / 10
    assert math.isfinite(first)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt3"], "'gpt3' is not a model; expected gpt2-small, llama-7b, or MODULE:FUNCTION"),
        (["gpt2-small", "--ranks", "1;2"], "--ranks was '1;2'; expected numbers separated by commas"),
        (["gpt2-small", "--ranks", "0"], "--ranks was '0'; expected"),
        (["gpt2-small", "--batch", "0"], "--batch was 0; expected the batch size on each rank, at least 1"),
        (["gpt2-small", "--bandwidth", "-1"], "--bandwidth was -1; expected a positive number, in GB/s"),
        (["gpt2-small", "--machine", "missing.json"], "cannot be read (No such file or directory)"),
        (["gpt2-small", "--machine", "words.json"], "does not have positive numbers"),
        (["gpt2-small", "--machine", "others.json"], "does not have positive numbers"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.json").write_text("fast")
    (tmp_path / "others.json").write_text('{"speed": 3}')
    code, said = planned(capsys, *arguments)
    assert code == 2
    assert words in said.err
    assert said.err.count("\n") == 1


def test_sizes_of_a_model_without_factors():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).double()
    sizes = sizes_of(*rank_messages.moments_of(model, torch.randn(6, 3, dtype=torch.float64)))
    assert [(s.name, s.inputs, s.outputs, s.other, s.parameters) for s in sizes] == [
        ("0", (3, 3), (4, 4), 0, 16),
        ("1", (), (), 12, 8),
    ]
