"""Which examples of a batch KFAC's statistics are of."""

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import LABELS, C, D, X, model_of, step
from oracles import close


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_statistics_on_a_share_of_the_batch_are_those_of_every_few_examples_in_turn(structure):
    model = model_of(D, 4, C)
    options = {"estimator": "exact", "damping": 0.02, "lr": 0.0, "momentum": 0.0, "structure": structure}
    part = natgrad.KFAC(
        model, nn.CrossEntropyLoss(), statistics_share=0.3, statistics_every=1, inverses_every=1, decay=0.0, **options
    )
    for start in (0, 1, 2, 0):
        step(model, part)
        own = X[start::3], LABELS[start::3]
        F = natgrad.fisher(model, nn.CrossEntropyLoss(), own, structure=structure)
        close(part.curvature().to_dense(), F.to_dense())


def test_statistics_are_of_a_quarter_of_a_large_batch_and_all_of_a_small_one():
    torch.manual_seed(0)
    for n, left in ((100, 100), (499, 499), (500, 250), (1000, 250), (4000, 1000)):
        model = nn.Sequential(nn.Linear(3, 2))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        x = torch.randn(n, 3)
        opt.loss(model(x), torch.zeros(n, dtype=torch.long)).backward()
        opt.step()
        (m,) = opt.state_dict()["kfac"]["running"]["moments"].values()
        assert m["count"] == left


@pytest.mark.parametrize("flattened", [False, True], ids=["(N, C, T)", "(N T, C)"])
@pytest.mark.parametrize(
    ("rows", "positions", "left"), [(32, 64, 8), (32, 8, 32), (32, 16, 16), (3, 400, 3), (8, 400, 2)]
)
def test_positions_count_as_cases_in_whatever_form_the_loss_takes_them(rows, positions, left, flattened):
    """Flattened, positions that do not see one another are examples: also of three sequences a quarter is taken."""
    torch.manual_seed(0)
    model = nn.Linear(3, C)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    output, y = model(torch.randn(rows, positions, 3)), torch.zeros(rows, positions, dtype=torch.long)
    loss = opt.loss(output.flatten(0, 1), y.flatten()) if flattened else opt.loss(output.transpose(1, 2), y)
    loss.backward()
    opt.step()
    (m,) = opt.state_dict()["kfac"]["running"]["moments"].values()
    assert m["count"] == (300 if flattened and rows == 3 else left * positions)


def test_nor_where_one_layer_has_an_example_for_a_case():
    """A layer on what is left of the positions needs as many examples as one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 62, C))
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    opt.loss(model(torch.randn(32, 1, 64)), torch.zeros(32, dtype=torch.long)).backward()
    opt.step()
    counts = {int(m["count"]) for m in opt.state_dict()["kfac"]["running"]["moments"].values()}
    assert counts == {32, 32 * 62}


@pytest.mark.long
def test_what_all_examples_share_counts_by_its_share():
    """A learned row that every example is added to has one use of one row: it stays whole."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.all = nn.Linear(D, C), nn.Linear(D, C)

        def forward(self, x):
            return self.own(x) + self.all(torch.ones(1, D, dtype=x.dtype))

    torch.manual_seed(0)
    model = Shared().double()
    x, y = X.repeat(40, 1), LABELS.repeat(40)
    values = []
    for share in (1.0, 0.25):
        opt = natgrad.KFAC(
            model, nn.CrossEntropyLoss(), lr=0.0, momentum=0.0, damping=1.0, statistics_share=share, statistics_every=1
        )
        for _ in range(300):
            opt.zero_grad()
            opt.loss(model(x), y).backward()
            opt.step()
        values.append(opt.curvature().layers["all"].operator.B.trace())
    assert values[1] == pytest.approx(values[0], rel=0.5)
