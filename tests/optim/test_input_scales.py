"""Inputs of data are damped in units of their own scales."""

import copy
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import natgrad
from natgrad.capture.cases import Cases
from natgrad.capture.layer import Layer
from natgrad.capture.layers import Rows
from natgrad.curvature.central_moments import CentralMoments
from natgrad.curvature.input_scales import RAREST, SPAN, moments_of_data, relative_scales
from natgrad.linalg import CenteredKronecker, Kronecker
from natgrad.optim.preconditioner.layers import UNSEEN
from oracles import close, f64, net, randn, spd

LAYER = Layer("weight", "bias")
seeds = st.integers(0, 2**16)


def moments(x):
    """By the definition."""
    d = x - x.mean(0)
    return [d.pow(k).sum(0) for k in (2, 3, 4)]


def scales_of(x):
    """The scales, or None if they count as equal."""
    return relative_scales({LAYER: CentralMoments.of(x)}).get(LAYER.names)


class TestCentralMoments:
    @given(seed=seeds, n=st.integers(1, 5), m=st.integers(1, 5), shift=st.sampled_from([0.0, 1.0, 1e4]))
    def test_merged_moments_are_those_of_all_cases(self, seed, n, m, shift):
        x = randn(n + m, 3, seed=seed) ** 3 + shift
        whole, merged = CentralMoments.of(x), CentralMoments.of(x[:n]) + CentralMoments.of(x[n:])
        for name, expected in zip(("second", "third", "fourth"), moments(x), strict=True):
            close(getattr(whole, name), expected)
            close(getattr(merged, name), expected)
        close(merged.mean, x.mean(0))
        assert merged.count == n + m

    @given(seed=seeds, factor=st.sampled_from([0.3, 0.8]))
    def test_weights_are_counts(self, seed, factor):
        """`2 M` is the moments of all cases taken twice."""
        x, y = randn(4, 2, seed=seed), randn(3, 2, seed=seed + 1)
        twice = CentralMoments.of(torch.cat([x, x])) + CentralMoments.of(y)
        weighted = 2 * CentralMoments.of(x) + CentralMoments.of(y)
        for name in ("count", "mean", "second", "third", "fourth"):
            close(getattr(weighted, name), getattr(twice, name))
        fraction = factor * CentralMoments.of(x)
        close(fraction.fourth / fraction.count, CentralMoments.of(x).fourth / 4)

    def test_around_another_mean(self):
        x, c = randn(6, 2), torch.tensor([3.0, -1.0], dtype=f64)
        moved = CentralMoments.of(x).around(c)
        for name, k in (("second", 2), ("third", 3), ("fourth", 4)):
            close(getattr(moved, name), (x - c).pow(k).sum(0))

    def test_large_values_in_single_precision(self):
        m = CentralMoments.of(1e12 * torch.randn(50, 2))
        assert m.is_finite()

    def test_not_finite(self):
        assert not CentralMoments.of(torch.tensor([[1.0], [float("nan")]])).is_finite()


class TestScales:
    @given(seed=seeds, power=st.integers(2, 9))
    def test_follow_the_units(self, seed, power):
        x = randn(200, 2, seed=seed)
        units = torch.tensor([1.0, 10.0**power], dtype=f64)
        own = torch.stack([(v.pow(4).mean() / v.pow(2).mean()).sqrt() for v in (x - x.mean(0)).T]) * units
        close(scales_of(x * units), own / own.max(), 1e-12)

    @given(seed=seeds, shift=st.floats(-1e3, 1e3))
    def test_do_not_depend_on_a_shift(self, seed, shift):
        x = randn(100, 3, seed=seed) * torch.tensor([1.0, 20.0, 400.0], dtype=f64)
        close(scales_of(x + shift), scales_of(x), 1e-6)

    def test_about_equal_scales_change_nothing(self):
        x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        assert scales_of(x * torch.tensor([1.0, 0.9 * SPAN])) is None
        assert scales_of(x * torch.tensor([1.0, 1.1 * SPAN])) is not None

    def test_a_rare_input_has_none_of_its_own(self):
        """One that is nonzero in a share `q` has kurtosis about `1/q`."""
        n = 400
        x = torch.zeros(n, 3)
        x[:, 0] = torch.randn(n, generator=torch.Generator().manual_seed(0))
        x[: round(n / RAREST / 3), 1] = 1e-3
        assert scales_of(x) is None
        x[: n // 4, 2] = 1e-3
        found = scales_of(x)
        assert found[0] == found[1] == 1
        assert found[2] < 0.01

    @pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e5, -3e-5])
    def test_a_constant_input_has_none_of_its_own(self, value):
        x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e3, 0.0]) + value
        assert scales_of(x)[2] == 1

    def test_inputs_that_are_all_constant_or_one(self):
        assert scales_of(torch.ones(8, 3)) is None
        assert scales_of(torch.randn(1, 3)) is None


class TestInverse:
    @given(seed=seeds)
    def test_is_that_of_inputs_in_these_units(self, seed):
        C, B, m = spd(3, seed), spd(2, seed + 1), randn(3, seed=seed + 2)
        units = torch.tensor([1.0, 0.1, 1e-3], dtype=f64)
        S = units.diag()
        raw = CenteredKronecker(covariance=S @ C @ S, mean=units * m, output=B)
        plain = CenteredKronecker(covariance=C, mean=m, output=B).inverse(0.1, damping_style="factored")
        damped = raw.inverse(0.1, damping_style="factored", units=units)
        W, b = randn(2, 3, seed=seed + 3), randn(2, seed=seed + 4)
        expected_W, expected_b = plain @ (W, b)
        found_W, found_b = damped @ (W * units, b)  # the gradient in the raw inputs' weights
        close(found_W * units, expected_W)
        close(found_b, expected_b)
        coordinates = damped.coordinates((W / units, b))
        for own, theirs in zip(coordinates, plain.coordinates((W, b)), strict=True):
            close(own, theirs)
        close(raw.trace_in_coordinates(units), CenteredKronecker(covariance=C, mean=m, output=B).trace_in_coordinates())

    @given(seed=seeds)
    def test_of_a_layer_without_a_bias(self, seed):
        A, B, W = spd(3, seed), spd(2, seed + 1), randn(2, 3, seed=seed + 3)
        units = torch.tensor([1.0, 0.1, 1e-3], dtype=f64)
        S = units.diag()
        raw, plain = Kronecker(S @ A @ S, B), Kronecker(A, B)
        damped = raw.inverse(0.1, damping_style="factored", units=units)
        close((damped @ (W * units)) * units, plain.inverse(0.1, damping_style="factored") @ W)
        close(damped.coordinates((W / units,))[0], W)
        close(raw.trace_in_coordinates(units), plain.trace())
        close((2 * damped).coordinates((W,))[0], damped.coordinates((W,))[0])

    @pytest.mark.parametrize("style", ["exact", "centered"])
    def test_only_factored(self, style):
        Z = CenteredKronecker(covariance=spd(2, 0), mean=randn(2), output=spd(2, 1))
        with pytest.raises(ValueError, match="expected 'factored'"):
            Z.inverse(0.1, damping_style=style, units=torch.ones(2, dtype=f64))


def binary(n, d, seed=0):
    """Inputs of ±1, whose scales are exactly equal."""
    x = randn(n, d, seed=seed).sign()
    return torch.cat([x, -x])


UNITS = torch.tensor([1.0, 1e-2, 1e-4], dtype=f64)


def trained(opt_of, model, x, y, steps=12):
    opt, losses = opt_of(model), []
    for _ in range(steps):
        opt.zero_grad()
        loss = opt.loss(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def alike():
    """A problem, and two models that are the same function, the second one of the inputs in other units."""
    x, model = binary(20, 3), net(3, 6, 2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight /= UNITS
    return x, torch.sin(x @ randn(3, 2, seed=5)), model, other


def losses_of(model, x, y, input_scales):
    """Those of a copy of the model, always with the same random labels."""
    generator = torch.Generator().manual_seed(0)
    own = copy.deepcopy(model)
    return trained(lambda m: natgrad.KFAC(m, nn.MSELoss(), input_scales=input_scales, generator=generator), own, x, y)


class TestTraining:
    @pytest.mark.parametrize(
        "options", [{}, {"lr": 0.3, "momentum": 0.5, "damping": 0.1}, {"max_kl": 0.1}, {"weight_decay": 0.0}], ids=str
    )
    def test_units_of_the_inputs_do_not_matter(self, options):
        """The same function with inputs in other units and the first weight divided by them: the same losses."""
        x, y, model, other = alike()

        def opt_of(m):
            return natgrad.KFAC(
                m, nn.MSELoss(), estimator="exact", statistics_share=1.0, matmul_precision="highest", **options
            )

        expected = trained(opt_of, model, x, y)
        assert trained(opt_of, other, x * UNITS, y) == pytest.approx(expected, rel=1e-6)
        with torch.no_grad():
            other[0].weight *= UNITS
        close(other[0].weight, model[0].weight, 1e-6)

    @pytest.mark.parametrize("options", [{}, {"lr": 0.3, "momentum": 0.5, "damping": 0.1}], ids=str)
    @pytest.mark.parametrize("kind", ["no bias", "frozen bias", "convolution", "convolution without bias"])
    def test_nor_in_other_layers_of_data(self, kind, options):
        images = kind.startswith("convolution")
        x = binary(20, 3 * 5).unflatten(1, (3, 5)) if images else binary(20, 3)
        first = nn.Conv1d(3, 4, 2, bias=kind == "convolution") if images else nn.Linear(3, 6, bias=kind != "no bias")
        model = nn.Sequential(first, nn.Flatten(), nn.Tanh(), nn.Linear(16 if images else 6, 2)).double()
        if kind == "frozen bias":
            first.bias.requires_grad_(False)
        units = UNITS.unsqueeze(1) if images else UNITS
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight /= units
        y = torch.sin(x.flatten(1) @ randn(x[0].numel(), 2, seed=5))

        def opt_of(m):
            return natgrad.KFAC(
                m, nn.MSELoss(), estimator="exact", statistics_share=1.0, matmul_precision="highest", **options
            )

        expected = trained(opt_of, model, x, y)
        assert trained(opt_of, other, x * units, y) == pytest.approx(expected, rel=1e-5)
        assert expected[-1] < expected[0]

    def test_they_matter_without(self):
        x, y, model, other = alike()

        def opt_of(m):
            return natgrad.KFAC(m, nn.MSELoss(), estimator="exact", statistics_share=1.0, input_scales=False)

        assert trained(opt_of, other, x * UNITS, y)[-1] > 1.1 * trained(opt_of, model, x, y)[-1]

    def test_inputs_of_about_one_scale_change_no_bit(self):
        x, y, model = randn(32, 4), randn(32, 2, seed=1), net(4, 5, 2)
        with_scales, without = (losses_of(model, x, y, on) for on in (True, False))
        assert with_scales == without

    def test_hidden_layers_keep_theirs(self):
        """Units of hidden layers are the network's own, not a user's."""
        x, model = randn(40, 3), net(3, 4, 2)
        with torch.no_grad():
            model[0].weight[0] *= 1e-4  # a hidden unit that hardly varies
        opt = natgrad.KFAC(model, nn.MSELoss())
        trained(lambda m: opt, model, x, randn(40, 2), steps=2)
        assert [layer.names for layer in opt._running.total.scales] == [("0.weight", "0.bias")]

    def test_frozen_layers_give_data(self):
        """What a frozen part computes comes from outside, as a feature does."""
        x, model = randn(40, 3), net(3, 4, 2)
        model[0].requires_grad_(False)
        opt = natgrad.KFAC(model, nn.MSELoss())
        trained(lambda m: opt, model, x, randn(40, 2), steps=2)
        assert [layer.names for layer in opt._running.total.scales] == [("2.weight", "2.bias")]

    def test_a_saved_run_resumes(self):
        x, y, model = binary(20, 3) * UNITS, randn(40, 2), net(3, 6, 2)
        with torch.no_grad():
            model[0].weight /= UNITS

        def opt_of(m):
            return natgrad.KFAC(m, nn.MSELoss(), estimator="exact", statistics_every=3, inverses_every=4)

        first = opt_of(model)
        trained(lambda m: first, model, x, y, steps=5)
        other = copy.deepcopy(model)
        second = opt_of(other)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert trained(lambda m: first, model, x, y) == trained(lambda m: second, other, x, y)

    def test_a_state_of_a_version_without_scales_loads(self):
        model = net(3, 4, 2)
        opt = natgrad.KFAC(model, nn.MSELoss())
        trained(lambda m: opt, model, randn(20, 3), randn(20, 2), steps=2)
        state = copy.deepcopy(opt.state_dict())
        del state["kfac"]["running"]["scales"]
        natgrad.KFAC(model, nn.MSELoss()).load_state_dict(state)

    def test_padded_positions_do_not_count(self):
        x = randn(4, 3, 2)
        there = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
        one = torch.ones((), dtype=f64)
        cases = Cases({LAYER: [Rows(x)]}, [], {LAYER: 1}, one, 4, present={LAYER: [(there, there)]}, data={LAYER})
        found, expected = moments_of_data(cases)[LAYER], CentralMoments.of(x[there])
        assert found.count == 9
        close(found.fourth, expected.fourth)

    @pytest.mark.parametrize(("how", "found"), [("embedding", True), ("flattened", True), ("hidden", False)])
    def test_numbers_joined_with_others(self, how, found):
        """With embeddings, an input is still data. With hidden units, whose scales are the network's own, it is not."""

        class Table(nn.Module):
            def __init__(self):
                super().__init__()
                self.kind, self.hidden, self.out = nn.Embedding(5, 2), nn.Linear(3, 2), nn.Linear(5, 2)

            def forward(self, x, kind):
                own = self.hidden(x / UNITS).tanh() if how == "hidden" else self.kind(kind)
                own = self.kind(kind.view(-1, 1)).flatten(1) if how == "flattened" else own
                return self.out(torch.cat([x, own], 1))

        model, kind = Table().double(), torch.arange(40) % 5
        opt = natgrad.KFAC(model, nn.MSELoss())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.loss(model(randn(40, 3) * UNITS, kind), randn(40, 2)).backward()
            opt.step()
        scales = opt._running.units().get(("out.weight", "out.bias"))
        assert (scales is not None) == found
        if scales is not None:
            assert scales[2] < 1e-3 < scales[3]

    def test_other_kinds_of_layers_have_none(self):
        """Such as convolutions of groups of channels."""
        model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(12, 2)).double()
        opt = natgrad.KFAC(model, nn.MSELoss())
        trained(lambda m: opt, model, randn(20, 2, 4) * torch.tensor([[1.0], [1e3]]), randn(20, 2), steps=2)
        assert not opt._running.total.scales

    def test_channels_of_about_one_scale_change_no_bit(self):
        x, y = randn(32, 3, 6, 6), randn(32, 2, seed=1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)).double()
        with_scales, without = (losses_of(model, x, y, on) for on in (True, False))
        assert with_scales == without


class TestWarning:
    def test_where_the_weights_hide_an_input(self):
        x, y, model = binary(20, 3) * UNITS, randn(40, 2), net(3, 6, 2)
        with pytest.warns(RuntimeWarning, match=r"'0.weight' have scales that differ by a factor of 1e\+04"):
            trained(lambda m: natgrad.KFAC(m, nn.MSELoss()), model, x, y, steps=1)

    def test_where_a_layer_without_a_bias_does(self):
        model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)).double()
        with pytest.warns(RuntimeWarning, match="'0.weight' have scales that differ"):
            trained(lambda m: natgrad.KFAC(m, nn.MSELoss()), model, binary(20, 3) * UNITS, randn(40, 2), steps=1)

    def test_once_and_not_where_they_see_it(self):
        x, y, model = binary(20, 3) * UNITS, randn(40, 2), net(3, 6, 2)
        with torch.no_grad():
            model[0].weight /= UNITS
            model[0].weight[:, 1] *= 10 * UNSEEN
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained(lambda m: natgrad.KFAC(m, nn.MSELoss()), model, x, y, steps=4)
        model = net(3, 6, 2)
        with warnings.catch_warnings(record=True) as came:
            warnings.simplefilter("always")
            trained(lambda m: natgrad.KFAC(m, nn.MSELoss()), model, x, y, steps=6)
        assert len([w for w in came if "have scales" in str(w.message)]) == 1


class TestOption:
    @pytest.mark.parametrize(
        "options", [{"structure": "ekfac"}, {"centered": False}, {"damping_style": "exact"}], ids=str
    )
    def test_is_refused_where_it_is_not_possible(self, options):
        with pytest.raises(ValueError, match="input_scales=True"):
            natgrad.KFAC(net(2, 2), nn.MSELoss(), input_scales=True, **options)
        natgrad.KFAC(net(2, 2), nn.MSELoss(), **options)

    def test_takes_a_flag(self):
        with pytest.raises(ValueError, match="input_scales"):
            natgrad.KFAC(net(2, 2), nn.MSELoss(), input_scales=0.5)
