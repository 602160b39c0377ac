"""The language study: its text, its decoder, its peers, its schedule."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from natgrad.checks.errors import UserError
from natgrad.study import text
from natgrad.study.decoder import Decoder, rotated
from natgrad.study.optimizers import OPTIMIZERS, matrices
from natgrad.study.peers import NorMuon, SOAPMuon
from natgrad.study.run import perform
from natgrad.study.spec import load_spec, read_spec
from natgrad.study.tasks import TASKS
from natgrad.study.training import Budget, Schedule

f64 = torch.float64


class TestText:
    def test_documents_are_for_training_or_for_validation(self):
        training, validation = text.corpus()
        assert 6 < len(training) / len(validation) < 12
        assert len(training) > 4e6
        words = bytes(training[:2000].tolist()).decode(errors="replace")
        assert words.count("import") + words.count("#") > 1

    def test_batches_are_windows_and_what_comes_next(self):
        task = TASKS["text-64"]()
        x, y = next(task.batches(0, 3))
        assert x.shape == y.shape == (3, text.CONTEXT)
        assert torch.equal(x[:, 1:], y[:, :-1])
        again, _ = next(task.batches(0, 3))
        assert torch.equal(x, again)

    def test_the_figure_of_the_first_weights_is_that_of_a_uniform_guess(self):
        task = TASKS["text-64"]()
        assert task.evaluate(task.make_model(0))["validation loss"] == pytest.approx(math.log(256), abs=0.05)

    def test_a_python_without_sources(self, tmp_path, monkeypatch):
        text.corpus.cache_clear()
        monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(UserError, match="needs the sources of Python's standard library"):
            text.corpus()
        text.corpus.cache_clear()


class TestDecoder:
    def test_it_sees_nothing_ahead(self):
        model = Decoder(20, 64, 2).double()
        x = torch.randint(20, (2, 9))
        other = x.clone()
        other[:, 6:] = (other[:, 6:] + 1) % 20
        assert torch.allclose(model(x)[..., :6], model(other)[..., :6])
        assert not torch.allclose(model(x)[..., 6], model(other)[..., 6])

    def test_products_of_rotated_features_depend_on_the_distance_alone(self):
        q, k = torch.randn(2, 1, 1, 1, 8, dtype=f64).expand(2, 1, 1, 7, 8)
        scores = rotated(q) @ rotated(k).mT
        for distance in range(-6, 7):
            diagonal = scores[0, 0].diagonal(distance)
            assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal))

    def test_first_weights(self):
        model = Decoder(256, 128, 4)
        assert model.blocks[0].up.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert model.blocks[3].down.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
        assert not model.blocks[1].qkv.bias.any()

    def test_hidden_matrices(self):
        hidden, others = matrices(model := Decoder(20, 64, 2))
        assert len(hidden) == 8
        assert {id(model.head.weight), id(model.tokens.weight)} <= {id(p) for p in others}


def polar(V):
    U, _, W = torch.linalg.svd(V, full_matrices=False)
    return U @ W


class TestPeers:
    @pytest.fixture
    def exact(self, monkeypatch):
        monkeypatch.setattr("natgrad.study.peers.newton_schulz", polar)

    def test_normuon_gives_every_row_its_share(self, exact):
        """Of rows whose lengths stay the same over the steps, all come out equally long."""
        p = nn.Parameter(torch.zeros(6, 4, dtype=f64))
        opt = NorMuon([p], lr=1.0, momentum=0.0, beta2=0.0)
        p.grad = torch.randn(6, 4, dtype=f64)
        opt.step()
        assert torch.allclose(p.norm(dim=1), torch.full((6,), 0.2 * 2, dtype=f64))

    def test_soap_muon_takes_the_sign_in_the_eigenbases_at_first(self, exact):
        """With one gradient the bases are its singular vectors, and Adam's ratio is one on the diagonal."""
        g = torch.randn(5, 5, dtype=f64)
        p = nn.Parameter(torch.zeros(5, 5, dtype=f64))
        opt = SOAPMuon([p], lr=1.0, momentum=0.0)
        p.grad = g
        opt.step()
        assert torch.allclose(-p.detach(), 0.2 * 5**0.5 * polar(g), atol=1e-4)

    def test_soap_muons_bases_become_the_eigenvectors(self, exact):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(4, 6, dtype=f64))
        opt = SOAPMuon([p], lr=0.01, refresh_every=1)
        scale = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=f64)
        for _ in range(300):
            p.grad = scale[:, None] * torch.randn(4, 6, dtype=f64)
            opt.step()
        L = opt.state[p]["left_basis"]
        D = L.mT @ opt.state[p]["left"] @ L
        assert (D - torch.diag(D.diagonal())).norm() < 0.2 * D.norm()
        assert torch.allclose(L.mT @ L, torch.eye(4, dtype=f64))

    @pytest.mark.parametrize("name", ["NorMuon", "SOAPMuon", "NewtonMuon", "Muon"])
    def test_they_learn(self, name):
        task = TASKS["text-64"]()
        model = task.make_model(0)
        stepper = OPTIMIZERS[name].make(model, task, {"lr": 0.02, "rest": 0.01})
        batches = task.batches(0, 2)
        before = F.cross_entropy(model((x := next(batches))[0]), x[1]).item()
        for _ in range(12):
            stepper.step(next(batches))
        assert F.cross_entropy(model(x[0]), x[1]).item() < before - 1.5

    @pytest.mark.parametrize("name", ["Muon", "NorMuon", "SOAPMuon"])
    def test_adamw_beside_them_has_betas_of_its_own(self, name):
        task = TASKS["text-64"]()
        setting = {"lr": 0.02, "rest": 0.01, "rest_betas": [0.8, 0.95]}
        stepper = OPTIMIZERS[name].make(task.make_model(0), task, setting)
        _, beside = stepper.optimizers
        assert isinstance(beside, torch.optim.AdamW)
        assert beside.defaults["betas"] == (0.8, 0.95)
        assert "rest_betas" in OPTIMIZERS[name].options()
        assert "rest_betas" not in OPTIMIZERS["NewtonMuon"].options()


class TestSchedule:
    def test_rates_rise_and_fall(self):
        schedule, budget = Schedule(0.1, 0.5), Budget(20)
        factors = [schedule.factor(budget, i, i / 20) for i in range(20)]
        assert factors[:3] == [0.5, 1.0, 1.0]
        assert factors[10] == 1.0
        assert factors[15] == pytest.approx(0.5)
        assert factors[19] == pytest.approx(0.1)
        assert Schedule().factor(budget, 0, 0.0) == 1.0

    def test_in_seconds_the_first_step_moves(self):
        assert 0 < Schedule(0.1, 0.5).factor(Budget(seconds=10.0), 0, 0.0) < 0.1

    def test_the_last_rate_is_the_schedules_and_a_length_has_one_of_its_own(self):
        spec = read_spec("s", "s.toml", """
        seeds = 1
        steps = 10
        tasks = ["classifier"]
        batch = 10
        evaluations = 2
        [schedule]
        warmup = 0.2
        cooldown = 0.5
        [optimizers.AdamW]
        lr = 1e-3
        [optimizers.short]
        use = "AdamW"
        length = 0.5
        """)  # fmt: skip
        jobs = [spec.job(spec.tasks[0], o, o.settings["classifier"][0], 0) for o in spec.optimizers]
        results = [perform(job) for job in jobs]
        assert [r["curve"][-1]["step"] for r in results] == [10, 5]
        assert all(r["status"] == "finished" for r in results)
        assert jobs[0].what()["schedule"] == {"warmup": 0.2, "cooldown": 0.5}

    def test_an_optimizer_may_have_a_cooldown_of_its_own(self, monkeypatch):
        spec = read_spec("s", "s.toml", """
        seeds = 1
        steps = 4
        tasks = ["poisson2d-257"]
        batch = 20
        [optimizers.NaturalGradient]
        lr = 1.0
        accelerate = true
        cooldown = 0.5
        """)  # fmt: skip
        rates = []
        inner = natgrad.NaturalGradient.step

        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return inner(self, *args)

        monkeypatch.setattr(natgrad.NaturalGradient, "step", step)
        (entry,) = spec.optimizers
        result = perform(spec.job(spec.tasks[0], entry, entry.settings["poisson2d-257"][0], 0))
        assert (result["status"], rates) == ("finished", [1.0, 1.0, 1.0, 0.5])

    def test_an_adaptive_optimizer_may_be_without_the_studys_cooldown(self):
        spec = read_spec("s", "s.toml", """
        steps = 2
        tasks = ["text-64"]
        schedule = {cooldown = 0.5}
        [optimizers.Adam]
        [optimizers.KFAC]
        cooldown = 0.0
        """)  # fmt: skip
        schedules = [spec.job(spec.tasks[0], o, o.settings["text-64"][0], 0).used_schedule for o in spec.optimizers]
        assert schedules == [Schedule(cooldown=0.5), Schedule()]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("[schedule]\nwarmup = 1.5", "schedule.warmup is 1.5; expected a share of the budget"),
            ("[schedule]\ncooldown = 0.5\n[optimizers.KFAC]", "KFAC adapts its step size; expected a number for lr"),
            (
                "[schedule]\nwarmup = 0.1\ncooldown = 0.5\n[optimizers.KFAC]\ncooldown = 0.0",
                "KFAC adapts its step size; expected a number for lr",
            ),
            (
                "[schedule]\ncooldown = 0.5\n[optimizers.KFAC]\ncooldown = [0.0, 0.5]",
                "KFAC adapts its step size; expected a number for lr",
            ),
            ("[optimizers.KFAC]\ncooldown = 0.5", "KFAC adapts its step size; expected a number for lr"),
            ("[optimizers.KFAC]\nlr = 0.1\nmomentum = 0.9\ncooldown = 1.5", "cooldown is 1.5; expected a share of the"),
            ("[schedule]\nwarm = 0.5", "there is no key 'warm' in \\[schedule\\]"),
            ("[optimizers.Adam]\nlength = 1.5", "optimizers.Adam.length is 1.5; expected a share of the budget"),
        ],
    )
    def test_mistakes(self, line, message):
        adam = "" if "Adam" in line else "[optimizers.Adam]\n"
        with pytest.raises(UserError, match=message):
            read_spec("s", "s.toml", f'steps = 5\ntasks = ["text-64"]\n{line}\n{adam}')


def test_the_shipped_study():
    pytest.importorskip("pytorch_optimizer")
    spec = load_spec("language")
    assert len(spec.seeds) == 8
    assert spec.schedule == Schedule(0.1, 0.9)
    assert {"AdamW", "Muon", "NorMuon", "SOAP", "SOAPMuon", "NewtonMuon"} <= {o.use for o in spec.optimizers}
