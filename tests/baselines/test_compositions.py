"""Blend and Product: several experts in one Gaussian, against closed forms, integrals and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from torchrl_pmoe.baselines.blended import Blend, Product

EXPERTS = 4
COMPOSITIONS = {"parameters": Blend("parameters"), "actions": Blend("actions"), "product": Product()}
every_composition = pytest.mark.parametrize("compose", COMPOSITIONS.values(), ids=COMPOSITIONS)
DTYPES = [torch.float32, torch.float64]


def make_experts(*batch, experts=EXPERTS, size=2, dtype=torch.float64, requires_grad=False):
    logits = torch.randn(*batch, experts, dtype=dtype)
    loc = torch.randn(*batch, experts, size, dtype=dtype)
    scale = 0.2 + torch.rand(*batch, experts, size, dtype=dtype)
    return tuple(x.requires_grad_(requires_grad) for x in (logits, loc, scale))


@every_composition
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("log_scale", [-20.0, -7.3, 0.4, 2.0])
def test_one_expert_passes_through_to_the_last_digits(compose, dtype, log_scale):
    logits, loc, _ = make_experts(20, experts=1, dtype=dtype)
    scale = (log_scale - torch.rand(loc.shape)).exp().to(dtype)
    blended = compose(10 * logits, loc, scale)
    digits = {"rtol": 32 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(blended, (loc.squeeze(-2), scale.squeeze(-2)), **digits)


# ---------------------------------------------------------------------- the product


def test_the_product_is_the_closed_form():
    """Precision ``sum_k g_k / s_k^2``, loc the mean of the experts' weighted by their share in it (MCP, equation 4)."""
    logits, loc, scale = make_experts(6)
    found_loc, found_scale = Product()(logits, loc, scale)
    for b in range(6):
        for i in range(2):
            gates = [1 / (1 + math.exp(-x)) for x in logits[b].tolist()]
            terms = [g / s**2 for g, s in zip(gates, scale[b, :, i].tolist(), strict=True)]
            mean = sum(t * m for t, m in zip(terms, loc[b, :, i].tolist(), strict=True)) / sum(terms)
            assert found_loc[b, i].item() == pytest.approx(mean, rel=1e-12, abs=1e-14)
            assert found_scale[b, i].item() == pytest.approx(1 / math.sqrt(sum(terms)), rel=1e-12)


def test_the_product_is_the_normalised_product_of_gated_densities():
    """By integration: ``prod_k N(a; m_k, s_k)^g_k`` over its integral is the Gaussian put out."""
    logits, loc, scale = make_experts(5, size=1)
    found = Product()(logits, loc, scale)
    grid = np.linspace(-12, 12, 20_001)
    for b in range(5):
        gate = logits[b].sigmoid().numpy()
        log_density = stats.norm.logpdf(grid[:, None], loc[b, :, 0].numpy(), scale[b, :, 0].numpy())
        product = np.exp(log_density @ gate)
        product /= np.trapezoid(product, grid)
        expected = stats.norm.pdf(grid, found[0][b].item(), found[1][b].item())
        np.testing.assert_allclose(product, expected, rtol=1e-7, atol=1e-10)


def test_the_product_of_equal_experts_is_as_narrow_as_their_gates_say():
    logits, loc, scale = torch.zeros(4), torch.full((4, 2), 0.7), torch.full((4, 2), 0.3)
    torch.testing.assert_close(Product()(logits, loc, scale), (loc[0], scale[0] / math.sqrt(4 * 0.5)))


def test_a_lone_experts_gate_is_ignored():
    logits, loc, scale = make_experts(6, experts=1, requires_grad=True)
    outs = [Product()(x, loc, scale) for x in (logits, logits - 5, logits + 5)]
    torch.testing.assert_close(outs[0], (loc.squeeze(-2), scale.squeeze(-2)))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=0)
    gradient = torch.autograd.grad(sum(x.sum() for x in outs[0]), logits, allow_unused=True)[0]
    assert gradient is None or not gradient.any()


# ---------------------------------------------------------------------- the gate's blend


@pytest.mark.parametrize("blend", ["parameters", "actions"])
def test_the_blend_is_its_formula(blend):
    logits, loc, scale = make_experts(6)
    found_loc, found_scale = Blend(blend)(logits, loc, scale)
    for b in range(6):
        exponentials = [math.exp(x) for x in logits[b].tolist()]
        weights = [x / sum(exponentials) for x in exponentials]
        for i in range(2):
            mu, sigma = loc[b, :, i].tolist(), scale[b, :, i].tolist()
            mean = sum(w * m for w, m in zip(weights, mu, strict=True))
            if blend == "parameters":
                deviation = sum(w * s for w, s in zip(weights, sigma, strict=True))
            else:
                deviation = math.sqrt(sum((w * s) ** 2 for w, s in zip(weights, sigma, strict=True)))
            assert found_loc[b, i].item() == pytest.approx(mean, rel=1e-12, abs=1e-14)
            assert found_scale[b, i].item() == pytest.approx(deviation, rel=1e-12)


def test_blended_actions_have_the_law_of_the_weighted_sum_of_independent_draws():
    logits, loc, scale = make_experts()
    draws = loc + scale * torch.randn(20_000, EXPERTS, 2, dtype=torch.float64)
    blended = (logits.softmax(-1).unsqueeze(-1) * draws).sum(-2)
    found = Blend("actions")(logits, loc, scale)
    for i in range(2):
        law = stats.norm(found[0][i].item(), found[1][i].item())
        assert stats.kstest(blended[:, i].numpy(), law.cdf).pvalue > 1e-3


# ---------------------------------------------------------------------- finite, vectorised, compiled


@every_composition
@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
@pytest.mark.parametrize("log_scale", [[-20.0] * 4, [2.0] * 4, [-20.0, 2.0, -20.0, 2.0]], ids=["small", "large", "mix"])
@pytest.mark.parametrize("logit", [0.0, 80.0])
def test_values_and_gradients_are_finite_and_right(compose, dtype, log_scale, logit):
    logits = torch.tensor([-1.0, 1.0, 0.5, 0.0], dtype=dtype) * logit
    log_scale = torch.tensor(log_scale, dtype=dtype).unsqueeze(-1).expand(4, 2).clone()
    leaves = [x.requires_grad_() for x in (logits, torch.randn(4, 2, dtype=dtype), log_scale)]
    out = compose(leaves[0], leaves[1], leaves[2].exp())
    assert all(x.dtype == dtype and x.isfinite().all() for x in out)
    assert (out[1] > 0).all()
    exact = compose(*(x.detach().double() for x in leaves[:2]), leaves[2].detach().exp().double())
    tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close([x.double() for x in out], list(exact), rtol=tolerance, atol=tolerance * exact[1].min())
    gradients = torch.autograd.grad(out[0].sum() + out[1].log().sum(), leaves)
    assert all(x.isfinite().all() for x in gradients)


@every_composition
def test_vmap_is_a_loop(compose):
    stack = make_experts(3, 5)
    loop = [compose(*row) for row in zip(*(x.unbind(0) for x in stack), strict=True)]
    torch.testing.assert_close(torch.vmap(compose)(*stack), tuple(torch.stack(x) for x in zip(*loop, strict=True)))


@every_composition
def test_compiled_composition_and_gradient_are_the_eager_ones(compose):
    params = make_experts(5, requires_grad=True)
    results = []
    for function in (compose, torch.compile(compose, fullgraph=True, backend="aot_eager")):
        loc, scale = function(*params)
        results.append((loc, scale, *torch.autograd.grad(loc.sin().sum() + scale.log().sum(), params)))
    torch.testing.assert_close(results[1], results[0])
