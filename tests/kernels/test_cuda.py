"""The kernels on a GPU, against the definitions in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn

from mdseq.kernels import (
    add_norm,
    combine,
    dispatch,
    grouped_linear,
    rotate,
    softmax_numerators,
    softmax_slope,
    split_linear,
    swiglu,
)
from mdseq.kernels.grouped import loop_linear
from mdseq.kernels.norm import plain_add_norm
from mdseq.kernels.rotate import plain_rotate
from mdseq.kernels.rows import plain_sum_rows
from mdseq.kernels.softmax import plain_numerators, plain_slope
from mdseq.kernels.swiglu import plain_swiglu
from mdseq.model.assignment import Assignment
from mdseq.model.experts import RoutedExperts
from tests.kernels.outcomes import assert_near, normal, outcome

triton = pytest.importorskip("triton", reason="comes with torch for GPUs")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# exp and division are approximate to some roundings of float32.
ROUNDINGS = {torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


@pytest.fixture(autouse=True)
def _exact_products_and_nan_in_free_memory() -> Iterator[None]:
    """What a kernel leaves unwritten, or reads beyond what is written, shows."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    blocks = [torch.full((2**exponent,), torch.nan, device="cuda") for exponent in range(7, 24) for _ in range(4)]
    del blocks
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed, device="cuda").to(dtype)


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "inner"), [(0, 8), (1, 1), (333, 6), (77, 513), (1000, 256), (65, 2048), (9, 5000)])
def test_swiglu(rows, inner, weighted, dtype):
    inputs = [random(rows, 2 * inner, dtype=dtype)]
    inputs += [random(rows, dtype=torch.float32, seed=1)] if weighted else []
    grad = random(rows, inner, dtype=dtype, seed=2)
    ours = outcome(swiglu, inputs, grad)
    exact = outcome(plain_swiglu, doubles(*inputs), grad)
    assert [x.dtype for x in ours] == [dtype, *(x.dtype for x in inputs)]
    assert_near(ours[:2], exact[:2], ROUNDINGS[dtype])
    assert_near(ours[2:], exact[2:], 16)


def test_swiglu_of_extreme_numbers():
    gate_up = torch.tensor([[-3e38, 1.0], [-100.0, 1.0], [100.0, 2.0], [0.0, 3e38]], device="cuda")
    ours, exact = (outcome(f, [gate_up], torch.ones(4, 1, device="cuda")) for f in (swiglu, plain_swiglu))
    torch.testing.assert_close(ours, exact)


def sum_and_norm(function, *inputs):
    """Side by side, so that a gradient reaches both."""
    x, *added, weight = inputs
    return torch.cat(function(x, added[0] if added else None, weight, 1e-5), dim=-1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (333, 6), (77, 513), (9000, 256), (65, 2048), (9, 5000)])
def test_add_norm(rows, width, adds, dtype):
    inputs = [random(rows, width, dtype=dtype, seed=i) for i in range(1 + adds)] + [random(width, dtype=dtype, seed=2)]
    grad = random(rows, 2 * width, dtype=dtype, seed=3)
    ours = outcome(partial(sum_and_norm, add_norm), inputs, grad)
    assert torch.equal(ours[0][:, :width], sum(inputs[:-1]))
    exact = outcome(partial(sum_and_norm, plain_add_norm), doubles(*inputs), grad)
    assert [x.dtype for x in ours] == [dtype] * len(ours)
    assert_near(ours[:1], exact[:1], ROUNDINGS[dtype])
    assert_near(ours[1:], exact[1:], 16)
    assert all(
        torch.equal(one, other)
        for one, other in zip(ours, outcome(partial(sum_and_norm, add_norm), inputs, grad), strict=True)
    )


@pytest.mark.parametrize("used", [0, 1])
def test_add_norm_of_which_one_result_is_used(used):
    inputs = [random(70, 40, dtype=torch.float32, seed=i) for i in range(2)]
    weight, grad = random(40, dtype=torch.float32, seed=2), random(70, 40, dtype=torch.float32, seed=3)
    ours = outcome(lambda x, added: add_norm(x, added, weight, 1e-5)[used], inputs, grad)
    exact = outcome(lambda x, added: plain_add_norm(x, added, weight.double(), 1e-5)[used], doubles(*inputs), grad)
    assert_near(ours, exact, 16)


def test_split_linear():
    x, weight = random(2, 77, 64, dtype=torch.bfloat16), random(3 * 40, 64, dtype=torch.bfloat16, seed=1)
    grad = random(2, 77, 120, dtype=torch.bfloat16, seed=2)
    ours = outcome(lambda x, weight: torch.cat(split_linear(x, weight, 3), dim=-1), [x, weight], grad)
    assert_near(ours, outcome(nn.functional.linear, doubles(x, weight), grad), 4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 0, 3, 8), (1, 1, 1, 2), (3, 333, 12, 64), (2, 100, 5, 66), (1, 70, 8, 128)])
def test_rotate(shape, dtype):
    x = random(*shape, dtype=dtype)
    grad = random(shape[0], shape[2], shape[1], shape[3], dtype=dtype, seed=1).transpose(1, 2)
    angle = random(*shape[:2], 1, shape[3] // 2, dtype=torch.float32, seed=2) * 100
    angles = angle.cos(), angle.sin()
    ours = outcome(lambda x: rotate(x, angles), [x], grad)
    exact = outcome(lambda x: plain_rotate(x, angles), doubles(x), grad)
    assert_near(ours, exact, 2)


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (333, 7), (70, 4097), (1000, 16_384), (33, 65_536)])
def test_softmax_of_logits(rows, width, differentiate):
    logits = random(rows, width, dtype=torch.float32) * 3
    token = torch.arange(rows, device="cuda") * 31 % width
    numerators, slope = logits.clone(), logits.clone()
    ours = [softmax_numerators(numerators), *softmax_slope(slope, token, differentiate)]
    exact_numerators, exact_slope = logits.double(), logits.double()
    exact = [plain_numerators(exact_numerators), *plain_slope(exact_slope, token, differentiate)]
    assert_near(ours, exact, 16)
    assert_near([numerators], [exact_numerators], 16)
    if differentiate:
        assert_near([slope], [exact_slope], 16)
    else:
        assert torch.equal(slope, logits)  # nothing is written that nobody needs


def test_softmax_of_rows_beyond_32_bits():
    """The last of more than 2**31 logits."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    width = 65_537
    logits = torch.empty(2**31 // width + 2, width, device="cuda")
    logits[-1] = random(width, dtype=torch.float32)
    logits[:-1] = 0.0
    exact = logits[-1:].double()
    total = softmax_numerators(logits)
    assert_near([total[-1:], logits[-1:]], [plain_numerators(exact), exact], 16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(0, 2, 8), (1, 1, 1), (333, 3, 6), (1000, 2, 1024), (70, 8, 2056)]
)
def test_rows_to_experts_and_back(tokens, top_k, width, dtype):
    expert_nk = random(tokens, 16, dtype=torch.float32).topk(top_k).indices
    assignment = Assignment.of(expert_nk, 16)
    source_a, position_nk = assignment.order_a // top_k, assignment.position_nk
    x, y = random(tokens, width, dtype=dtype), random(tokens * top_k, width, dtype=dtype, seed=1)
    there = outcome(lambda x: dispatch(x, source_a, position_nk), [x], y)
    back = outcome(lambda y: combine(y, source_a, position_nk), [y], x)
    for ours, (one, other) in ((there, (source_a[:, None], position_nk)), (back, (position_nk, source_a[:, None]))):
        first, second = (x, y) if ours is there else (y, x)
        assert_near(ours, [plain_sum_rows(first.double(), one), plain_sum_rows(second.double(), other)], 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(64, 128), (8, 16), (6, 5), (1024, 512)])
@pytest.mark.parametrize("counts", [[5, 0, 17, 300], [0, 0, 0, 129], [1, 1, 0, 0], [0, 0, 0, 0]])
def test_grouped_linear(counts, sizes, dtype):
    inner, outer = sizes
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    x, grad = random(sum(counts), inner, dtype=dtype), random(sum(counts), outer, dtype=dtype, seed=1)
    weight = random(len(counts), outer, inner, dtype=dtype, seed=2)
    ours = outcome(lambda x, weight: grouped_linear(x, weight, ends), [x, weight], grad)
    exact = outcome(lambda x, weight: loop_linear(x, weight, ends), doubles(x, weight), grad)
    assert_near(ours, exact, 16)
    assert all((of_weight == 0).all() for of_weight, count in zip(ours[2], counts, strict=True) if count == 0)


def test_a_weight_that_lies_anywhere_in_a_buffer():
    """grouped_mm wants it to start at a multiple of 16 bytes."""
    buffer = random(3 * 16 * 8 + 1, dtype=torch.bfloat16)
    weight, ends = buffer[1:].view(3, 16, 8), torch.tensor([2, 2, 9], device="cuda", dtype=torch.int32)
    x = random(9, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(grouped_linear(x, weight, ends), loop_linear(x, weight, ends))


@pytest.fixture(params=[(8, 2), (64, 8), (4, 1)], ids=str)
def layer(request: pytest.FixtureRequest) -> RoutedExperts:
    num_experts, top_k = request.param
    torch.manual_seed(0)
    layer = RoutedExperts(64, 128, num_experts, top_k)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.bfloat16().cuda()


@contextmanager
def record_logits(layer: RoutedExperts) -> Iterator[list[torch.Tensor]]:
    logits: list[torch.Tensor] = []
    hook = layer.gate.register_forward_hook(lambda _module, _args, output: logits.append(output.detach()))
    yield logits
    hook.remove()


def run(layer: RoutedExperts, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), grad)]


def test_a_layer_of_experts(layer):
    """As exact as bf16 allows, the same every time, and zero gradients for the half that no token goes to."""
    with torch.no_grad():
        layer.gate.weight[::2] = -1.0
    x, grad = random(3, 100, 64, dtype=torch.bfloat16).abs(), random(3, 100, 64, dtype=torch.bfloat16, seed=1)
    with record_logits(layer) as logits:
        ours = run(layer, x, grad)
    assert all(torch.equal(one, other) for one, other in zip(ours, run(layer, x, grad), strict=True))
    for of_weight in ours[3:]:
        assert (of_weight[::2] == 0).all()

    exact_layer = RoutedExperts(64, 128, len(layer.gate.weight), layer.top_k).cuda().double()
    exact_layer.load_state_dict(layer.state_dict())
    # Its router sees the same logits: others, not rounded, would send some tokens elsewhere.
    exact_layer.gate.register_forward_hook(lambda _module, _args, exact: exact + (logits[0].double() - exact).detach())
    for one, best in zip(ours, run(exact_layer, x.double(), grad.double()), strict=True):
        assert (one - best).norm() <= 0.02 * best.norm()


def test_nothing_waits_for_the_gpu(layer):
    x, grad = (random(3, 100, 64, dtype=torch.bfloat16, seed=i) for i in range(2))
    run(layer, x, grad)  # compiles what there is to compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_compile_once_for_any_number_of_rows(monkeypatch):
    compiled: list[object] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **compilation: compiled.append(compilation))
    angle = torch.zeros(1, 640, 1, 20, device="cuda")
    for rows in (1, 16, 17, 640):
        outcome(swiglu, [random(rows, 40, dtype=torch.bfloat16)], random(rows, 20, dtype=torch.bfloat16))
        x = random(1, rows, 3, 40, dtype=torch.bfloat16)
        outcome(lambda x, angle=angle[:, :rows]: rotate(x, (angle, angle)), [x], x)
        row, weight = random(rows, 40, dtype=torch.bfloat16), random(40, dtype=torch.bfloat16)
        outcome(partial(sum_and_norm, add_norm), [row, row, weight], random(rows, 80, dtype=torch.bfloat16))
        softmax_slope(random(rows, 40, dtype=torch.float32), torch.zeros(rows, dtype=torch.int64, device="cuda"), True)
    assert len(compiled) <= 7
