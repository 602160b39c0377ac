"""The networks that people have, small: a name, the model, a batch, and how the loss's input comes from its output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TOKENS, LENGTH, EXAMPLES, CLASSES = 30, 8, 12, 5


@dataclass
class Example:
    """`read(returned)` is what the loss takes."""

    model: nn.Module
    x: Any
    y: torch.Tensor
    read: Any = None

    def forward(self, model, batch):
        returned = model(batch[0])
        return self.read(returned) if self.read else returned, batch[1]

    @property
    def data(self):
        return [(self.x, self.y)]


def tokens():
    x = torch.randint(TOKENS, (EXAMPLES, LENGTH))
    return x, torch.roll(x, -1, 1)


def images(size):
    return torch.randn(EXAMPLES, 3, size, size), torch.randint(CLASSES, (EXAMPLES,))


def logits(returned):
    return returned.logits


def token_logits(returned):
    return returned.logits.transpose(1, 2)


# Models of Hugging Face's transformers, as they are ------------------------------------------------------


def gpt2(**options):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=16, n_embd=12, n_layer=2, n_head=3, bos_token_id=0, eos_token_id=0, **options
    )
    return Example(transformers.GPT2LMHeadModel(config), *tokens(), token_logits)


def llama():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return Example(transformers.LlamaForCausalLM(config), *tokens(), token_logits)


def bert():
    import transformers

    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    return Example(transformers.BertForMaskedLM(config), *tokens(), token_logits)


def vit():
    import transformers

    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=16,
        patch_size=8,
        num_channels=3,
        num_labels=CLASSES,
    )
    return Example(transformers.ViTForImageClassification(config), *images(16), logits)


def lora():
    """Adapters alone train."""
    import peft

    base = gpt2(initializer_range=0.5)
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    return Example(peft.get_peft_model(base.model, config), base.x, base.y, token_logits)


# Models of torch alone -----------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, d_in, d_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d_out)
        self.down = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        h += self.down(x)
        return self.relu(h)


def resnet():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        Residual(4, 6, 2),
        Residual(6, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    return Example(model, *images(8))


class Translator(nn.Module):
    """An encoder and a decoder, positions on axis 0 inside."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS, 12), nn.Parameter(0.1 * torch.randn(1, LENGTH, 12))
        self.transformer = nn.Transformer(12, 3, 1, 1, 20, dropout=0.1, batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(12, TOKENS), batch_first

    def forward(self, x):
        h = self.embed(x) + self.place
        h = h if self.batch_first else h.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, h.device, h.dtype)
        out = self.transformer(h, h, tgt_mask=mask)
        return self.head(out if self.batch_first else out.transpose(0, 1)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 10)
        self.lstm = nn.LSTM(10, 12, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12, TOKENS)

    def forward(self, x):
        return {"logits": self.head(self.lstm(self.embed(x))[0])}


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 12)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True) for _ in "ab")
        self.head = nn.Linear(12, TOKENS)

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
        return self.head(h).transpose(1, 2)


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, CLASSES))

    def forward(self, x):
        return self.net(x)


def compiled():
    model = torch.compile(Compiled(), backend="eager")
    return Example(model, torch.randn(EXAMPLES, 6), torch.randint(CLASSES, (EXAMPLES,)))


MODELS = {
    "GPT-2": gpt2,
    "LLaMA": llama,
    "BERT": bert,
    "ViT": vit,
    "LoRA": lora,
    "ResNet": resnet,
    "Transformer": lambda: Example(Translator(), *tokens()),
    "Transformer, batch first": lambda: Example(Translator(batch_first=True), *tokens()),
    "LSTM": lambda: Example(Recurrent(), *tokens(), lambda returned: returned["logits"].transpose(1, 2)),
    "checkpointed": lambda: Example(Checkpointed(), *tokens()),
    "compiled": compiled,
}
