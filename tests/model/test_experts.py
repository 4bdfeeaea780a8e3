"""Routed experts against their definition: every expert on every token, weighted by the renormalised top k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mdseq.model.denoiser import Denoiser, DenoiserConfig
from mdseq.model.experts import DenseFeedForward, RoutedExperts, captured_router_logits
from mdseq.sparse import Documents
from mdseq.spec import load_spec


def make_layer(hidden: int, inner: int, num_experts: int, top_k: int, dtype: torch.dtype) -> RoutedExperts:
    torch.manual_seed(num_experts * 10 + top_k)
    layer = RoutedExperts(hidden, inner, num_experts, top_k)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.to(dtype)


def definition(layer: RoutedExperts, x_bsd: Tensor) -> Tensor:
    """y = sum over the k likeliest experts of p_e / (sum of their p) * down_e(silu(gate_e x) * up_e x).

    For k = 1 the weight is p_e itself.
    """
    probability_bse = (x_bsd @ layer.gate.weight.T).softmax(dim=-1)
    kth = probability_bse.sort(dim=-1, descending=True).values[..., layer.top_k - 1 : layer.top_k]
    kept_bse = torch.where(probability_bse >= kth, probability_bse, 0.0)
    weight_bse = kept_bse / kept_bse.sum(dim=-1, keepdim=True) if layer.top_k > 1 else kept_bse
    out = torch.zeros_like(x_bsd)
    for e in range(probability_bse.shape[-1]):
        gate, up = layer.experts.gate_up_proj[e].chunk(2)
        inner = (x_bsd @ gate.T).sigmoid() * (x_bsd @ gate.T) * (x_bsd @ up.T)
        out = out + weight_bse[..., e : e + 1] * (inner @ layer.experts.down_proj[e].T)
    return out


def run(function, layer: RoutedExperts, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of every weight."""
    x = x.clone().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), grad_outputs=grad)]


@settings(max_examples=40)
@given(st.data(), st.integers(1, 3), st.integers(1, 20), st.integers(1, 6))
def test_equals_the_definition(data: st.DataObject, rows: int, slots: int, num_experts: int) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    exact_layer = make_layer(8, 6, num_experts, top_k, torch.float64)
    generator = torch.Generator().manual_seed(rows * 100 + slots)
    x, grad = (torch.randn(rows, slots, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = run(lambda x: definition(exact_layer, x), exact_layer, x, grad)

    # The router works in fp32 whatever the layer's type, so even float64 agrees to fp32's precision only.
    for dtype in (torch.float64, torch.float32):
        layer = make_layer(8, 6, num_experts, top_k, dtype)
        for ours, expected in zip(run(layer, layer, x.to(dtype), grad.to(dtype)), exact, strict=True):
            assert ours.dtype == dtype
            assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=1)


def test_all_experts_chosen_is_a_plain_weighted_sum() -> None:
    layer = make_layer(8, 6, num_experts=4, top_k=4, dtype=torch.float64)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    weight = (x @ layer.gate.weight.T).softmax(dim=-1)
    expected = torch.zeros_like(x)
    for e in range(4):
        gate, up = (x @ layer.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        expected += weight[..., e, None] * ((nn.functional.silu(gate) * up) @ layer.experts.down_proj[e].T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_a_single_expert_is_the_dense_layer() -> None:
    layer, dense = make_layer(8, 6, 1, 1, torch.float32), DenseFeedForward(8, 6)
    dense.load_state_dict({"gate_up.weight": layer.experts.gate_up_proj[0], "down.weight": layer.experts.down_proj[0]})
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(layer(x), dense(x))


def test_no_token_is_dropped_when_all_want_the_same_expert() -> None:
    layer = make_layer(8, 6, num_experts=4, top_k=1, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[0.0], [1.0], [0.0], [0.0]]) * 10)
    x = torch.rand(1, 50, 8, dtype=torch.float64) + 0.1  # all positive: expert 1 wins everywhere
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-6, atol=1e-6)


def test_an_idle_expert_has_a_gradient_of_zeros() -> None:
    """Not None, which would leave ranks with different sets of gradients, and not NaN."""
    layer = make_layer(8, 6, num_experts=4, top_k=2, dtype=torch.float32)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]).expand(4, 8))
    layer(torch.rand(1, 10, 8) + 0.1).square().sum().backward()
    for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
        assert weight.grad is not None
        assert (weight.grad[:2] != 0).any(dim=(-1, -2)).all()
        assert (weight.grad[2:] == 0).all()
    assert layer.gate.weight.grad is not None


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_from_the_output(top_k: int) -> None:
    """The gate's probability scales the expert's output (SwitchDiffuSeq's does not)."""
    layer = make_layer(8, 6, num_experts=4, top_k=top_k, dtype=torch.float32)
    layer(torch.randn(1, 10, 8)).square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 1e-2


def tiny_denoiser() -> Denoiser:
    overrides = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=3", "model.num_heads=2",
        "attention.window=3", "attention.num_global=2", "experts.num_experts=4", "experts.feedforward_dim=6",
    ]  # fmt: skip
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig.of(load_spec(None, overrides).spec, 20))


def test_captured_logits_come_in_layer_order_with_their_gradients() -> None:
    denoiser = tiny_denoiser()
    documents = Documents.whole(torch.tensor([6, 4]), 6)
    z_blz, time_bl = torch.randn(2, 6, 8), torch.zeros(2, 6)
    with captured_router_logits(denoiser) as logits:
        denoiser(z_blz, time_bl, documents)
    assert [tuple(layer.shape) for layer in logits] == [(2 * (2 + 6), 4)] * 3  # global slots are routed too
    for layer, of_layer in enumerate(logits):
        gates = [block.feedforward.gate.weight for block in denoiser.blocks]
        gradients = torch.autograd.grad(of_layer.square().sum(), gates, retain_graph=True, allow_unused=True)
        seen = [gradient is not None and bool((gradient != 0).any()) for gradient in gradients]
        assert seen == [i <= layer for i in range(3)]  # its own router, and those before it


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_captured_after_the_block(fails: bool) -> None:
    denoiser, documents = tiny_denoiser(), Documents.whole(torch.tensor([6]), 6)
    inputs = torch.randn(1, 6, 8), torch.zeros(1, 6), documents
    with captured_router_logits(denoiser) as logits:
        denoiser(*inputs)
    if fails:
        with pytest.raises(ZeroDivisionError), captured_router_logits(denoiser):
            raise ZeroDivisionError
    denoiser(*inputs)
    assert len(logits) == 3
    assert not any(block.feedforward.gate._forward_hooks for block in denoiser.blocks)
