"""Query gradients layer by layer: of low rank, by token, of layers that some batches do not use."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, randn
from scored import DAMPING, gradients, problem, tagger


def test_query_gradients_of_low_rank():
    model, loss, train, query = problem()
    whole = natgrad.influence(model, loss, train, query, damping=DAMPING)
    errors = [
        float((natgrad.influence(model, loss, train, query, damping=DAMPING, rank=r) - whole).norm() / whole.norm())
        for r in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-10


def test_tokens_share_out_their_examples_score():
    model, data = tagger()
    query, loss, linear = (
        (data[0][:3], data[1][:3]),
        nn.CrossEntropyLoss(),
        ["mid.weight", "mid.bias", "head.weight", "head.bias"],
    )
    how = {"damping": DAMPING, "params": linear}
    by_token = natgrad.influence(model, loss, data, query, per="token", **how)
    assert by_token.shape == (3, 8, 6)
    close(by_token.sum(2), natgrad.influence(model, loss, data, query, **how))
    assert not by_token[:, 2, :3].any()  # there every gradient is zero
    with pytest.raises(ValueError, match="layer 'embed' has no inputs by position where others have 6"):
        natgrad.influence(model, loss, data, query, per="token")


@pytest.mark.parametrize("tied", [False, True])
def test_query_gradients_of_embeddings_of_low_rank(tied):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.out.weight = self.words.weight if tied else self.out.weight

        def forward(self, x):
            return self.out(self.words(x).tanh()).mT

    torch.manual_seed(0)
    model, loss, x = Words().double(), nn.CrossEntropyLoss(), torch.randint(11, (12, 5))
    queries = [(x[:2], x[:2]), (x[2:3], x[2:3])]
    whole = natgrad.influence(model, loss, (x, x), queries, damping=0.1)
    errors = [(natgrad.influence(model, loss, (x, x), queries, damping=0.1, rank=r) - whole).norm() for r in (1, 3, 4)]
    assert errors[0] > errors[1] > 1e-3 * whole.norm()
    assert errors[2] < 1e-12 * whole.norm()


class Sometimes(nn.Module):
    """A network whose middle layer some batches do not use."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        z = self.first(x).tanh()
        return self.last(self.middle(z).tanh() if x[0, 0] > 0 else z)


@pytest.mark.parametrize("rank", [None, 2, 6])
@pytest.mark.parametrize("first", ["uses it", "does not"])
def test_a_layer_that_some_batches_do_not_use(rank, first):
    torch.manual_seed(0)
    model, loss, x = Sometimes().double(), nn.CrossEntropyLoss(), randn(20, 4)
    batches = [(part, torch.arange(len(part)) % 3) for part in (x[x[:, 0] > 0], x[x[:, 0] <= 0])]
    batches = batches if first == "uses it" else batches[::-1]
    g = torch.cat([gradients(model, loss, batch) for batch in batches])
    F = natgrad.fisher(model, loss, batches, "ekfac").to_dense()
    expected = g @ torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=f64), g.mT)
    found = natgrad.influence(model, loss, batches, batches, damping=0.1, rank=rank)
    close(found, expected, 1e-10 if rank != 2 else 0.05)
    if rank is None:
        dense = natgrad.fisher(model, loss, batches, "dense").to_dense() + 0.1 * torch.eye(len(F), dtype=f64)
        refined = natgrad.influence(model, loss, batches, batches, "diagonal", damping=0.1, refine=60)
        close(refined, g @ torch.linalg.solve(dense, g.mT), 5e-3)
