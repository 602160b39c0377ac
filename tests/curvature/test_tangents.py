"""Tangents by fused kernels' reverse mode are those of torch's forward mode."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers.networks import NETWORKS, make
from natgrad.curvature.products import tangent
from natgrad.curvature.tangents import RULES, tangent_rule
from oracles import close, f64, randn

N, HEADS, L, S, E = 2, 4, 5, 7, 6


def dual(t, with_tangent, seed):
    moves = with_tangent and t is not None
    return forward_ad.make_dual(t, randn(*t.shape, seed=100 + seed)) if moves else t


def compare(function, tensors, moving, *after_first, **options):
    """The rule's output and tangent beside torch's."""
    with torch.no_grad(), forward_ad.dual_level():
        first, *rest = (dual(t, moves, seed) for seed, (t, moves) in enumerate(zip(tensors, moving, strict=True)))
        found = forward_ad.unpack_dual(RULES[function](first, *after_first, *rest, **options))
        with sdpa_kernel(SDPBackend.MATH):
            expected = forward_ad.unpack_dual(function(first, *after_first, *rest, **options))
    close(found.primal, expected.primal, 1e-12)
    close(found.tangent, expected.tangent, 1e-12)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "of bools": {"attn_mask": torch.arange(L)[:, None] + 2 >= torch.arange(S)},
    "of numbers": {"attn_mask": randn(N, 1, L, S)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("moving", [m for m in itertools.product([False, True], repeat=3) if any(m)])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_of_attention(moving, options):
    q, k, v = randn(N, HEADS, L, E), randn(N, HEADS, S, E, seed=1), randn(N, HEADS, S, E, seed=2)
    compare(F.scaled_dot_product_attention, (q, k, v), moving, **options)


def test_of_attention_with_values_of_another_width_and_heads_in_groups():
    q, k = randn(N, HEADS, L, E), randn(N, HEADS // 2, S, E, seed=1)
    compare(F.scaled_dot_product_attention, (q, k, randn(N, HEADS // 2, S, 3)), (True,) * 3, enable_gqa=True)
    q, k = randn(N, L, E), randn(N, S, E, seed=1)
    compare(F.scaled_dot_product_attention, (q, k, randn(N, S, 9)), (True,) * 3)


@pytest.mark.parametrize("moving", [m for m in itertools.product([False, True], repeat=3) if any(m)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("function", "shape", "middle", "options"),
    [
        (F.layer_norm, (3, 4, 6), ((6,),), {"eps": 0.1}),
        (F.layer_norm, (3, 4, 6), ((4, 6),), {}),
        (F.group_norm, (3, 6, 5), (2,), {}),
        (F.batch_norm, (4, 6), (None, None), {"training": True}),
        (F.batch_norm, (4, 6, 3, 2), (None, None), {"training": True, "eps": 0.1}),
    ],
)
def test_of_normalizations(function, shape, middle, options, affine, moving):
    if not affine and not moving[0]:
        return
    size = middle[0] if function is F.layer_norm else (shape[1],)
    weight, bias = (randn(*size, seed=1), randn(*size, seed=2)) if affine else (None, None)
    compare(function, (randn(*shape), weight, bias), moving, *middle, **options)


def test_what_has_no_rule_is_left_to_torch():
    q, k, v = randn(3, N, HEADS, L, E)
    assert RULES[F.scaled_dot_product_attention](q, k, v, dropout_p=0.5) is None
    assert RULES[F.batch_norm](randn(4, 6), randn(6), torch.ones(6, dtype=f64)) is None


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.fixture(params=[8, 40], ids=["short", "long"])
def products(request, monkeypatch):
    """`J d` of a model with attention by torch's forward mode, and with every rule, in one precision or another."""
    torch.manual_seed(0)
    model, x = Attentive(), torch.randn(4, request.param, 16)
    d = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def product(rules, dtype, lowered=False):
        def call(forward):
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                return forward(x.to(dtype)).to(dtype)

        with monkeypatch.context() as patch:
            patch.setattr("natgrad.curvature.products.tangent_rule", rules)
            return tangent(model.to(dtype), call, {n: t.to(dtype) for n, t in d.items()})[1]

    return product


def none(function, args):
    return None


def every(function, args):
    return RULES.get(function)


def test_of_a_model(products):
    close(products(every, f64), products(none, f64), 1e-12)
    close(products(tangent_rule, f64), products(none, f64), 1e-12)


@pytest.mark.parametrize(("name", "training"), [*((name, False) for name in NETWORKS), ("batch norm", True)])
def test_of_every_kind(name, training, monkeypatch):
    model, x, _ = make(name)
    model.train(training)
    d = {n: randn(1, *p.shape, seed=i)[0] for i, (n, p) in enumerate(model.named_parameters())}
    found = {}
    for rules in (none, every):
        monkeypatch.setattr("natgrad.curvature.products.tangent_rule", rules)
        _, found[rules] = tangent(model, lambda forward: forward(x), d)
    close(found[every], found[none], 1e-12)


def test_in_bfloat16_it_is_the_tangent_in_float64_to_few_digits(products):
    found, expected = products(every, torch.float32, lowered=True), products(none, f64)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_on_a_cpu_it_is_for_long_attention():
    q, k = randn(N, HEADS, L, E), randn(N, HEADS, 8 * E, E)
    assert tangent_rule(F.scaled_dot_product_attention, (q, k, k)) is RULES[F.scaled_dot_product_attention]
    assert tangent_rule(F.scaled_dot_product_attention, (q, q, q)) is None
    assert tangent_rule(F.layer_norm, (q, (E,))) is None
    assert tangent_rule(F.layer_norm, (q.to("meta"), (E,))) is RULES[F.layer_norm]


def with_constants(x, c):
    return {
        "product": x * c + c * x * 2.0,
        "quotient": x / c / 2 + c / x,
        "sum": torch.add(x, c, alpha=3) + c + 1,
        "difference": torch.sub(c, x, alpha=2) - (x - c) - 1,
        "spread": x[:1] + c,
        "in place": (x + c).add_(x) + x,
    }


class Itself(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self):
        return self.x


def test_constants_take_no_part_in_tangents():
    x, v, c = randn(3, 4) + 5, randn(3, 4, seed=1), randn(3, 4, seed=2) + 5
    one = Itself(x)
    for name, value in with_constants(x, c).items():
        found = tangent(one, lambda forward, name=name: with_constants(forward(), c)[name], {"x": v})
        expected = torch.func.jvp(lambda t, name=name: with_constants(t, c)[name], (x,), (v,))
        close(found[0], value, 1e-12)
        close(found[1], expected[1], 1e-12)
