"""KFAC in Hugging Face's trainer: the weights are those of the plain loop."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import SequentialSampler

import natgrad
from loops import same, weights
from natgrad.integrations.transformers import Trainer

TOKENS, LENGTH, EXAMPLES = 8, 6, 16
ADAPTIVE, GIVEN = {}, {"lr": 0.1, "momentum": 0.9, "damping": 0.1}


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def bert(kind, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=TOKENS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config).double()


def tokens(ignored=True):
    """Each token is the one before and one more; of the labels, more and more are left out."""
    generator = torch.Generator().manual_seed(5)
    rows = (torch.randint(TOKENS, (EXAMPLES, 1), generator=generator) + torch.arange(LENGTH)) % TOKENS
    data = []
    for i, row in enumerate(rows):
        labels = row.clone()
        if ignored:
            labels[: i % (LENGTH - 2)] = -100
        data.append({"input_ids": row, "labels": labels})
    return data


def kfac(model, options, loss=None):
    return natgrad.KFAC(model, loss or nn.CrossEntropyLoss(), estimator="exact", statistics_share=1.0, **options)


def trainer(model, opt, folder, data=None, eval_dataset=None, **args):
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": EXAMPLES,
        "num_train_epochs": 3,
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if opt.param_groups[0]["lr"] is None:
        defaults["lr_scheduler_type"] = "constant"
    args = transformers.TrainingArguments(str(folder), **defaults | args)
    return InOrder(model, args, train_dataset=data or tokens(), eval_dataset=eval_dataset, optimizers=(opt, None))


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def plain_loop(options, epochs=3, batch=8, clip=1.0):
    model = gpt2()
    opt, data = kfac(model, options), tokens()
    steps = epochs * EXAMPLES // batch
    schedule = None
    if "lr" in options:
        schedule = transformers.get_linear_schedule_with_warmup(opt, 0, steps)
    model.train()
    for _ in range(epochs):
        for i in range(0, EXAMPLES, batch):
            rows = torch.stack([row["input_ids"] for row in data[i : i + batch]])
            labels = torch.stack([row["labels"] for row in data[i : i + batch]])
            logits = model(input_ids=rows).logits
            loss = opt.loss(logits.transpose(1, 2), nn.functional.pad(labels, (0, 1), value=-100)[:, 1:])
            opt.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            if schedule:
                schedule.step()
    return weights(model)


@pytest.mark.parametrize("options", [ADAPTIVE, GIVEN], ids=["adaptive", "given"])
def test_the_weights_are_those_of_the_plain_loop(options, tmp_path):
    """Clipped by default, with a linear schedule where there is a number for it to change."""
    model = gpt2()
    own = trainer(model, kfac(model, options), tmp_path)
    own.train()
    same(weights(model), plain_loop(options), atol=1e-9)
    assert losses(own)[-1] < 0.95 * losses(own)[0]


def test_without_clipping_the_loss_falls_further(tmp_path):
    ends = []
    for norm in (0.0, 0.2):
        model = gpt2()
        own = trainer(model, kfac(model, ADAPTIVE), tmp_path, max_grad_norm=norm, num_train_epochs=4)
        own.train()
        ends.append(losses(own)[-1])
    assert ends[0] < ends[1]


@pytest.mark.parametrize(
    ("options", "reduction"), [(ADAPTIVE, "mean"), (GIVEN, "sum")], ids=["adaptive, mean", "given, sum"]
)
def test_microbatches_count_by_their_labels(options, reduction, tmp_path):
    whole, parts = gpt2(), gpt2()
    one = trainer(whole, kfac(whole, options), tmp_path)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    four = trainer(
        parts, kfac(parts, options, loss), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    one.train()
    four.train()
    same(weights(parts), weights(whole), atol=1e-9)
    assert losses(four) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("options", [ADAPTIVE, GIVEN], ids=["adaptive", "given"])
def test_a_checkpoint_resumes_to_the_same_weights(options, tmp_path):
    whole, resumed = gpt2(), gpt2()
    trainer(whole, kfac(whole, options), tmp_path, save_strategy="steps", save_steps=4).train()
    torch.manual_seed(99)
    own = trainer(resumed, kfac(resumed, options), tmp_path)
    own.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert own.following.diagnostics["step"] == 5
    same(weights(resumed), weights(whole))


def test_evaluation_has_the_models_own_loss_and_training_goes_on_after_it(tmp_path):
    model = gpt2()
    data = tokens(ignored=False)
    own = trainer(model, kfac(model, ADAPTIVE), tmp_path, eval_dataset=data, eval_strategy="steps", eval_steps=2)
    own.train()
    rows = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        expected = float(model.eval()(input_ids=rows, labels=rows).loss)
    assert own.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "config", "labels", "loss"),
    [
        ("BertForMaskedLM", {}, "tokens", nn.CrossEntropyLoss()),
        ("BertForTokenClassification", {"num_labels": 3}, lambda row: row % 3, nn.CrossEntropyLoss()),
        ("BertForSequenceClassification", {"num_labels": 3}, lambda row: row[0] % 3, nn.CrossEntropyLoss()),
        ("BertForSequenceClassification", {"num_labels": 1}, lambda row: row[0].double() / TOKENS, nn.MSELoss()),
    ],
)
def test_kinds_of_models(kind, config, labels, loss, tmp_path):
    model = bert(kind, **config)
    data = tokens()
    if labels != "tokens":
        data = [{"input_ids": row["input_ids"], "labels": labels(row["input_ids"])} for row in data]
    batch = {k: torch.stack([row[k] for row in data]) for k in data[0]}
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    own = trainer(model, kfac(model, ADAPTIVE, loss), tmp_path, data, data, max_grad_norm=0.0, num_train_epochs=8)
    assert own.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    own.train()
    assert own.evaluate()["eval_loss"] < 0.8 * expected


def test_another_way_to_read_what_the_model_returns(tmp_path):
    def last(returned, labels):
        return returned.logits[:, -2], labels[:, -1]

    model, data = gpt2(), tokens(ignored=False)
    args = transformers.TrainingArguments(
        str(tmp_path), report_to="none", use_cpu=True, lr_scheduler_type="constant", num_train_epochs=8,
        per_device_train_batch_size=EXAMPLES, logging_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip
    own = Trainer(model, args, train_dataset=data, optimizers=(kfac(model, ADAPTIVE), None), read=last)
    own.train()
    assert losses(own)[-1] < 0.7 * losses(own)[0]


def test_what_a_step_did_is_logged_with_the_loss(tmp_path):
    model = gpt2()
    own = trainer(model, kfac(model, ADAPTIVE), tmp_path, num_train_epochs=1)
    own.train()
    row = own.state.log_history[-2]
    assert {"natgrad/damping", "natgrad/accepted"} <= row.keys()
    assert row["learning_rate"] == row["natgrad/lr"] > 0


def test_a_schedule_of_an_adapted_step_size_is_refused(tmp_path):
    model = gpt2()
    own = trainer(model, kfac(model, ADAPTIVE), tmp_path, lr_scheduler_type="linear")
    with pytest.raises(
        ValueError, match=r"lr_scheduler_type='linear' cannot change lr, because lr is None.*'constant'"
    ):
        own.train()


def test_what_it_cannot_do_it_says(tmp_path):
    model = gpt2()
    opt = kfac(model, ADAPTIVE)
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0\.1 is not the optimizer's loss, which has 0.0; give that one"
    ):
        trainer(model, opt, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(TypeError, match=r"optimizers has a NoneType for its optimizer; expected \(natgrad\.KFAC"):
        Trainer(model, optimizers=(None, None))
    own = trainer(model, opt, tmp_path, [{"input_ids": row["input_ids"]} for row in tokens()])
    with pytest.raises(ValueError, match=r"the batch has input_ids and no labels; let the collator make them"):
        own.train()
