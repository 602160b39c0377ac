"""Random small networks of every kind of layer, put together from a list of words."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

TOKENS = 7


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / 2)


class Stage(nn.Module):
    """Takes `(N, T, W)` to the same shape."""

    def __init__(self, width, length):
        super().__init__()
        self.width, self.length = width, length
        self.make()

    def make(self):
        """The parameters."""


class Linear(Stage):
    def make(self):
        self.layer = nn.Linear(self.width, self.width)

    def forward(self, h):
        return self.layer(h)


class WithoutBias(Stage):
    def make(self):
        self.layer = nn.Linear(self.width, self.width, bias=False)

    def forward(self, h):
        return self.layer(h)


class Matmul(Stage):
    """A weight stored the other way round, and a bias that is added later."""

    def make(self):
        self.W, self.b = parameter(self.width, self.width), parameter(self.width)

    def forward(self, h):
        return h @ self.W + self.b


class Flattened(Stage):
    """As GPT-2's Conv1D."""

    def make(self):
        self.W, self.b = parameter(self.width, self.width), parameter(self.width)

    def forward(self, h):
        return torch.addmm(self.b, h.reshape(-1, self.width), self.W).view(h.shape)


class Tied(Stage):
    """One weight with two biases, one without, and its transpose."""

    def make(self):
        self.W, self.b, self.c = parameter(self.width, self.width), parameter(self.width), parameter(self.width)

    def forward(self, h):
        h = F.linear(h, self.W, self.b).tanh()
        return F.linear(F.linear(h, self.W.T, self.c).tanh(), self.W)


class Functions(Stage):
    """Functions of the entries of parameters: a temperature, a gate, a weight that is scaled."""

    def make(self):
        self.W, self.b = parameter(self.width, self.width), parameter(self.width)
        self.gate, self.temperature = parameter(self.width), parameter()

    def forward(self, h):
        h = F.linear(h, 0.5 * self.W, 2 * self.b) * self.temperature.exp()
        return F.prelu((h - self.b).mT, self.gate).mT * (1 - self.gate.tanh())


class Conv(Stage):
    def make(self):
        self.layer = nn.Conv1d(self.width, self.width, 3, padding=1)

    def forward(self, h):
        return self.layer(h.mT).mT


class Depthwise(Stage):
    def make(self):
        self.layer = nn.Conv1d(self.width, self.width, 3, padding=1, groups=self.width, bias=False)

    def forward(self, h):
        return self.layer(h.mT).mT


class Deconv(Stage):
    def make(self):
        self.layer = nn.ConvTranspose1d(self.width, self.width, 3, padding=1)

    def forward(self, h):
        return self.layer(h.mT).mT


class LayerNorm(Stage):
    def make(self):
        self.layer = nn.LayerNorm(self.width)

    def forward(self, h):
        return self.layer(h)


class NormsInARow(Stage):
    def make(self):
        self.one, self.two = nn.LayerNorm(self.width), nn.RMSNorm(self.width)

    def forward(self, h):
        return self.two(self.one(h))


class GroupNorm(Stage):
    def make(self):
        self.layer = nn.GroupNorm(2, self.width)

    def forward(self, h):
        return self.layer(h.mT).mT


class BatchNorm(Stage):
    def make(self):
        self.layer = nn.BatchNorm1d(self.width)

    def forward(self, h):
        return self.layer(h.mT).mT


class OneVector(Stage):
    """Scale and shift by one parameter."""

    def make(self):
        self.c = parameter(self.width)

    def forward(self, h):
        return F.layer_norm(h, (self.width,), self.c, self.c) * self.c


class Affine(Stage):
    def make(self):
        self.w, self.c = parameter(self.width), parameter(self.width)

    def forward(self, h):
        return h * self.w + self.c


class RowsOfATable(Stage):
    def make(self):
        self.t = parameter(3, self.width)

    def forward(self, h):
        return h * (self.t[0]) + self.t[2]


class Places(Stage):
    def make(self):
        self.table = nn.Embedding(self.length + 2, self.width)

    def forward(self, h):
        return h + self.table(torch.arange(h.shape[1]))


class PlacesOfAParameter(Stage):
    def make(self):
        self.places = parameter(1, self.length + 2, self.width)

    def forward(self, h):
        return h + self.places[:, : h.shape[1]]


class MappedPlaces(Stage):
    def make(self):
        self.table, self.map = nn.Embedding(self.length, 2), nn.Linear(2, self.width)

    def forward(self, h):
        return h + self.map(self.table(torch.arange(h.shape[1])).tanh())


class Prompt(Stage):
    def make(self):
        self.prompt = parameter(2, self.width)

    def forward(self, h):
        h = torch.cat([self.prompt.expand(len(h), -1, -1), h], 1)
        return ((h @ h.mT).softmax(-1) @ h)[:, 2:]


class Attention(Stage):
    def make(self):
        self.layer = nn.MultiheadAttention(self.width, 2, batch_first=True)

    def forward(self, h):
        return self.layer(h, h, h, need_weights=False)[0]


class PositionsFirst(Stage):
    def make(self):
        self.layer, self.norm = nn.MultiheadAttention(self.width, 2), nn.LayerNorm(self.width)

    def forward(self, h):
        h = h.transpose(0, 1)
        mask = torch.ones(len(h), len(h), dtype=torch.bool).triu(1)
        return self.norm(self.layer(h, h, h, attn_mask=mask)[0]).transpose(0, 1)


class LSTM(Stage):
    def make(self):
        self.layer = nn.LSTM(self.width, self.width)

    def forward(self, h):
        return self.layer(h.transpose(0, 1))[0].transpose(0, 1)


class GRU(Stage):
    def make(self):
        self.layer = nn.GRU(self.width, self.width, batch_first=True, bias=False)

    def forward(self, h):
        return self.layer(h)[0]


class Graph(Stage):
    """Neighbours along a ring of the examples."""

    def make(self):
        self.layer = nn.Linear(self.width, self.width)

    def forward(self, h):
        return (self.layer(h) + self.layer(h).roll(1, 0)) / 2


class Centred(Stage):
    def make(self):
        self.layer = nn.Linear(self.width, self.width)

    def forward(self, h):
        h = self.layer(h)
        return h - h.mean(0)


class Experts(Stage):
    """The better of two, chosen position by position."""

    def make(self):
        self.gate = nn.Linear(self.width, 2)
        self.experts = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(2))

    def forward(self, h):
        weights = self.gate(h).softmax(-1)
        best, flat = weights.argmax(-1), h.flatten(0, 1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows = (best == e).flatten().nonzero()[:, 0]
            out = out.index_add(0, rows, expert(flat[rows]))
        return out.view(h.shape) * weights.amax(-1, keepdim=True)


class SoftExperts(Stage):
    def make(self):
        self.gate = nn.Linear(self.width, 2)
        self.experts = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(2))

    def forward(self, h):
        weights = self.gate(h).softmax(-1)
        return sum(weights[..., e : e + 1] * expert(h) for e, expert in enumerate(self.experts))


class Stopped(Stage):
    """A branch without gradients."""

    def make(self):
        self.layer = nn.Linear(self.width, self.width)

    def forward(self, h):
        with torch.no_grad():
            size = h.abs().mean(-1, keepdim=True) + 0.1
        return self.layer(h / size)


class Checkpointed(Stage):
    def make(self):
        self.layer = nn.Sequential(nn.Linear(self.width, self.width), nn.Tanh())

    def forward(self, h):
        return torch.utils.checkpoint.checkpoint(self.layer, h, use_reentrant=False)


class Residual(Stage):
    def make(self):
        self.norm, self.layer = nn.LayerNorm(self.width, bias=False), nn.Linear(self.width, self.width)

    def forward(self, h):
        return h + self.layer(F.relu(self.norm(h)))


STAGES = {stage.__name__: stage for stage in Stage.__subclasses__()}
ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "none": lambda h: h}


class Tokens(nn.Module):
    def __init__(self, width, padding):
        super().__init__()
        self.table = nn.Embedding(TOKENS, width, padding_idx=padding)

    def forward(self, x):
        return self.table(x)


class Bags(nn.Module):
    """Every position is a bag of two tokens."""

    def __init__(self, width, padding):
        super().__init__()
        self.table = nn.EmbeddingBag(TOKENS, width, mode="sum", padding_idx=padding)

    def forward(self, x):
        both = torch.stack([x, (x + 1) % TOKENS], -1)
        return self.table(both.flatten(0, 1)).view(*x.shape, -1)


class Network(nn.Module):
    """Inputs, stages with activations between them, and a readout of what `shape` says."""

    def __init__(self, spec):
        super().__init__()
        self.spec, width = spec, spec.width
        if spec.source == "numbers":
            self.source = nn.Linear(3, width)
        else:
            self.source = (Tokens if spec.source == "tokens" else Bags)(width, spec.padding)
        self.stages = nn.ModuleList(STAGES[name](width, spec.length) for name in spec.stages)
        if spec.shared and len(self.stages) > 1:  # the last stage once more
            self.stages.append(self.stages[0])
        self.readout = nn.Linear(width, spec.classes)

    def forward(self, x):
        h = ACTIVATIONS[self.spec.activation](self.source(x))
        for stage in self.stages:
            h = ACTIVATIONS[self.spec.activation](stage(h))
        if self.spec.shape == "pooled":
            return self.readout(h.mean(1))
        if self.spec.shape == "last":
            return self.readout(h)[:, -1]
        out = self.readout(h)
        return out.mT if self.spec.shape == "positions" else out.flatten(0, 1)


@dataclass(frozen=True)
class Spec:
    """A case of the fuzzer: hypothesis prints it, and `Case(spec)` makes it again."""

    seed: int
    source: str = "numbers"
    padding: int | None = None
    stages: tuple[str, ...] = ("Linear",)
    activation: str = "tanh"
    shared: bool = False
    shape: str = "pooled"
    width: int = 4
    length: int = 3
    classes: int = 3
    sizes: tuple[int, ...] = (3,)
    loss: str = "cross entropy"
    reduction: str = "mean"
    training: bool = False
    estimator: str = "exact"
    params: float = 1.0
    form: str = "pairs"
    dtype: torch.dtype = field(default=torch.float64)
