"""Unmodified networks: every trainable parameter is covered, K-FAC trains them, the residual reports on them."""

import math

import pytest
import torch
from torch import nn

import natgrad
from models import CLASSES, EXAMPLES, LENGTH, MODELS, TOKENS, Translator, gpt2, resnet
from oracles import close, f64, fit

every_model = pytest.mark.parametrize("name", MODELS)
LOSS = nn.CrossEntropyLoss()


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def matrix(example, structure="kfac", **options):
    return natgrad.fisher(example.model, LOSS, example.data, structure, forward=example.forward, **options)


@every_model
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_every_trainable_parameter_is_covered_once(name, structure):
    example = MODELS[name]()
    coverage = matrix(example, structure, estimator="mc").coverage()
    assert [row.parameter for row in coverage] == list(trainable(example.model))
    assert [row.shape for row in coverage] == [tuple(p.shape) for p in trainable(example.model).values()]
    assert all(row.use and row.bytes > 0 for row in coverage)


def has_lstm_in_bfloat16():
    """Whether torch's own can run on this processor."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


# In low precision the layers take the same way whatever model they are in.
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=[pytest.mark.long] if precision == "bfloat16" and i % 3 else [])
        for precision in ("float32", "bfloat16")
        for i, name in enumerate(MODELS)
    ],
)
def test_KFAC_lowers_the_loss_over_20_steps(name, precision):
    if (name, precision) == ("LSTM", "bfloat16") and not has_lstm_in_bfloat16():
        pytest.skip("torch has no LSTM in bfloat16 on this processor")
    example = MODELS[name]()
    opt = natgrad.KFAC(example.model, LOSS, output=example.read)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            returned = example.model(example.x)
        loss = opt.loss(returned, example.y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert min(losses[-3:]) < 0.97 * losses[0]


@every_model
def test_residual_reports_on_every_layer(name):
    example = MODELS[name]()
    example.model.eval()
    report = natgrad.residual(
        example.model, LOSS, example.data, forward=example.forward, estimator="mc", permutations=0
    )
    assert set(report) == {row.layer for row in matrix(example, "block", estimator="mc").coverage()}
    assert all(r.norm >= 0 for r in report.values())
    assert any(r.norm > 0 for r in report.values())
    assert report.table()


@every_model
def test_a_float64_model_stays_float64(name):
    example = MODELS[name]()
    example.model.double()
    if example.x.is_floating_point():
        example.x = example.x.double()
    opt = natgrad.KFAC(example.model, LOSS, output=example.read)
    opt.loss(example.model(example.x), example.y).backward()
    opt.step()
    assert opt.diagnostics["accepted"]
    assert opt.curvature().dtype == f64
    assert all(p.dtype == f64 for p in example.model.parameters())


ALSO = [pytest.param(name, marks=pytest.mark.long) for name in ("LLaMA", "ViT", "Transformer")]


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "LSTM", "ResNet", *ALSO])
def test_the_exact_blocks_are_those_of_autograd(name):
    example = MODELS[name]()
    example.model.double().eval()
    x = example.x[:2].double() if example.x.is_floating_point() else example.x[:2, :LENGTH]
    example.x, example.y = x, example.y[:2]
    few = [n for n, p in trainable(example.model).items() if p.numel() < 300]
    exact, dense = (matrix(example, structure, params=few) for structure in ("block", "dense"))
    places = dict(zip(dense.space.names, dense.space.unflatten(torch.arange(dense.space.size)), strict=True))
    for name, block in exact.layers.items():
        rows = torch.cat([places[n].flatten() for n in block.names])
        close(exact.blocks[name].to_dense(), dense.to_dense()[rows[:, None], rows], 1e-8)


class TestTiedEmbedding:
    def test_is_one_parameter_with_two_uses(self):
        example = gpt2()
        rows = {row.parameter: row for row in matrix(example).coverage()}
        assert "lm_head.weight" not in rows
        assert rows["transformer.wte.weight"].use == "embedding + linear"

    def test_has_the_sum_of_the_uses_partial_traces(self):
        """`Σ tr(L_u) tr(R_u)`, and the same with a factor in place of its trace."""
        torch.manual_seed(0)
        embed = nn.Embedding(6, 4, dtype=f64)

        class Tied(nn.Module):
            def __init__(self, embed, head):
                super().__init__()
                self.embed, self.head = embed, head

            def forward(self, x):
                return (self.embed(x).tanh() @ self.head.weight.T).transpose(1, 2)

        other = nn.Linear(4, 6, bias=False, dtype=f64)
        other.weight = nn.Parameter(embed.weight.detach().clone())
        data = (torch.randint(6, (5, 3)), torch.randint(6, (5, 3)))
        apart = natgrad.fisher(Tied(embed, other), LOSS, data).blocks
        one = natgrad.fisher(Tied(embed, embed), LOSS, data).blocks["embed"]

        def tensor(block):
            return block.to_dense().view(6, 4, 6, 4)

        first, second, pooled = tensor(apart["embed"]), tensor(apart["head"]), tensor(one)
        for traced in ("vivj->ij", "viwi->vw"):
            expected = torch.einsum(traced, first) + torch.einsum(traced, second)
            close(torch.einsum(traced, pooled), expected, 1e-10)


class TestWideHead:
    """A head of 50,000 classes: its output factor is a diagonal, and D is never formed."""

    def test_trains(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 50_000))
        opt = natgrad.KFAC(model, LOSS)
        x, y = torch.randn(32, 8), torch.arange(32)
        losses = fit(opt, model, x, y, 10)
        assert losses[-1] < 0.9 * losses[0]
        assert opt.diagnostics["diagonal_factors"] == {"2": ("output",)}
        assert "2 (B 50000 (diagonal))" in repr(opt.curvature())

    @pytest.mark.parametrize("max_dim", [0, -1])
    def test_a_width_that_is_none_is_refused(self, max_dim):
        with pytest.raises(ValueError, match=f"max_dim={max_dim}"):
            natgrad.KFAC(nn.Linear(2, 2), LOSS, max_dim=max_dim)
        with pytest.raises(ValueError, match=f"max_dim={max_dim}"):
            natgrad.fisher(nn.Linear(2, 2), LOSS, (torch.ones(1, 2), torch.tensor([0])), max_dim=max_dim)


def test_positions_first_or_examples_first_makes_no_difference():
    """A transformer with positions on axis 0 is the same network."""
    models = [Translator(batch_first=b).double().eval() for b in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randint(TOKENS, (4, LENGTH))
    first, second = (natgrad.fisher(m, LOSS, (x, x), "diagonal", estimator="empirical") for m in models)
    for n, values in first.diagonal().items():
        close(values, second.diagonal()[n], 1e-10)


def test_batch_normalization_is_left_as_it_was():
    """A step runs the model again: its running averages move once for each forward of the user's."""
    example = resnet()
    example.model.train()
    again = resnet().model
    again.load_state_dict(example.model.state_dict())
    again.train()(example.x)
    opt = natgrad.KFAC(example.model, LOSS)
    opt.loss(example.model(example.x), example.y).backward()
    opt.step()
    for n, b in example.model.named_buffers():
        close(b.double(), again.get_buffer(n).double(), 1e-6)


def test_the_number_of_examples_and_classes_differ():
    """So that no test above passes by mistaking one axis for another."""
    assert len({TOKENS, LENGTH, EXAMPLES, CLASSES}) == 4
