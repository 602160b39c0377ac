"""Laplace posteriors against the dense algebra, formed by autograd, and on the models that people have."""

import pytest
import torch
from torch import nn

import natgrad
from models import MODELS
from natgrad import LaplacePosterior
from oracles import close, f64, jacobian, net, parameter_vector, randn, summed
from posteriors import CASES, STRUCTURES, N, evidence, likelihood, problem


@pytest.mark.parametrize("case", CASES)
def test_the_dense_posterior_is_the_formulas(case):
    model, loss, data = problem(case)
    P = natgrad.laplace(model, loss, data, "dense", prior_precision=0.7)
    G, _ = likelihood(model, loss, data, 1.0)
    close(P.log_marginal_likelihood(), evidence(model, loss, data, 0.7), 1e-10)
    inverse = torch.linalg.inv(G + 0.7 * torch.eye(len(G), dtype=f64))
    close(P.covariance.to_dense(), inverse, 1e-10)
    x = randn(7, 4, seed=3)
    J = jacobian(model, x, [n for n, _ in model.named_parameters()])[0].view(7, 3, -1)
    close(P.functional_variance(x), J @ inverse @ J.mT, 1e-10)
    close(P.functional_variance(x, diagonal=True), (J @ inverse @ J.mT).diagonal(dim1=1, dim2=2), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_and_the_losss_reduction_change_nothing(reduction):
    model, loss, (x, y) = problem()
    P = natgrad.laplace(model, loss, (x, y), "block")
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    other = natgrad.laplace(model, nn.CrossEntropyLoss(reduction=reduction), iter(batches), "block")
    close(other.log_marginal_likelihood(), P.log_marginal_likelihood())
    close(other.predict(x, batch_size=4), P.predict(x))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", ["classes", "numbers"])
def test_every_structure_is_consistent_with_its_own_matrix(structure, case):
    """All figures are those of the dense algebra with the structure's matrix in the place of the whole one."""
    model, loss, data = problem(case)
    P = natgrad.laplace(model, loss, data, structure, prior_precision=0.3)
    F = natgrad.fisher(model, summed(loss), data, structure, centered=False).to_dense()
    F = F / 2 if case == "numbers" else F
    precision = F + 0.3 * torch.eye(len(F), dtype=f64)
    x = randn(7, 4, seed=3)
    J = jacobian(model, x, [n for n, _ in model.named_parameters()])[0].view(7, 3, -1)
    close(P.functional_variance(x), J @ torch.linalg.inv(precision) @ J.mT, 1e-9)
    _, log_likelihood = likelihood(model, loss, data, 1.0)
    terms = 0.3 * parameter_vector(model).square().sum() - len(F) * torch.tensor(0.3).log() + torch.logdet(precision)
    close(P.log_marginal_likelihood(), log_likelihood - 0.5 * terms, 1e-7)
    draws = P.sample_weights(20000, torch.Generator().manual_seed(0))
    moves = torch.cat([(draws[n] - p.detach()).flatten(1) for n, p in model.named_parameters()], 1)
    close(torch.cov(moves.mT), torch.linalg.inv(precision), 0.1)


def test_products_alone_predict_as_the_dense_matrix_does():
    model, loss, data = problem()
    implicit, dense = (natgrad.laplace(model, loss, data, s, prior_precision=0.3) for s in ("implicit", "dense"))
    x = randn(5, 4, seed=3)
    close(implicit.functional_variance(x), dense.functional_variance(x), 1e-7)
    assert abs(implicit.log_marginal_likelihood() - dense.log_marginal_likelihood()) < 1
    found, expected = (P.fit_prior().prior_precision["0.weight"] for P in (implicit, dense))
    assert abs(found / expected - 1) < 0.1
    with pytest.raises(TypeError, match="sample"):
        implicit.sample_weights(3)


def test_the_temperature_divides_the_likelihood():
    model, loss, data = problem()
    P = natgrad.laplace(model, loss, data, "dense", prior_precision=0.7, temperature=0.25)
    G, _ = likelihood(model, loss, data, 1.0)
    close(P.covariance.to_dense(), torch.linalg.inv(4 * G + 0.7 * torch.eye(len(G), dtype=f64)), 1e-10)
    P.temperature = 1.0
    close(P.log_marginal_likelihood(), evidence(model, loss, data, 0.7), 1e-10)


@pytest.mark.parametrize("subset", ["last_layer", "2", ["2.weight", "2.bias"], lambda name: name.startswith("2")])
def test_the_last_layer_alone(subset):
    model, loss, (x, y) = problem()
    P = natgrad.laplace(model, loss, (x, y), "dense", subset, prior_precision=0.5)
    assert P.covariance.space.names == ("2.weight", "2.bias")
    head, h = model[2], model[:2](x).detach()
    alone = natgrad.laplace(nn.Sequential(head).eval(), loss, (h, y), "dense", prior_precision=0.5)
    close(P.predict(x), alone.predict(h))


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "ViT", "LoRA", "ResNet", "LSTM"])
def test_models_that_people_have(name):
    torch.manual_seed(0)
    example = MODELS[name]()
    example.model.eval()
    P = natgrad.laplace(example.model, nn.CrossEntropyLoss(), example.data, "ekfac", forward=example.forward)
    P.fit_prior("layer" if name == "LoRA" else "one")
    probabilities = P.predict((example.x, None))
    output = example.forward(example.model, (example.x, None))[0]
    assert probabilities.shape == output.shape
    assert torch.allclose(probabilities.sum(1), torch.ones_like(probabilities[:, 0]), atol=1e-5)
    if name == "LoRA":
        assert all("lora" in n for n in P.covariance.space.names)


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    model, loss, data = problem("numbers")
    x = randn(5, 4, seed=3)
    for structure in STRUCTURES:
        P = natgrad.laplace(model, loss, data, structure, temperature=0.5).fit_prior("layer")
        P.save(tmp_path / "posterior.safetensors")
        back = LaplacePosterior.load(tmp_path / "posterior.safetensors", model, loss)
        assert torch.equal(back.predict(x).variance, P.predict(x).variance)
        assert back.log_marginal_likelihood() == P.log_marginal_likelihood()


def test_a_file_of_another_model_is_refused(tmp_path):
    model, loss, data = problem()
    path = tmp_path / "posterior.safetensors"
    natgrad.laplace(model, loss, data, subset="last_layer").save(path)
    with pytest.raises(ValueError, match=r"is for another model: its '2\.weight' of shape"):
        LaplacePosterior.load(path, net(4, 6, 3), loss)
    with pytest.raises(ValueError, match="is for the loss CrossEntropyLoss, but loss is MSELoss"):
        LaplacePosterior.load(path, model, nn.MSELoss())
    with pytest.raises(ValueError, match=r"holds a dict, not a matrix.*LaplacePosterior.load"):
        natgrad.load(path)
    natgrad.fisher(model, loss, data).save(path)
    with pytest.raises(ValueError, match="holds no Laplace posterior"):
        LaplacePosterior.load(path, model, loss)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_a_model_that_was_trained_on_is_refused(name):
    model, loss, data = problem()
    P = natgrad.laplace(model, loss, data, subset="last_layer")
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(0.1)
    with pytest.raises(ValueError, match=f"'{name}' has changed since the posterior was computed"):
        P.predict(data[0])


def test_a_model_in_training_mode_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    with pytest.warns(RuntimeWarning, match="'1' \\(Dropout\\) is in training mode"):
        natgrad.laplace(model, nn.CrossEntropyLoss(), (randn(N, 4), torch.arange(N) % 3))
