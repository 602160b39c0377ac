"""NewtonMuon in Lightning and in Hugging Face's own trainer, with nothing changed: the weights are those of the plain
loop."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import SequentialSampler

import natgrad
from loops import loader, network, same, weights

OPTIONS = {"lr": 0.05, "refresh_every": 3}


class Module(pl.LightningModule):
    """As people write one: the optimizer is made for the module itself, or for its network."""

    def __init__(self, of, by_forward=False):
        super().__init__()
        self.net, self.of, self.by_forward = network(), of, by_forward

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        opt = natgrad.NewtonMuon(self if self.of == "module" else self.net, **OPTIONS)
        return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 4, 0.5), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x) if self.by_forward else self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self(100 * batch[0])


def plain(epochs=3, accumulate=1):
    model = network()
    opt = natgrad.NewtonMuon(model, **OPTIONS)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 4, 0.5)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            if i % accumulate == 0:
                opt.zero_grad()
            (F.cross_entropy(model(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                schedule.step()
    return weights(model)


@pytest.mark.parametrize("of", ["module", "network"])
@pytest.mark.parametrize("by_forward", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(of, by_forward, accumulate):
    model = Module(of, by_forward)
    trainer = pl.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, gradient_clip_val=0.5, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(model, loader(), loader())
    same(weights(model.net), plain(accumulate=accumulate), 1e-12)
    routing = trainer.optimizers[0].routing()
    first = "net.0.weight" if of == "module" else "0.weight"
    assert {n for n, route in routing.items() if route.step == "whitened"} == {first}


def test_lightning_resumes(tmp_path):
    whole = Module("module")
    options = {
        "logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False,
    }  # fmt: skip
    pl.Trainer(max_epochs=4, enable_checkpointing=False, **options).fit(whole, loader())
    first, second = Module("module"), Module("module")
    trainer = pl.Trainer(max_epochs=2, enable_checkpointing=False, **options)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = pl.Trainer(max_epochs=4, enable_checkpointing=False, **options)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    same(weights(second), weights(whole))


TOKENS, LENGTH = 8, 6


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def tokens():
    rows = (torch.randint(TOKENS, (16, 1), generator=torch.Generator().manual_seed(5)) + torch.arange(LENGTH)) % TOKENS
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_faces_trainer(tmp_path, accumulate):
    model = gpt2()
    opt = natgrad.NewtonMuon(model, **OPTIONS)
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=accumulate, num_train_epochs=3,
        lr_scheduler_type="linear", warmup_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, max_grad_norm=0.5, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = InOrder(model, args, train_dataset=tokens(), eval_dataset=tokens()[:4], optimizers=(opt, None))
    trainer.train()

    twin = gpt2()
    other = natgrad.NewtonMuon(twin, **OPTIONS)
    steps = 3 * 4 // accumulate
    schedule = transformers.get_linear_schedule_with_warmup(other, 2, steps)
    rows = torch.stack([row["input_ids"] for row in tokens()])
    for _ in range(3):
        for i, x in enumerate(rows.split(4)):
            if i % accumulate == 0:
                other.zero_grad()
            (twin(input_ids=x, labels=x).loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
                other.step()
                schedule.step()
    same(weights(model), weights(twin), 1e-6)  # its loss is in float32
    assert opt.routing()["transformer.h.0.attn.c_attn.weight"].step == "whitened"
    assert opt.routing()["transformer.wte.weight"].step == "adamw"
