"""Two optimizers in two threads."""

import sys
import threading

import pytest
import torch
from torch import nn

import natgrad

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CE = nn.CrossEntropyLoss()


def settings():
    return [place.fp32_precision for place in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)]


@pytest.mark.parametrize("options", [{}, {"lr": 0.05, "momentum": 0.9, "damping": 0.1}], ids=["adaptive", "numbers"])
def test_they_step_as_each_does_alone_and_leave_torchs_settings(options):
    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        generator = torch.Generator().manual_seed(seed)
        return model, natgrad.KFAC(model, CE, generator=generator, **options)

    def train(model, opt, errors):
        try:
            for _ in range(15):
                loss = opt.loss(model(X), Y)
                opt.zero_grad()
                loss.backward()
                opt.step()
        except Exception as error:
            errors.append(error)

    before, errors = settings(), []
    alone = [made(seed) for seed in range(3)]
    for model, opt in alone:
        train(model, opt, errors)
    together = [made(seed) for seed in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=train, args=(*pair, errors)) for pair in together]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert settings() == before
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
