"""Every public function gives the same numbers wherever it is called: on compiled models, within compiled code, within
autocast, and in several threads."""

import threading

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.attention import _cur_sdpa_kernel_backends

import natgrad
from oracles import close, f64, net, randn

X, Y = randn(24, 3), torch.arange(24) % 2
CE = nn.CrossEntropyLoss()


def model_of(dtype=f64):
    torch.manual_seed(0)
    return net(3, 4, 2).to(dtype).eval()


class Scaled(nn.Module):
    """Elementwise: compiled by inductor, it has no tangents."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(randn(3)), nn.Parameter(randn(3))

    def forward(self, x):
        return torch.tanh(x * self.w + self.b)


def vector(size, dtype=f64):
    return randn(size, seed=5).to(dtype)


def product(M, m):
    return M @ vector(M.space.size, M.dtype)


ENTRIES = {
    "fisher": lambda m, x: product(natgrad.fisher(m, CE, (x, Y)), m),
    "fisher implicit": lambda m, x: product(natgrad.fisher(m, CE, (x, Y), "implicit"), m),
    "fisher ekfac": lambda m, x: natgrad.fisher(m, CE, (x, Y), "ekfac").solve(
        vector(sum(p.numel() for p in m.parameters()), x.dtype), damping=1e-2
    ),
    "gauss_newton": lambda m, x: product(natgrad.gauss_newton(m, CE, (x, Y), "dense"), m),
    "hessian": lambda m, x: product(natgrad.hessian(m, CE, (x, Y), "dense"), m),
    "hessian implicit": lambda m, x: product(natgrad.hessian(m, CE, (x, Y)), m),
    "jacobian": lambda m, x: natgrad.jacobian(m, x).to_dense(),
    "jacobian product": lambda m, x: natgrad.jacobian(m, x) @ vector(sum(p.numel() for p in m.parameters()), x.dtype),
    "ntk": lambda m, x: natgrad.ntk(m, x).to_dense(),
    "influence": lambda m, x: natgrad.influence(m, CE, (x, Y), (x[:3], Y[:3]), damping=1e-2).as_subclass(torch.Tensor),
    "laplace": lambda m, x: natgrad.laplace(m, CE, (x, Y)).functional_variance(x[:3]),
    "predict": lambda m, x: natgrad.laplace(m, CE, (x, Y)).predict(x[:3]),
    "residual": lambda m, x: torch.tensor([row.relative for row in natgrad.residual(m, CE, (x, Y)).values()]),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_within_a_compiled_function(what):
    torch._dynamo.reset()
    called = torch.compile(lambda m, x: ENTRIES[what](m, x), backend="eager")
    close(torch.as_tensor(called(model_of(), X)), torch.as_tensor(ENTRIES[what](model_of(), X)), 1e-10)


@pytest.mark.parametrize("what", sorted(ENTRIES.keys() - {"predict"}))
def test_what_draws_nothing_leaves_the_random_numbers_of_others(what):
    model, before = model_of(), torch.get_rng_state()
    ENTRIES[what](model, X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("what", ENTRIES)
def test_a_compiled_model(what):
    torch._dynamo.reset()
    model = model_of()
    model.compile(backend="aot_eager")
    close(torch.as_tensor(ENTRIES[what](model, X)), torch.as_tensor(ENTRIES[what](model_of(), X)), 1e-10)


def test_a_model_that_is_compiled_after_a_first_product():
    """Code of torch's default compiler drops tangents and says nothing."""
    torch._dynamo.reset()
    model, loss, y = Scaled().eval(), nn.MSELoss(), randn(24, 3, seed=2)
    F_, J = natgrad.fisher(model, loss, (X, y), "implicit"), natgrad.jacobian(model, X)
    v = vector(6)
    before = F_ @ v, J @ v
    model.compile()
    model(X)
    close(F_ @ v, before[0], 1e-12)
    close(J @ v, before[1], 1e-12)


@pytest.mark.parametrize("what", sorted(ENTRIES.keys() - {"hessian", "hessian implicit", "residual"}))
def test_within_autocast(what):
    """The model runs in bfloat16, and the algebra in float32."""
    x = X.float()
    expected = ENTRIES[what](model_of(torch.float32), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ENTRIES[what](model_of(torch.float32), x)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "dense", "diagonal", "block", "low_rank", "kfoc"])
def test_operators_within_autocast(structure):
    M = natgrad.fisher(model_of(torch.float32), CE, (X.float(), Y), structure)
    v = vector(M.space.size, torch.float32)
    for operation in (lambda: M @ v, lambda: M.solve(v, damping=1e-3), lambda: M.to_dense(), lambda: M.trace()):
        expected = operation()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(operation(), expected)


def test_a_hessian_within_autocast_is_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(NotImplementedError, match="outside of it"):
        natgrad.hessian(net(3, 40, 40, 2).float().eval(), CE, (X.float(), Y), "dense")


def test_weights_that_change_within_autocast():
    """Autocast keeps cast weights for as long as its outermost context."""
    model = model_of(torch.float32)
    x = X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)  # its weights are in autocast's cache
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        found = natgrad.fisher(model, CE, (x, Y), "dense").to_dense()
    expected = natgrad.fisher(model, CE, (x, Y), "dense").to_dense()
    assert (found - expected).norm() < 0.05 * expected.norm()


OPTIMIZERS = {
    "NewtonMuon": natgrad.NewtonMuon,
    "KFAC": lambda m: natgrad.KFAC(m, CE),
    "KFAC, fixed": lambda m: natgrad.KFAC(m, CE, lr=0.1, momentum=0.5, damping=0.1),
    "NaturalGradient": lambda m: natgrad.NaturalGradient(m, CE),
    "PRONG": lambda m: natgrad.PRONG(m, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_loop_within_autocast(optimizer):
    model = model_of(torch.float32).train()
    opt = OPTIMIZERS[optimizer](model)
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(8):
            loss = getattr(opt, "loss", CE)(model(X.float()), Y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert losses[-1] < losses[1] < losses[0]


@pytest.mark.parametrize("what", ["hessian", "fisher implicit", "jacobian product"])
def test_threads_leave_the_settings_of_the_process_as_they_were(what):
    before = torch.backends.cudnn.enabled, _cur_sdpa_kernel_backends()
    expected, found, start = ENTRIES[what](model_of(), X), [], threading.Barrier(2)

    def run(model):
        start.wait()
        found.extend(ENTRIES[what](model, X) for _ in range(15))

    threads = [threading.Thread(target=run, args=[model_of()]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (torch.backends.cudnn.enabled, _cur_sdpa_kernel_backends()) == before
    assert len(found) == 30
    for value in found:
        close(value, expected, 1e-12)
