"""What is written on a GPU is what is written on the CPU, in fp32: noise is a function, and all else is arithmetic."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdseq.data.tokenizer import SpecialToken
from mdseq.diffusion.denoising import DiffusionModel
from mdseq.diffusion.estimates import Reading
from mdseq.generate.documents import Blocks, Draft, write_blocks
from mdseq.generate.sampler import MASK_PREDICT, Estimate, SamplerOptions, Samples
from tests.generate.sampling import VOCAB, Shown, every_reading, every_solver, generate, model_of, unsure

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("exact_products"),
]


def calm_model(*overrides: str) -> DiffusionModel:
    """With heads of 16, which the attention kernels take; roundings grow little from one call to the next."""
    model = model_of("model.hidden_dim=32", *overrides)
    with torch.no_grad():
        model.denoiser.output[-1].weight.mul_(0.1)
    return model


PLAIN = calm_model("diffusion.self_conditioning=0")
SELF_CONDITIONED = calm_model("diffusion.self_conditioning=0.5", "attention.num_source_global=3")
CASES: dict[str, tuple[DiffusionModel, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "guided": (SELF_CONDITIONED, {"guidance": 1.25}),  # at 1.5 a token is between two words, which roundings decide
    "patient": (SELF_CONDITIONED, {"num_calls": 12, "time_grid": "quadratic", "patience": 1, "confidence": 0.9}),
    "absorbing": (SELF_CONDITIONED, {"absorb": True, "guidance": 0.5, "patience": 2, "temperature": 0.7}),
    "rounded": (PLAIN, {"clamp": True, "threshold": 0.9}),
}


def on_gpu(model: DiffusionModel) -> DiffusionModel:
    return replace(model, denoiser=deepcopy(model.denoiser).cuda(), m_z=model.m_z.cuda())


def outcome(model: DiffusionModel, options: dict[str, Any]) -> tuple[Samples, list[Estimate], list[Tensor]]:
    """The samples, the estimates of all calls, and what the denoiser said, on the CPU."""
    seen: list[Estimate] = []
    with Shown(model) as shown:
        samples = generate(model, observe=seen.append, **options)
    assert samples.tokens_bl.device == model.m_z.device
    estimates = [replace(one, tokens_bl=one.tokens_bl.cpu(), confidence_bl=one.confidence_bl.cpu()) for one in seen]
    return Samples(samples.tokens_bl.cpu(), samples.calls_b.cpu()), estimates, [out.cpu() for out in shown.outputs]


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Numbers about 1, of which a few, between two tokens, are told apart by less than roundings grow to."""
    error = (ours - expected).abs()
    assert error.mean() <= 1e-4
    assert error.max() <= 2e-2


@every_solver
@every_reading
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_a_cpu(solver: str, reading: Reading, case: str) -> None:
    """Token by token in every call, and as sure of them, for rows of different lengths and one without a target."""
    model, options = CASES[case]
    if solver == MASK_PREDICT:  # goes by which token is likelier
        model, options = unsure(model), {key: value for key, value in options.items() if key != "absorb"}
    model, options = replace(model, reading=reading), {"solver": solver, **options}
    (ours, our_seen, our_outputs), (expected, seen, outputs) = outcome(on_gpu(model), options), outcome(model, options)
    assert torch.equal(ours.tokens_bl, expected.tokens_bl)
    assert torch.equal(ours.calls_b, expected.calls_b)
    assert len(our_seen) == len(seen) > 0
    for one, other in zip(our_seen, seen, strict=True):
        assert torch.equal(one.tokens_bl, other.tokens_bl)
        assert_close(one.confidence_bl, other.confidence_bl)
    for one, other in zip(our_outputs, outputs, strict=True):
        assert_close(one, other)


@every_reading
@pytest.mark.parametrize("is_pair", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize("blocks", [Blocks(6, 10, 0), Blocks(150, 250, 0), Blocks(500, 500, 500)], ids=str)
def test_texts_are_those_of_a_cpu(blocks: Blocks, is_pair: bool, reading: Reading) -> None:
    """Block after block, side by side, each from a front of its own; and in one piece."""
    drafts = [
        Draft(np.array([SpecialToken.BOS, *(np.arange(front) % 19 + 5)]), length, number, is_pair, blocks)
        for number, (front, length) in enumerate([(3, 31), (0, 7), (40, 20), (8, min(400, 20 * blocks.block))])
    ]
    options = SamplerOptions(num_calls=5, time_grid="quadratic", seed=3)
    model = replace(SELF_CONDITIONED, reading=reading)
    ours, expected = (
        [np.concatenate(of_text).tolist() for of_text in zip(*write_blocks(one, drafts, options, 30), strict=True)]
        for one in (on_gpu(model), model)
    )
    assert ours == expected
    assert sum(map(len, ours)) > 50
    assert max(map(max, filter(None, ours))) < VOCAB
