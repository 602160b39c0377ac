"""Variational Monte Carlo: a step by the log-derivatives of a wave function, whose energy is an expectation."""

import torch

import natgrad
from oracles import close, f64, jacobian, net, parameter_vector, randn

N, D, DAMPING, MOMENTUM = 80, 4, 1e-3, 0.9
STATES, ENERGIES = randn(N, D), randn(N, seed=1)
LOSS = natgrad.losses.Likelihood(lambda output: torch.distributions.Normal(output, 0.5))


def log_derivatives(model):
    """`∇log ψ` at every state, `(states, parameters)`."""
    return jacobian(model, STATES, [n for n, _ in model.named_parameters()])[0]


def direction(opt, model, lr):
    """`Δ` of one step."""
    before, output = parameter_vector(model), model(STATES)
    opt.predict(output)
    opt.zero_grad()
    (2 * (ENERGIES - ENERGIES.mean()) * output[:, 0]).mean().backward()
    opt.step()
    return (before - parameter_vector(model)) / lr


def test_the_step_is_that_of_the_log_derivatives_with_momentum():
    model, lr = net(D, 6, 1), 0.1
    opt = natgrad.NaturalGradient(model, LOSS, lr=lr, damping=DAMPING, momentum=MOMENTUM)
    past = torch.zeros_like(parameter_vector(model))
    for _ in range(3):
        J = log_derivatives(model)
        g = 2 * (ENERGIES - ENERGIES.mean()) @ J / N
        M = 4 * J.mT @ J / N + DAMPING * torch.eye(len(g), dtype=f64)
        past = torch.linalg.solve(M, g + DAMPING * MOMENTUM * past)
        close(direction(opt, model, lr), past, 1e-9)


def test_the_last_bias_takes_the_mean_of_the_log_derivatives_out():
    model, damping = net(D, 6, 1), 1e-8
    J = log_derivatives(model)
    C = 4 * torch.cov(J.mT, correction=0)[:-1, :-1]
    g = 2 * (ENERGIES - ENERGIES.mean()) @ J[:, :-1] / N
    expected = torch.linalg.solve(C + damping * torch.eye(len(g), dtype=f64), g)
    found = direction(natgrad.NaturalGradient(model, LOSS, lr=0.1, damping=damping, momentum=0.0), model, 0.1)
    close(found[:-1], expected, 1e-4)
