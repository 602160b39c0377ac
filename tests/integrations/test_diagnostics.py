"""What a step did, in TensorBoard's files and in dictionaries."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import natgrad
from loops import data, kfac, network
from natgrad.integrations import DiagnosticsWriter, scalars, texts


def written(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def words(events, name):
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{name}/text_summary")]


def test_a_run_is_read_back(tmp_path):
    (x, y), model = data().tensors, network()
    opt = kfac(model, {"max_dim": 6})
    seen = []
    with SummaryWriter(tmp_path) as writer:
        log = DiagnosticsWriter(writer)
        for step in range(6):
            loss = opt.loss(model(x if step != 4 else x * math.nan), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            seen.append(opt.diagnostics)
            log.write(opt.diagnostics)
    events = written(tmp_path)
    for name in ("loss", "damping", "lr"):
        expected = [(d["step"], d[name]) for d in seen if d[name] is not None]
        own = [(e.step, e.value) for e in events.Scalars(f"natgrad/{name}")]
        assert [step for step, _ in own] == [step for step, _ in expected]
        assert [v for _, v in own] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert [e.value for e in events.Scalars("natgrad/accepted")] == [1, 1, 1, 1, 0, 1]
    assert [(e.step, e.value) for e in events.Scalars("natgrad/faults/rejected")] == [(4, 1), (5, 1)]
    assert words(events, "natgrad/reason") == [
        (4, "the loss is not finite: look for NaN or inf in the batch and in the parameters")
    ]
    layer, factor = next(iter(seen[0]["diagonal_factors"].items()))
    said = words(events, f"natgrad/diagonal_factors/{layer}")
    assert said[0] == (0, ", ".join(factor))
    assert len(said) == 2  # again after the rejected step, which has none


def test_other_optimizers(tmp_path):
    (x, y), model = data().tensors, network()
    prong = natgrad.PRONG(model, lr=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    prong.step()
    assert scalars(prong.diagnostics) == {"natgrad/accepted": 1.0, "natgrad/refreshed": 1.0}
    exact = natgrad.NaturalGradient(model, nn.CrossEntropyLoss())
    exact.loss(model(x), y).backward()
    exact.step()
    assert {"natgrad/loss", "natgrad/tries"} <= scalars(exact.diagnostics).keys()
    assert texts(exact.diagnostics) == {"natgrad/solver": exact.diagnostics["solver"]}


def test_what_they_are_given():
    odd = {"step": 1, "nothing": None, "one": torch.tensor(2.0), "plain": ["a", "b"], "none": [], "mixed": [1, "a"]}
    assert scalars(odd, "x") == {"x/one": 2.0}
    assert texts(odd, "x") == {"x/plain": "a, b"}
    with pytest.raises(TypeError, match=r"writer is a dict without add_scalar; expected a SummaryWriter, or log"):
        DiagnosticsWriter({})
