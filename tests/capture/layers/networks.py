"""Small networks, each around one kind of layer: `first` is the layer in question, examples are on axis 0."""

import torch
import torch.nn.functional as F
from torch import nn

from oracles import f64, randn

CLASSES = 3


class Around(nn.Module):
    """A layer, and a readout of what comes out of it: its mean over all that is neither example nor feature."""

    def __init__(self, layer, features, axis=-1, call=None):
        super().__init__()
        self.first, self.last = layer, nn.Linear(features, CLASSES)
        self.axis, self.call = axis, call or (lambda layer, x: layer(x))

    def forward(self, x):
        h = self.call(self.first, x)
        h = h.movedim(self.axis, -1)
        weight = torch.linspace(0.5, 1.5, h[0, ..., 0].numel(), dtype=h.dtype, device=h.device).view(h.shape[1:-1])
        return self.last((h.tanh() * weight.unsqueeze(-1)).flatten(1, -2).sum(1) if h.ndim > 2 else h.tanh())


class Elementwise(nn.Module):
    """`(x + c) ∘ w`, after a fixed map so that examples differ."""

    def __init__(self, *shape, scale=True, shift=True):
        super().__init__()
        self.w = nn.Parameter(1 + 0.3 * torch.randn(shape)) if scale else None
        self.c = nn.Parameter(0.3 * torch.randn(shape)) if shift else None

    def forward(self, x):
        x = x if self.c is None else x + self.c
        return x if self.w is None else self.w * x


class Offset(nn.Module):
    """Parameters that are used with a number added to them: a scale around one, a weight matrix."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width) / 3)
        self.matrix = nn.Parameter(torch.randn(width, width))
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        scaled = F.rms_norm(x, x.shape[-1:]) * (1.0 + self.scale.to(x.dtype))
        return F.linear(scaled, self.matrix.t() - 0.5, self.bias.add(2))


class ClassToken(nn.Module):
    """A learned first position, and learned places."""

    def __init__(self, length, width):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, length + 1, width))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place


class Cell(nn.Module):
    """A recurrent cell over the positions."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Bag(nn.Module):
    """A bag of embeddings given by offsets, with weights."""

    def __init__(self, mode):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode=mode)

    def forward(self, x):
        flat, offsets = x.flatten(), torch.arange(0, x.numel(), x.shape[1], device=x.device)
        weights = None if self.bag.mode == "mean" else 0.5 + flat.to(self.bag.weight.dtype) / 7
        return self.bag(flat, offsets, weights)


def image(channels=2, size=5, n=4, dimensions=2):
    return randn(n, channels, *[size] * dimensions)


def tokens(n=4, length=5, of=7):
    return torch.randint(of, (n, length), generator=torch.Generator().manual_seed(0))


def sequence(n=4, length=5, width=4):
    return randn(n, length, width)


def attend(layer, x):
    return layer(x, x, x)[0]


def cross(layer, x):
    return layer(x[:, :2], x[:, 2:], x[:, 2:], need_weights=False)[0]


def positions_first(layer, x):
    x = x.transpose(0, 1)
    mask = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    return layer(x, x, x, attn_mask=mask)[0].transpose(0, 1)


def with_itself(layer, x):
    return layer(x.tanh(), x[..., 1:])


def narrow_keys(layer, x):
    return layer(x, x[..., :3], x[..., :2])[0]


def masked(layer, x):
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    hidden[:, -1] = x[:, -1, 0] > 0
    return layer(x, x, x, key_padding_mask=hidden)[0]


def outputs(layer, x):
    return layer(x)[0]


CONVOLUTIONS = {
    "conv1d": lambda: (Around(nn.Conv1d(2, 3, 3, stride=2, padding=1), 3, 1), image(dimensions=1, size=7)),
    "conv2d": lambda: (Around(nn.Conv2d(2, 3, (3, 2), padding=(1, 0)), 3, 1), image()),
    "conv2d, stride and dilation": lambda: (Around(nn.Conv2d(2, 3, 2, 2, 1, dilation=3), 3, 1), image(size=7)),
    "conv2d, groups": lambda: (Around(nn.Conv2d(4, 6, 3, groups=2), 6, 1), image(4)),
    "conv2d, depthwise": lambda: (Around(nn.Conv2d(3, 3, 3, groups=3, bias=False), 3, 1), image(3)),
    "conv2d, same": lambda: (Around(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), 3, 1), image()),
    "conv2d, circular": lambda: (Around(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 3, 1), image()),
    "conv3d": lambda: (Around(nn.Conv3d(1, 2, 2), 2, 1), image(1, 3, dimensions=3)),
    "conv_transpose1d": lambda: (Around(nn.ConvTranspose1d(2, 3, 3, 2), 3, 1), image(dimensions=1, size=3)),
    "conv_transpose2d": lambda: (
        Around(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, dilation=2), 3, 1),
        image(size=3),
    ),
    "conv_transpose2d, groups": lambda: (Around(nn.ConvTranspose2d(4, 6, 2, groups=2), 6, 1), image(4, 3)),
    "conv_transpose3d": lambda: (Around(nn.ConvTranspose3d(1, 2, 2, bias=False), 2, 1), image(1, 2, dimensions=3)),
}
EMBEDDINGS = {
    "embedding": lambda: (Around(nn.Embedding(7, 4), 4), tokens()),
    "embedding, padding": lambda: (Around(nn.Embedding(7, 4, padding_idx=-5), 4), tokens()),
}
LINEAR = {
    "linear": lambda: (Around(nn.Linear(4, 3), 3), randn(6, 4)),
    "linear at positions": lambda: (Around(nn.Linear(4, 3), 3), sequence()),
    "linear without bias": lambda: (Around(nn.Linear(4, 3, bias=False), 3), sequence()),
    "bilinear": lambda: (Around(nn.Bilinear(4, 3, 3), 3, call=with_itself), sequence(6)[:, 0]),
    "bilinear at positions": lambda: (Around(nn.Bilinear(4, 3, 2, bias=False), 2, call=with_itself), sequence()),
}
SCALES = {
    "layer norm": lambda: (Around(nn.LayerNorm(4), 4), sequence()),
    "layer norm of two axes": lambda: (Around(nn.LayerNorm((5, 4)), 4), sequence()),
    "layer norm without bias": lambda: (Around(nn.LayerNorm(4, bias=False), 4), sequence()),
    "RMS norm": lambda: (Around(nn.RMSNorm(4), 4), sequence()),
    "batch norm": lambda: (Around(nn.BatchNorm2d(3), 3, 1).eval(), image(3)),
    "group norm": lambda: (Around(nn.GroupNorm(2, 4), 4, 1), image(4)),
    "instance norm": lambda: (Around(nn.InstanceNorm1d(3, affine=True), 3, 1), image(3, dimensions=1)),
    "scale and shift": lambda: (Around(Elementwise(4), 4), sequence()),
    "scale by one number": lambda: (Around(Elementwise(shift=False), 4), sequence()),
    "shift by place": lambda: (Around(Elementwise(1, 5, 4, scale=False), 4), sequence()),
    "scale of channels": lambda: (Around(Elementwise(1, 3, 1, 1), 3, 1), image(3)),
    "class token": lambda: (Around(ClassToken(5, 4), 4), sequence()),
}
OTHERS = {
    "offsets": lambda: (Around(Offset(4), 4), sequence()),
    "embedding bag, mean": lambda: (Around(nn.EmbeddingBag(7, 4, padding_idx=1), 4), tokens()),
    "embedding bag, sum": lambda: (Around(nn.EmbeddingBag(7, 4, mode="sum"), 4), tokens()),
    "embedding bag, offsets": lambda: (Around(Bag("mean"), 4), tokens()),
    "embedding bag, offsets and weights": lambda: (Around(Bag("sum"), 4), tokens()),
    "attention": lambda: (Around(nn.MultiheadAttention(4, 2, batch_first=True), 4, call=attend), sequence()),
    "attention without bias": lambda: (
        Around(nn.MultiheadAttention(4, 2, bias=False, batch_first=True), 4, call=attend),
        sequence(),
    ),
    "cross attention": lambda: (Around(nn.MultiheadAttention(4, 2, batch_first=True), 4, call=cross), sequence()),
    "attention, positions first": lambda: (Around(nn.MultiheadAttention(4, 2), 4, call=positions_first), sequence()),
    "attention, as many examples": lambda: (Around(nn.MultiheadAttention(4, 2), 4, call=positions_first), sequence(5)),
    "attention, separate": lambda: (
        Around(nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True), 4, call=narrow_keys),
        sequence(),
    ),
    "attention, masked": lambda: (Around(nn.MultiheadAttention(4, 2, batch_first=True), 4, call=masked), sequence()),
    "RNN": lambda: (Around(nn.RNN(4, 3, nonlinearity="relu"), 3, call=outputs_first), sequence()),
    "LSTM": lambda: (Around(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), 6, call=outputs), sequence()),
    "LSTM, projected": lambda: (Around(nn.LSTM(4, 3, batch_first=True, proj_size=2), 2, call=outputs), sequence()),
    "GRU": lambda: (Around(nn.GRU(4, 3, batch_first=True, bias=False), 3, call=outputs), sequence()),
    "LSTM cell": lambda: (Around(Cell(nn.LSTMCell(4, 3)), 3), sequence()),
    "GRU cell": lambda: (Around(Cell(nn.GRUCell(4, 3)), 3), sequence()),
    "RNN cell": lambda: (Around(Cell(nn.RNNCell(4, 3)), 3), sequence()),
}


def outputs_first(layer, x):
    return layer(x.transpose(0, 1))[0].transpose(0, 1)


NETWORKS = LINEAR | CONVOLUTIONS | EMBEDDINGS | SCALES | OTHERS


def make(name):
    """The network, its input and targets, in float64."""
    torch.manual_seed(1)
    model, x = NETWORKS[name]()
    model.to(f64)
    for module in model.modules():  # running averages that are no identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(randn(len(module.running_mean)))
            module.running_var.copy_(randn(len(module.running_var), seed=1).abs() + 0.5)
    return model, x, torch.arange(len(x)) % CLASSES
