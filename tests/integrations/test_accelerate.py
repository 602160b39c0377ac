"""KFAC with Accelerate: the weights are those of the plain loop."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from loops import OPTIONS, kfac, loader, network, plain_loop, same, weights


@pytest.fixture(autouse=True)
def no_state():
    """Accelerate keeps its settings between accelerators."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def start(options, accumulate=1, schedule=None):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    opt = kfac(model, options)
    scheduler = schedule(opt) if schedule else None
    model, prepared, batches, scheduler = accelerator.prepare(model, opt, loader(), scheduler)
    return accelerator, model, opt, prepared, batches, scheduler


def train(started, epochs=3, clip=None):
    accelerator, model, opt, prepared, batches, scheduler = started
    for _ in range(epochs):
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = opt.loss(model(x), y)
                accelerator.backward(loss)
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                prepared.step()
                if scheduler:
                    scheduler.step()
                prepared.zero_grad()
    return loss.item()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.1)])
def test_the_weights_are_those_of_the_plain_loop(options, accumulate, clip):
    started = start(OPTIONS[options], accumulate)
    train(started, clip=clip)
    same(weights(started[1]), plain_loop(OPTIONS[options], accumulate=accumulate, clip=clip)[0])


def test_a_scheduler():
    def schedule(opt):
        return torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)

    started = start(OPTIONS["given step size"], schedule=schedule)
    train(started)
    same(weights(started[1]), plain_loop(OPTIONS["given step size"], schedule=schedule)[0])


def test_a_saved_state_resumes_to_the_same_weights(tmp_path):
    whole = start({})
    train(whole, epochs=2)
    whole[0].save_state(str(tmp_path))
    train(whole, epochs=1)
    again = start({})
    again[0].load_state(str(tmp_path))
    train(again, epochs=1)
    same(weights(again[1]), weights(whole[1]))


def test_in_bfloat16():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = network(torch.float32)
    opt = kfac(model, {})
    model, prepared, batches = accelerator.prepare(model, opt, loader())
    for _ in range(3):
        for x, y in batches:
            accelerator.backward(opt.loss(model(x.float()), y))
            prepared.step()
            prepared.zero_grad()
    expected, losses = plain_loop({}, autocast=True)
    same(weights(model), expected)
    assert losses[-1] < 0.8 * losses[0]
