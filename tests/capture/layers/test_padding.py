"""Padding of sequences, left out of the loss, leaves the matrix as it is."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64

TOKENS, PAD, WIDTH = 9, 0, 4
LENGTHS = [5, 3, 4, 1, 5, 2]  # more examples than features: a covariance of full rank


class Model(nn.Module):
    """Embeddings, attention, normalization, a tied head. Causal, or with the padding masked."""

    def __init__(self, causal):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.place = nn.Embedding(12, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.linear, self.causal = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def forward(self, x):
        h = self.embed(x) + self.place(torch.arange(x.shape[1]).unsqueeze(0))
        if self.causal:
            mask = {"attn_mask": torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)}
        else:
            mask = {"key_padding_mask": x == PAD}
        h = h + self.attention(h, h, h, **mask)[0]
        return (self.linear(self.norm(h)).tanh() @ self.embed.weight.T).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(TOKENS, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0]).transpose(1, 2)


def sequences():
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randint(1, TOKENS, (1, n), generator=g), torch.randint(1, TOKENS, (1, n), generator=g)) for n in LENGTHS
    ]


def padded(length):
    """All in one batch."""
    x = torch.full((len(LENGTHS), length), PAD)
    y = torch.full((len(LENGTHS), length), -100)
    for i, (its_x, its_y) in enumerate(sequences()):
        x[i, : its_x.shape[1]], y[i, : its_y.shape[1]] = its_x, its_y
    return [(x, y)]


# Summed over positions the gradients of keys vanish, so that EKFAC's basis by "reduce" is not unique with attention.
COMBINATIONS = [
    (make, causal, structure, options)
    for make, causal in ((Model, True), (Model, False), (Recurrent, True))
    for structure in ("kfac", "ekfac", "block", "diagonal")
    for options in ({}, {"sharing": "reduce"}, {"centered": False})
    if not (make is Model and structure == "ekfac" and "sharing" in options)
]


@pytest.mark.pairs
@pytest.mark.parametrize(("make", "causal", "structure", "options"), COMBINATIONS)
def test_any_padding_gives_the_matrix_of_none(make, causal, structure, options):
    torch.manual_seed(0)
    model, loss = make(causal).to(f64), nn.CrossEntropyLoss()
    alone = natgrad.fisher(model, loss, sequences(), structure, **options).to_dense()
    for length in (5, 8):
        close(natgrad.fisher(model, loss, padded(length), structure, **options).to_dense(), alone, 1e-9)


def test_a_token_without_a_target_that_others_see_is_a_case():
    """A prompt: its own target is ignored, but later ones depend on it."""
    torch.manual_seed(0)
    model = Model(causal=True).to(f64)
    ((x, y),) = padded(5)
    y[0, :2] = -100
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), [(x, y)])
    h = model.embed(x) + model.place(torch.arange(5).unsqueeze(0))
    real = torch.zeros(len(LENGTHS), 5, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        real[i, :n] = True
    close(F.layers["attention.in_proj"].operator.m, h[real].detach().mean(0), 1e-10)
    real[0, :2] = False
    inner = model.norm(h + model.attention(h, h, h, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))[0])
    close(F.layers["linear"].operator.m, inner[real].detach().mean(0), 1e-10)


class TestFlattened:
    """Positions as examples of the output, `(N·T, C)` in place of `(N, C, T)`."""

    def matrix(self, model, estimator, **options):
        x, y = torch.randint(1, TOKENS, (4, 5)), torch.randint(1, TOKENS, (4, 5))

        def flattened(model, batch):
            return model(batch[0]).transpose(1, 2).flatten(0, 1), batch[1].flatten()

        return natgrad.fisher(
            model, nn.CrossEntropyLoss(), [(x, y)], estimator=estimator, forward=flattened, **options
        ), natgrad.fisher(model, nn.CrossEntropyLoss(), [(x, y)], estimator=estimator, **options)

    @pytest.mark.parametrize("make", [Model, Recurrent])
    @pytest.mark.parametrize("structure", ["block", "ekfac", "diagonal", "kfac"])
    def test_those_that_see_one_another_are_taken_sequence_by_sequence(self, make, structure):
        torch.manual_seed(0)
        flat, positions = self.matrix(make(causal=True).to(f64), "exact", structure=structure)
        close(flat.to_dense(), positions.to_dense(), 1e-10)

    def test_others_give_the_same(self):
        class Apart(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)

            def forward(self, x):
                return self.head(self.embed(x).tanh()).transpose(1, 2)

        torch.manual_seed(0)
        flat, positions = self.matrix(Apart().to(f64), "exact")
        close(flat.to_dense(), positions.to_dense(), 1e-10)

    def test_with_labels_drawn_it_is_the_same_on_average(self):
        torch.manual_seed(0)
        model, generator = Model(causal=True).to(f64), torch.Generator().manual_seed(0)
        flat, positions = self.matrix(model, "mc", samples=300, generator=generator)
        assert abs(flat.trace() / positions.trace() - 1) < 0.1
