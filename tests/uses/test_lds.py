"""The linear datamodeling score: of scores known to be right, and what an interruption leaves."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import natgrad
from natgrad.uses.lds import correlations
from oracles import close, f64, randn


def ridge(n=40, decay=0.5):
    """Least squares, trained exactly: the losses of queries after training on some examples, and the inputs."""
    x, y, query, wanted = randn(n, 5), randn(n, seed=1), randn(6, 5, seed=2), randn(6, seed=3)

    def retrain(indices, seed):
        A = x[indices].mT @ x[indices] + decay * torch.eye(5, dtype=f64)
        theta = torch.linalg.solve(A, x[indices].mT @ y[indices])
        return (query @ theta - wanted).square()

    return x, y, query, wanted, retrain


def scores_of(x, y, query, wanted):
    model = nn.Linear(5, 1, bias=False).double().eval()
    with torch.no_grad():
        n = len(x)
        model.weight.copy_(torch.linalg.solve(x.mT @ x + torch.eye(5, dtype=f64), x.mT @ y)[None])
    return natgrad.influence(
        model, nn.MSELoss(), (x, y[:, None]), (query, wanted[:, None]), "dense", damping=2 / n
    )  # fmt: skip


def test_influences_of_a_linear_model_have_a_high_score_and_noise_has_none():
    x, y, query, wanted, retrain = ridge()
    result = natgrad.lds(scores_of(x, y, query, wanted), retrain, subsets=100)
    assert result.score > 0.7
    assert result.losses.shape == (100, 6)
    assert (result.members.sum(1) == 20).all()
    assert abs(natgrad.lds(randn(6, 40, seed=9), retrain, subsets=100).score) < 0.2
    assert float(result) == result.score
    wrong = natgrad.lds(-scores_of(x, y, query, wanted), retrain, subsets=100)
    assert wrong.score == pytest.approx(-result.score)


def test_the_users_training_keeps_its_autocast():
    x, y, query, wanted, retrain = ridge()
    seen = []

    def looked(indices, seed):
        seen.append(torch.is_autocast_enabled("cpu"))
        return retrain(indices, seed)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        natgrad.lds(scores_of(x, y, query, wanted), looked, subsets=3)
    assert seen
    assert all(seen)


def test_the_correlation_is_spearmans():
    a, b = randn(4, 30).mul(3).round(), randn(4, 30, seed=1).mul(3).round()  # with ties
    close(correlations(a, b), torch.tensor([spearmanr(p, q).statistic for p, q in zip(a, b, strict=True)], dtype=f64))
    assert correlations(torch.ones(1, 5, dtype=f64), randn(1, 5)).item() == 0


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    *_, retrain = ridge()
    scores, path, calls = randn(6, 40), tmp_path / "results.jsonl", []

    def until(most):
        def counted(indices, seed):
            if len(calls) == most:
                raise Interrupted
            calls.append(seed)
            return retrain(indices, seed)

        return counted

    with pytest.raises(Interrupted):
        natgrad.lds(scores, until(4), subsets=10, path=path)
    path.write_text(path.read_text()[:-20])  # the power went off while the fourth was written
    found = natgrad.lds(scores, until(100), subsets=10, path=path, progress=True)
    assert calls == [0, 1, 2, 3, *range(3, 10)]
    expected = natgrad.lds(scores, retrain, subsets=10)
    assert torch.equal(found.losses, expected.losses)
    again = natgrad.lds(2 * scores, subsets=10, path=path)
    assert again.score == found.score
    more = natgrad.lds(scores, until(100), subsets=12, path=path)  # more subsets: the first ones are the same
    assert torch.equal(more.losses[:10], expected.losses)


def test_several_subsets_at_once():
    *_, retrain = ridge()

    def together(indices, seeds):
        assert len(indices) == len(seeds)
        return torch.stack([retrain(i, s) for i, s in zip(indices, seeds, strict=True)])

    scores = randn(6, 40)
    assert torch.equal(natgrad.lds(scores, together, subsets=10, at_once=4).losses,
                       natgrad.lds(scores, retrain, subsets=10).losses)  # fmt: skip


def test_what_does_not_fit_is_said(tmp_path):
    *_, retrain = ridge()
    path = tmp_path / "results.jsonl"
    natgrad.lds(randn(6, 40), retrain, subsets=3, path=path)
    with pytest.raises(ValueError, match=r"holds results of .*'seed': 0.* give another path"):
        natgrad.lds(randn(6, 40), retrain, subsets=3, path=path, seed=1)
    with pytest.raises(TypeError, match="7 of 10 subsets have not been trained yet"):
        natgrad.lds(randn(6, 40), subsets=10, path=path)
    other = tmp_path / "other.txt"
    other.write_text("something of mine")
    with pytest.raises(ValueError, match="holds results of other things"):
        natgrad.lds(randn(6, 40), retrain, path=other)
    assert other.read_text() == "something of mine"
    with pytest.raises(ValueError, match=r"retrain returned a Tensor of shape \(3,\); expected"):
        natgrad.lds(randn(6, 40), lambda indices, seed: torch.zeros(3))
    with pytest.raises(ValueError, match="6 of 6 losses that retrain returned are not finite"):
        natgrad.lds(randn(6, 40), lambda indices, seed: torch.full((6,), torch.nan))
    with pytest.raises(ValueError, match="expected a Tensor of shape"):
        natgrad.lds(randn(40), retrain)
    with pytest.raises(ValueError, match="is in no folder, as there is no"):
        natgrad.lds(randn(6, 40), retrain, path=tmp_path / "nowhere" / "results.jsonl")
    with pytest.raises(ValueError, match="is a folder; expected the name of a file"):
        natgrad.lds(randn(6, 40), retrain, path=tmp_path)


def test_a_run_that_was_cut_off_anywhere_goes_on(tmp_path):
    *_, retrain = ridge()
    scores, path = randn(6, 40), tmp_path / "results.jsonl"
    expected = natgrad.lds(scores, retrain, subsets=4, path=path)
    whole = path.read_text()
    for kept in (0, 3, 30, len(whole) // 2, len(whole) - 1):
        path.write_text(whole[:kept])
        assert torch.equal(natgrad.lds(scores, retrain, subsets=4, path=path).losses, expected.losses)
        assert path.read_text().count("\n") == 5


def test_lines_that_are_no_results_are_said(tmp_path):
    *_, retrain = ridge()
    scores, path = randn(6, 40), tmp_path / "results.jsonl"
    natgrad.lds(scores, retrain, subsets=3, path=path)
    whole = path.read_text()
    for line in ('{"subset": 1}', "[1, 2]", '{"subset": 1, "losses": [1.0]}', '{"subset": "a", "losses": []}'):
        path.write_text(f"{whole}{line}\n")
        with pytest.raises(ValueError, match="has a line that is not a result"):
            natgrad.lds(scores, retrain, subsets=3, path=path)
        assert path.read_text() == f"{whole}{line}\n"


def test_queries_that_say_nothing_are_warned_of():
    *_, retrain = ridge()
    scores = randn(6, 40)
    scores[1] = 0.0
    with pytest.warns(RuntimeWarning, match="the scores' sums of 1 of 6 queries are the same for all subsets"):
        assert natgrad.lds(scores, retrain, subsets=5).per_query[1] == 0
    with pytest.warns(RuntimeWarning, match="the found losses of 6 of 6 queries are the same for all subsets"):
        assert natgrad.lds(randn(6, 40), lambda i, s: torch.ones(6), subsets=5).score == 0


def test_scores_and_seeds_that_say_nothing_are_refused():
    *_, retrain = ridge()
    scores = randn(6, 40)
    scores[2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 240 scores are not finite"):
        natgrad.lds(scores, retrain)
    with pytest.raises(ValueError, match="seed=-1 is not usable"):
        natgrad.lds(randn(6, 40), retrain, seed=-1)
