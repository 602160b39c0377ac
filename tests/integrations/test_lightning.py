"""KFAC in Lightning's trainer: the weights are those of the plain loop."""

import csv
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import natgrad
from loops import OPTIONS, kfac, loader, network, plain_loop, same, weights
from natgrad.integrations.lightning import LogDiagnostics
from tiny_models import MODELS, made, rows_of


class Classifier(pl.LightningModule):
    """As docs/integrations.md has it, with something to check."""

    def __init__(self, options, schedule=None, skip=None):
        super().__init__()
        self.net, self.options, self.schedule, self.skip, self.losses = network(), options, schedule, skip, []

    def configure_optimizers(self):
        opt = kfac(self.net, self.options)
        if self.schedule is None:
            return opt
        return {"optimizer": opt, "lr_scheduler": {"scheduler": self.schedule(opt), "interval": "step"}}

    def training_step(self, batch, batch_idx):
        if batch_idx == self.skip:
            return None
        x, y = batch
        loss = self.optimizers().loss(self.net(x.to(self.net[0].weight.dtype)), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        assert not torch.is_grad_enabled()
        self.log("error", nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y))


class ByHand(Classifier):
    def __init__(self, options):
        super().__init__(options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt = self.optimizers()
        loss = opt.loss(self.net(x), y)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()


def fit(model, epochs=3, resume=None, **trainer):
    trainer = {"logger": False, "enable_checkpointing": False} | trainer
    own = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own.fit(model, loader(), loader(24), ckpt_path=resume)
    return own


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [Classifier, ByHand])
def test_the_weights_are_those_of_the_plain_loop(kind, options):
    model = kind(OPTIONS[options])
    fit(model)
    expected, losses = plain_loop(OPTIONS[options])
    same(weights(model.net), expected)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", OPTIONS)
def test_accumulated_and_clipped(options):
    model = Classifier(OPTIONS[options])
    fit(model, accumulate_grad_batches=2, gradient_clip_val=0.1)
    same(weights(model.net), plain_loop(OPTIONS[options], accumulate=2, clip=0.1)[0])


def test_in_bfloat16_and_clipped():
    model = Classifier({})
    model.net.float()
    fit(model, precision="bf16-mixed", gradient_clip_val=0.5)
    expected, losses = plain_loop({}, autocast=True, clip=0.5)
    same(weights(model.net), expected)
    assert losses[-1] < 0.6 * losses[0]


def test_in_float16_with_a_scaler_and_clipped():
    model, bare = (Classifier({"damping": 0.1}) for _ in range(2))
    for each in (model, bare):
        each.net.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    fit(model, plugins=MixedPrecision("16-mixed", "cpu", scaler), gradient_clip_val=0.5)
    fit(bare, gradient_clip_val=0.5)
    assert scaler.get_scale() > 2.0**10
    same(weights(model.net), weights(bare.net), atol=0.01)  # a damping of the run's own would fall out otherwise
    assert model.losses[-1] < 0.6 * model.losses[0]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_checkpoint_resumes_to_the_same_weights(options, tmp_path):
    whole, first, second = (Classifier(OPTIONS[options]) for _ in range(3))
    fit(whole, epochs=4)
    fit(first, epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    torch.manual_seed(99)
    fit(second, epochs=4, resume=tmp_path / "two.ckpt")
    assert len(second.losses) == len(first.losses)
    same(weights(second.net), weights(whole.net))


def test_a_scheduler_of_a_given_step_size():
    def schedule(opt):
        return torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)

    model = Classifier(OPTIONS["given step size"], schedule)
    fit(model)
    same(weights(model.net), plain_loop(OPTIONS["given step size"], schedule=schedule)[0])


def test_a_scheduler_of_an_adapted_step_size_is_refused():
    with pytest.raises(ValueError, match=r"lr, because lr is None: it is adapted at every step\. Give numbers"):
        fit(Classifier({}, lambda opt: torch.optim.lr_scheduler.StepLR(opt, 5)))


def test_a_batch_that_is_skipped_makes_no_step():
    model = Classifier({}, skip=2)
    trainer = fit(model, epochs=2)
    assert len(model.losses) == 10
    assert trainer.optimizers[0].diagnostics["step"] == 9


class TestLogDiagnostics:
    def test_to_tensorboard(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        model = Classifier({})
        fit(model, logger=TensorBoardLogger(tmp_path, name=""), callbacks=[LogDiagnostics()], log_every_n_steps=3)
        events = EventAccumulator(str(tmp_path / "version_0"))
        events.Reload()
        logged = events.Scalars("natgrad/loss")
        assert [e.step for e in logged] == [3, 6, 9, 12, 15, 18]
        assert [e.value for e in logged] == pytest.approx(model.losses[2::3], rel=1e-6)
        assert all(e.value > 0 for e in events.Scalars("natgrad/lr"))

    def test_to_a_logger_of_dictionaries_once_a_step_also_where_batches_accumulate(self, tmp_path):
        logger = CSVLogger(tmp_path, name="")
        fit(Classifier({}), logger=logger, callbacks=[LogDiagnostics()], log_every_n_steps=1, accumulate_grad_batches=2)
        rows = list(csv.DictReader((tmp_path / "version_0" / "metrics.csv").open()))
        assert [int(row["step"]) for row in rows if row["natgrad/damping"]] == list(range(1, 10))

    def test_other_optimizers_are_left_alone(self, tmp_path):
        class Plain(Classifier):
            def configure_optimizers(self):
                return torch.optim.SGD(self.net.parameters(), lr=0.1)

            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        fit(Plain({}), epochs=1, logger=CSVLogger(tmp_path), callbacks=[LogDiagnostics()], log_every_n_steps=1)


class Language(pl.LightningModule):
    """A model of Hugging Face, which computes its own loss."""

    def __init__(self, loss, target=None):
        super().__init__()
        self.net = made(MODELS["subclass of GPT-2"][0])
        self.loss, self.target, self.losses = loss, target, []

    def configure_optimizers(self):
        return natgrad.KFAC(self.net, self.loss, max_kl=0.1)

    def training_step(self, batch, batch_idx):
        out = self.net(**batch)
        loss = out.loss
        if self.target is not None:
            loss = self.optimizers().loss(out.logits.transpose(1, 2), self.target(batch["labels"]))
        self.losses.append(float(loss.detach()))
        return loss


def fit_language(model):
    rows = rows_of(MODELS["subclass of GPT-2"][1])
    own = pl.Trainer(
        max_epochs=4, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own.fit(model, torch.utils.data.DataLoader(rows, len(rows)))


def next_of(labels):
    return nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]


class TestAModelsOwnLoss:
    def test_it_trains(self):
        model = Language("model")
        fit_language(model)
        assert model.losses[-1] < model.losses[0]

    def test_so_does_the_same_loss_by_hand(self):
        model = Language(nn.CrossEntropyLoss(), next_of)
        fit_language(model)
        assert model.losses[-1] < model.losses[0]

    def test_labels_that_are_read_otherwise_are_refused(self):
        with pytest.raises(ValueError, match=r"opt\.loss\(output, target\) is \d.*each label at the position before"):
            fit_language(Language(nn.CrossEntropyLoss(), lambda labels: labels))
