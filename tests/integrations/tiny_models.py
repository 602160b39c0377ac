"""Tiny models of many kinds, made from configurations, each with a batch and the loss that is its own."""

import torch
import transformers as T
from torch import Tensor, nn

V, N, LENGTH = 12, 6, 6
IMAGE = 3  # the token in whose place an image's features come
CE = nn.CrossEntropyLoss()


def tokens() -> Tensor:
    return torch.randint(5, V, (N, LENGTH), generator=torch.Generator().manual_seed(2))


def language(**extra):
    labels = tokens()
    labels[:2, :3] = -100
    return {"input_ids": tokens(), "labels": labels, **extra}


def classes(count=3):
    return {"input_ids": tokens(), "labels": tokens()[:, 0] % count}


def pixels():
    return torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def picture_and_text():
    rows = tokens()
    rows[:, :4] = IMAGE
    return {
        "input_ids": rows,
        "labels": rows.masked_fill(rows == IMAGE, -100),
        "pixel_values": pixels(),
        "attention_mask": torch.ones_like(rows),
    }


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WIDTHS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
BERT = {"vocab_size": V, **WIDTHS, **NO_DROPOUT, **SPECIAL, "max_position_embeddings": 16, "initializer_range": 0.2}
LLAMA = {"vocab_size": V, **WIDTHS, **SPECIAL, "max_position_embeddings": 16, "initializer_range": 0.2}
GPT2 = {
    "vocab_size": V, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.2, **SPECIAL,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
BART = {
    "vocab_size": V, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16,
    "dropout": 0.0, "decoder_start_token_id": 2, "forced_eos_token_id": 2, "init_std": 0.2, **SPECIAL,
}  # fmt: skip
VIT = {**WIDTHS, **NO_DROPOUT, "image_size": 8, "patch_size": 4, "initializer_range": 0.2}


class OwnGPT2(T.GPT2LMHeadModel):
    """A user's subclass."""


class OwnLlama(T.LlamaForCausalLM):
    """A class that no list of transformers has, as with trust_remote_code."""


class PlainModule(nn.Module):
    """Without transformers: returns a dictionary, and shifts in its forward."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids).cumsum(1))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class TwoAhead(T.LlamaForCausalLM):
    """Its loss is of the position two before."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids)
        if labels is not None:
            out["loss"] = nn.functional.cross_entropy(out.logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())
        return out


class Penalized(T.GPT2LMHeadModel):
    """Its loss has a part that is none of the labels."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, labels=labels)
        if labels is not None:
            out["loss"] = out.loss + 1e-3 * out.logits.square().mean()
        return out


class Focal(T.BertForSequenceClassification):
    """Its loss is another one of the same labels."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids)
        if labels is not None:
            nll = nn.functional.cross_entropy(out.logits, labels, reduction="none")
            out["loss"] = ((1 - (-nll).exp()) ** 2 * nll).mean()
        return out


class WeightedClasses(T.BertForSequenceClassification):
    """Its loss is a module of its own, with options."""

    def __init__(self, config):
        super().__init__(config)
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)

    def forward(self, input_ids=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids)
        if labels is not None:
            out["loss"] = self.criterion(out.logits, labels)
        return out


class FromZero(T.GPT2LMHeadModel):
    """Its head starts at zero, so that the losses of all labels are one."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.lm_head.weight)


def llava():
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VIT | {"num_hidden_layers": 2}), text_config=T.LlamaConfig(**LLAMA),
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return T.LlavaForConditionalGeneration(config)


def encoder_decoder():
    decoder = T.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    model = T.EncoderDecoderModel(encoder=T.BertModel(T.BertConfig(**BERT)), decoder=T.BertLMHeadModel(decoder))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def picture_to_text():
    decoder = T.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    model = T.VisionEncoderDecoderModel(encoder=T.ViTModel(T.ViTConfig(**VIT)), decoder=T.BertLMHeadModel(decoder))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def t5():
    options = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=V, decoder_start_token_id=0, pad_token_id=0, initializer_factor=1.0, **options)
    )


def segmenter():
    config = T.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[2], patch_sizes=[3],
        strides=[2], mlp_ratios=[2], decoder_hidden_size=8, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return T.SegformerForSemanticSegmentation(config)


def adapted(kind):
    import peft

    model = T.GPT2LMHeadModel(T.GPT2Config(**GPT2))
    if kind == "lora":
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    else:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


def bert(kind, **options):
    return lambda: getattr(T, kind)(T.BertConfig(**BERT, **options))


def causal_bart(kind, config):
    return lambda: getattr(T, kind)(getattr(T, config)(**BART, is_decoder=True, is_encoder_decoder=False))


def pixel_classes():
    return torch.randint(3, (N, 8, 8), generator=torch.Generator().manual_seed(4))


MODELS = {
    # Labels of the next token, by the model itself.
    "subclass of GPT-2": (lambda: OwnGPT2(T.GPT2Config(**GPT2)), language(), CE),
    "subclass of Llama": (lambda: OwnLlama(T.LlamaConfig(**LLAMA)), language(), CE),
    "plain module": (PlainModule, language(), CE),
    "head from zero": (lambda: FromZero(T.GPT2Config(**GPT2, tie_word_embeddings=False)), language(), CE),
    "two heads": (lambda: T.GPT2DoubleHeadsModel(T.GPT2Config(**GPT2, num_labels=1)), language(), CE),
    # Causal models that do not shift.
    "Bart, causal": (causal_bart("BartForCausalLM", "BartConfig"), language(), CE),
    "Pegasus, causal": (causal_bart("PegasusForCausalLM", "PegasusConfig"), language(), CE),
    # The decoder's input is made of the labels.
    "T5": (t5, language(), CE),
    "Bart": (lambda: T.BartForConditionalGeneration(T.BartConfig(**BART)), language(), CE),
    "Marian": (lambda: T.MarianMTModel(T.MarianConfig(**BART)), language(), CE),
    "two Berts": (encoder_decoder, language(), CE),
    "picture to text": (picture_to_text, {"pixel_values": pixels(), "labels": tokens()}, CE),
    # Pictures and text.
    "Llava": (llava, picture_and_text(), CE),
    # Every label at its own place.
    "masked": (bert("BertForMaskedLM"), language(), CE),
    "tokens": (bert("BertForTokenClassification", num_labels=3), {"input_ids": tokens(), "labels": tokens() % 3}, CE),
    "sequences": (bert("BertForSequenceClassification", num_labels=3), classes(), CE),
    "weights of classes": (
        lambda: WeightedClasses(T.BertConfig(**BERT, num_labels=3)),
        classes(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1),
    ),
    "choices": (
        bert("BertForMultipleChoice"),
        {"input_ids": tokens().view(N // 2, 2, LENGTH), "labels": torch.tensor([0, 1, 1])},
        CE,
    ),
    "answers": (
        bert("BertForQuestionAnswering"),
        {"input_ids": tokens(), "start_positions": torch.arange(N) % 5, "end_positions": torch.arange(N) % 6},
        CE,
    ),
    "picture": (
        lambda: T.ViTForImageClassification(T.ViTConfig(**VIT, num_labels=3)),
        {"pixel_values": pixels(), "labels": tokens()[:, 0] % 3},
        CE,
    ),
    "pixels": (segmenter, {"pixel_values": pixels(), "labels": pixel_classes()}, CE),
    # Other losses.
    "regression": (
        bert("BertForSequenceClassification", num_labels=1),
        {"input_ids": tokens(), "labels": tokens()[:, 0] / V},
        nn.MSELoss(),
    ),
    "two numbers": (
        bert("BertForSequenceClassification", num_labels=2, problem_type="regression"),
        {"input_ids": tokens(), "labels": tokens()[:, :2] / V},
        nn.MSELoss(),
    ),
    "several labels": (
        bert("BertForSequenceClassification", num_labels=4),
        {"input_ids": tokens(), "labels": (tokens()[:, :4] % 2).float()},
        nn.BCEWithLogitsLoss(),
    ),
    # Adapters.
    "LoRA": (lambda: adapted("lora"), language(), CE),
    "prompt": (lambda: adapted("prompt"), language(attention_mask=torch.ones(N, LENGTH, dtype=torch.long)), CE),
}
OTHER_LOSSES = {
    "two ahead": (lambda: TwoAhead(T.LlamaConfig(**LLAMA)), language()),
    "a penalty": (lambda: Penalized(T.GPT2Config(**GPT2)), language()),
    "focal": (lambda: Focal(T.BertConfig(**BERT, num_labels=3)), classes()),
}


def made(make):
    torch.manual_seed(0)
    return make()


def rows_of(batch):
    count = len(next(iter(batch.values())))
    return [{name: t[i] for name, t in batch.items()} for i in range(count)]
