"""What notebooks show: tables of matrices, reports and optimizers."""

import copy
import math
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import Dense, Kronecker
from natgrad.report.notebook import MOST_ROWS, table
from oracles import rejected


class Table(HTMLParser):
    """The cells of a table, row by row, and whether every tag that opens closes in order."""

    def __init__(self, text):
        super().__init__()
        self.rows, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def shown(thing):
    return Table(thing._repr_html_()).rows


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    untrained = repr(opt), shown(opt)
    for _ in range(5):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model, opt, (x, y), untrained


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_a_matrix_with_blocks_has_a_row_for_each(trained, structure):
    model, _, data, _ = trained
    F = natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure=structure)
    head, *rows, last = shown(F)
    assert head == ["layer", "use", "rows", "structure", "memory"]
    assert [row[0] for row in rows] == list(F.blocks)
    assert last[2] == "58" == str(F.space.size)
    assert sum(int(row[2]) for row in rows) == 58
    assert repr(F) == "BlockDiagonal(size=58, dtype=torch.float32)"


@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_another_matrix_has_a_line(trained, structure):
    model, _, data, _ = trained
    _, row = shown(natgrad.fisher(model, nn.CrossEntropyLoss(), data, structure=structure))
    assert row[1] == "0.weight, 0.bias, 2.weight, 2.bias"
    assert row[2] == ("–" if structure == "implicit" else "13.1 KiB")


def test_an_operator_without_a_network():
    assert shown(Kronecker(torch.eye(3), torch.eye(2)))[1] == ["A ⊗ B, A 3, B 2", "–", "52 B"]
    assert shown(Dense(torch.eye(2)))[1][0] == "dense 2"


def test_a_coverage_has_the_rows_of_its_table(trained):
    model, _, data, _ = trained
    coverage = natgrad.fisher(model, nn.CrossEntropyLoss(), data).coverage()
    words = [" ".join(" ".join(row).split()) for row in shown(coverage)]
    assert words == [" ".join(line.split()) for line in coverage.table().splitlines()]


def test_a_report_has_the_rows_of_its_table_shaded_by_what_is_relative(trained):
    model, _, data, _ = trained
    report = natgrad.residual(model, nn.CrossEntropyLoss(), data, permutations=0)
    assert [" ".join(row) for row in shown(report)] == [" ".join(line.split()) for line in report.table().splitlines()][
        : len(report) + 1
    ]
    for layer in report.values():
        assert f"{100 * min(layer.relative, 1):.1f}%, transparent" in report._repr_html_()


class TestOptimizer:
    def test_before_a_step_and_after(self, trained):
        _, opt, _, (line, rows) = trained
        start = "KFAC(structure='kfac', lr=adaptive, momentum=adaptive, damping=adaptive"
        assert line == f"{start}, 58 parameters)"
        assert repr(opt) == f"{start}, 2 layers, 58 parameters)"
        before, after = dict(rows[1:]), dict(shown(opt)[1:])
        assert before["layers"] == "seen in the first step"
        assert (before["step size"], before["last step"]) == ("adaptive", "none yet")
        assert after["layers"] == "2: 0, 2"
        assert after["step size"] == f"adaptive, now {opt.diagnostics['lr']:.3g}"
        assert after["last step"] == f"accepted, from a loss of {opt.diagnostics['loss']:.4g}"

    def test_with_numbers_and_groups(self, trained):
        model = copy.deepcopy(trained[0])
        groups = [{"params": ["0.weight"], "lr": 0.2, "weight_decay": 0.1}, {"params": ["0.bias"]}]
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), params=groups, lr=0.1, momentum=0.9, centered=False)
        assert repr(opt) == (
            "KFAC(structure='kfac', centered=False, lr=0.2 / 0.1, momentum=0.9, damping=adaptive, 40 parameters)"
        )
        rows = dict(shown(opt)[1:])
        assert rows["weight decay"] == "0.1 / 0"
        assert "in 2 groups" in opt._repr_html_()

    def test_after_a_rejected_step(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2))
        opt = natgrad.NaturalGradient(model, nn.CrossEntropyLoss(), solver="primal", damping=0.1)
        opt.loss(model(torch.full((3, 4), math.nan)), torch.tensor([0, 1, 1])).backward()
        opt.step()
        rejected(opt)
        rows = dict(shown(opt)[1:])
        assert rows["last step"].startswith("rejected: the loss is not finite")
        assert rows["faults"] == "rejected 1"
        assert rows["solver"] == "primal"
        assert repr(opt) == "NaturalGradient(solver='primal', lr=adaptive, momentum=0.8, damping=0.1, 10 parameters)"


def test_names_are_escaped_and_long_tables_are_cut():
    rows = [(f"<b>{i}&", "1") for i in range(100)]
    text = table("<i>", "a & b", ("layer", "rows"), rows, last=("all", "100"))
    cells = Table(text).rows
    assert "<b>0" not in text
    assert cells[1] == ["<b>0&", "1"]
    assert cells[-2] == [f"and {100 - MOST_ROWS + 1} more"]
    assert len(cells) == 1 + MOST_ROWS + 1
    assert len(Table(table("t", "", ("a", "b"), rows[:MOST_ROWS])).rows) == 1 + MOST_ROWS


def test_shading_ends_at_the_cell_and_leaves_out_what_is_undefined():
    text = table("t", "", ("a", "b"), [("x", "1")] * 3, bars=(1, [2.0, math.nan, 0.0]))
    assert text.count("linear-gradient") == 1
    assert "100.0%, transparent 100.0%" in text
