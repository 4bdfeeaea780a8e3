"""Training objectives compared: the same model, data and steps, and one choice changed at a time.

python -m benchmarks.objectives --data DATASET_OF_PAIRS [--steps 1400] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plain_training import PairTask, train
from mdseq.generate.sampler import MASK_PREDICT, SamplerOptions
from mdseq.spec import load_spec

MODEL = [
    "model.embedding_dim=64", "model.hidden_dim=128", "model.num_layers=2", "model.num_heads=2",
    "model.feedforward_dim=256", "attention.window=64", "attention.num_global=2", "experts.num_experts=0",
    "data.row_length=256", "data.packing=whole", "data.batch_size=16", "data.micro_batch_size=16",
    "optimiser.learning_rate=2e-3", "optimiser.ema_decay=0.999", "schedule.warmup_steps=100",
    "report.sample_interval_steps=0",
]  # fmt: skip
PUBLISHED = [
    "diffusion.objective=published", "diffusion.noise_factor=1", "diffusion.stratified=false",
    "diffusion.denoising_weight=1", "diffusion.anchor_weight=0", "diffusion.rounding_weight=1",
    "diffusion.estimate=output", "diffusion.normalise_embeddings=false",
]  # fmt: skip
ERROR = [*PUBLISHED, "diffusion.objective=target", "diffusion.stratified=true"]
SOFTMAX = ["diffusion.estimate=softmax"]
UNIFORM = ["diffusion.gamma=1", "diffusion.absorbing_schedule=uniform", "diffusion.timestep_sampling=uniform"]
SELF = "diffusion.self_conditioning=0.5"
# The first group leads from the published loss, whose noise factor and reading it keeps, towards the default; each of
# the others is one choice away from that.
VARIANTS: dict[str, list[str]] = {
    "published, no absorbing state": [*PUBLISHED, "diffusion.absorbing=false"],
    "published": PUBLISHED,
    "squared error of targets": ERROR,
    "squared error, normalised": [*ERROR, "diffusion.normalise_embeddings=true"],
    "squared error, SNR up to 5": [*ERROR, "diffusion.snr_cap=5"],
    "squared error and cross-entropy": [*ERROR, "diffusion.anchor_weight=1", "diffusion.normalise_embeddings=true"],
    "cross-entropy, read as softmax": SOFTMAX,
    "default: cross-entropy, posterior": [],
    "default, other seed": ["seed=1"],
    "not normalised": ["diffusion.normalise_embeddings=false"],
    "with rounding loss": ["diffusion.rounding_weight=1"],
    "noise factor 1": ["diffusion.noise_factor=1"],
    "noise factor 2": ["diffusion.noise_factor=2"],
    "noise factor 8": ["diffusion.noise_factor=8"],
    "self-conditioning": [SELF],
    "self-conditioning without lag": [SELF, "diffusion.self_conditioning_lag=0"],
    "condition dropout": ["diffusion.condition_dropout=0.1"],
    "uniform timesteps": ["diffusion.timestep_sampling=uniform"],
    "not stratified": ["diffusion.stratified=false"],
    "continuous time": ["diffusion.continuous_time=true"],
    "cosine": ["diffusion.noise_schedule=cosine"],
    "linear": ["diffusion.noise_schedule=linear"],
    "warm-up decay": ["diffusion.noise_schedule=warmup_decay"],
    "gamma 0": ["diffusion.gamma=0"],
    "gamma 0.25": ["diffusion.gamma=0.25"],
    "gamma 1": ["diffusion.gamma=1"],
    "gamma 1, uniform shares": UNIFORM,
    "gamma 1, uniform shares, little noise": [*UNIFORM, "diffusion.min_signal=0.53"],
    "no absorbing state": ["diffusion.absorbing=false"],
}
SAMPLERS = {
    "1 call": SamplerOptions(1, seed=1),
    "10 calls": SamplerOptions(10, seed=1),
    "10, temperature 0.5": SamplerOptions(10, seed=1, temperature=0.5),
    "10, temperature 0": SamplerOptions(10, seed=1, temperature=0.0),
    "50, temperature 0": SamplerOptions(50, seed=1, temperature=0.0),
    "50, mask_predict": SamplerOptions(50, seed=1, temperature=0.0, solver="mask_predict"),
}
GUIDANCE = (1.5, 2.0)


def measure(name: str, data: Path, overrides: list[str], num_pairs: int) -> dict[str, object]:
    """Train one variant and score it."""
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    spec = load_spec(None, [*MODEL, *VARIANTS[name], *overrides]).spec
    task = PairTask(data, "valid", num_pairs, device)
    trained = train(spec, data, device)
    model = trained.objective.model()
    samplers = {
        title: options
        for title, options in SAMPLERS.items()
        if (model.absorption.gamma if options.solver == MASK_PREDICT else not model.schedule.min_signal)
    }
    bleu = {title: task.bleu(model, options)[0] for title, options in samplers.items()}
    result: dict[str, object] = {
        "name": name,
        "seconds": trained.seconds,
        "from_noise": task.cross_entropy_from_noise(model),
        "bound": task.bound(model),
        "bleu": bleu,
        "m": trained.objective.absorbing().norm().item(),
    }
    if spec.diffusion.condition_dropout:
        guided = SAMPLERS["10, temperature 0.5"]
        result["guided"] = {w: task.bleu(model, replace(guided, guidance=w))[0] for w in GUIDANCE}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    overrides = [f"schedule.steps={options.steps}", *options.overrides]
    results = {}
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, name, options.data, overrides, options.pairs) for name in options.only]
        for future in as_completed(futures):
            result = future.result()
            results[result["name"]] = result
            print(result, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1, default=asdict))
    table = Table(
        "objective",
        "s",
        "from noise",
        "bound",
        *SAMPLERS,
        "guided, temperature 0.5",
        title="cross-entropy from pure noise, likelihood bound (nats a token), and BLEU of held-out pairs",
    )
    for name in options.only:
        row = results[name]
        table.add_row(
            name,
            f"{row['seconds']:.0f}",
            f"{row['from_noise']:.3f}",
            f"{row['bound'].value:.3f} ± {row['bound'].standard_error:.3f}",
            *(f"{row['bleu'][title]:.2f}" if title in row["bleu"] else "" for title in SAMPLERS),
            ", ".join(f"{w}: {score:.2f}" for w, score in row.get("guided", {}).items()),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
