"""The bound on the likelihood that a GPU finds is the one that the CPU finds, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdseq.diffusion.estimates import READINGS, Reading
from mdseq.evaluate.likelihood import PROCESSES, LikelihoodOptions, Process, Scorer
from mdseq.model.saved import load_model
from tests.evaluate.test_likelihood import saved_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("exact_products"),
]

# Heads of 16, which the attention kernels take; every token meets all experts, so that no rounding sends it to others.
WIDER = ["model.hidden_dim=32", "experts.top_k=4"]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("kind", "self_conditioning"), [("text", 0), ("pair", 0.5)])
def test_the_bound_is_that_of_a_cpu(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    self_conditioning: float,
    reading: Reading,
    process: Process,
) -> None:
    data = request.getfixturevalue(f"{kind}_dataset")
    run = saved_model(tmp_path / "run", data, kind, *WIDER, f"diffusion.self_conditioning={self_conditioning}")
    options = LikelihoodOptions(num_documents=6, num_levels=4, reading=reading, process=process)

    def score_on(device: str) -> dict[str, Any]:
        saved = load_model(run, device)
        with torch.no_grad():
            saved.denoiser.output[-1].weight.mul_(30)  # nothing is learned, but something is said
        return Scorer.of(saved, data, "train", options).score().to_dict()

    ours, expected = score_on("cuda"), score_on("cpu")
    for name, measure in expected.items():
        assert ours[name] == (pytest.approx(measure, rel=1e-4) if isinstance(measure, dict) else measure), name
