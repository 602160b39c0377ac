"""The code of docs/integrations.md, run as it stands."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from loops import data

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
SECTIONS = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
BLOCKS = [(s.splitlines()[0], c) for s in SECTIONS for c in re.findall(r"```python\n(.*?)```", s, re.DOTALL)]


@pytest.mark.parametrize(("heading", "code"), BLOCKS, ids=[heading for heading, _ in BLOCKS])
def test_it_trains(heading, code, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    x, y = data().tensors
    batches = DataLoader(TensorDataset(x.float(), y), 12)
    rows = torch.randint(20, (16, 8))
    names = {
        "torch": torch,
        "nn": nn,
        "natgrad": natgrad,
        "loader": batches,
        "folder": str(tmp_path),
        "tokens": [{"input_ids": row, "labels": row} for row in rows],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
    opt = names["opt"] if "opt" in names else names["trainer"].optimizers[0]
    assert opt.diagnostics["step"] > 1
    assert opt.diagnostics["accepted"]
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_every_block_is_run():
    assert len(BLOCKS) == PAGE.read_text(encoding="utf-8").count("```python") == 5
