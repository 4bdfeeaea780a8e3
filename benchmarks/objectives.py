"""Training objectives compared: the same model, data and steps, and one choice changed at a time.

python -m benchmarks.objectives --data DATASET_OF_PAIRS [--steps 3000] [--workers 4]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.plain_training import PairTask, train
from mdseq.generate.sampler import SamplerOptions
from mdseq.spec import load_spec

MODEL = [
    "model.embedding_dim=128", "model.hidden_dim=256", "model.num_layers=4", "model.num_heads=4",
    "model.feedforward_dim=768", "attention.window=64", "attention.num_global=2", "experts.num_experts=0",
    "data.row_length=256", "data.packing=whole", "data.batch_size=32", "data.micro_batch_size=32",
    "optimiser.learning_rate=1e-3", "optimiser.ema_decay=0.999", "schedule.warmup_steps=200",
    "report.sample_interval_steps=0",
]  # fmt: skip
PUBLISHED = ["diffusion.objective=published", "diffusion.stratified=false"]
ERROR = [
    "diffusion.objective=target", "diffusion.denoising_weight=1", "diffusion.anchor_weight=0",
    "diffusion.rounding_weight=1", "diffusion.normalise_embeddings=false", "diffusion.self_conditioning=0",
    "diffusion.condition_dropout=0", "diffusion.snr_cap=0", "diffusion.stratified=true",
]  # fmt: skip
ANCHOR = [*ERROR, "diffusion.anchor_weight=1", "diffusion.normalise_embeddings=true"]
SELF = "diffusion.self_conditioning=0.5"
VARIANTS: dict[str, list[str]] = {
    "published, no absorbing state": [*PUBLISHED, "diffusion.absorbing=false"],
    "published": PUBLISHED,
    "squared error of targets": ERROR,
    "... normalised": [*ERROR, "diffusion.normalise_embeddings=true"],
    "... and cross-entropy": [*ERROR, "diffusion.anchor_weight=1"],
    "... and cross-entropy, normalised (A)": ANCHOR,
    "cross-entropy alone, normalised": [*ANCHOR, "diffusion.denoising_weight=0"],
    "A, no rounding loss": [*ANCHOR, "diffusion.rounding_weight=0"],
    "A, SNR up to 5": [*ANCHOR, "diffusion.snr_cap=5"],
    "A, self-conditioning": [*ANCHOR, SELF],
    "A, self-conditioning without lag": [*ANCHOR, SELF, "diffusion.self_conditioning_lag=0"],
    "A, condition dropout": [*ANCHOR, "diffusion.condition_dropout=0.1"],
    "A, uniform timesteps": [*ANCHOR, "diffusion.timestep_sampling=uniform"],
    "A, not stratified": [*ANCHOR, "diffusion.stratified=false"],
    "A, continuous time": [*ANCHOR, "diffusion.continuous_time=true"],
    "A, cosine": [*ANCHOR, "diffusion.noise_schedule=cosine"],
    "A, linear": [*ANCHOR, "diffusion.noise_schedule=linear"],
    "A, warm-up decay": [*ANCHOR, "diffusion.noise_schedule=warmup_decay"],
    "A, gamma 0": [*ANCHOR, "diffusion.gamma=0"],
    "A, no absorbing state": [*ANCHOR, "diffusion.absorbing=false"],
}
CALLS = (2, 5, 10, 20, 100)


def measure(name: str, data: Path, overrides: list[str], num_pairs: int) -> dict[str, object]:
    """Train one variant and score it."""
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    spec = load_spec(None, [*MODEL, *VARIANTS[name], *overrides]).spec
    task = PairTask(data, "valid", num_pairs, device)
    trained = train(spec, data, device)
    model = trained.objective.model()
    bleu = {calls: task.bleu(model, SamplerOptions(calls, seed=1))[0] for calls in CALLS}
    result: dict[str, object] = {
        "name": name,
        "seconds": trained.seconds,
        "cross_entropy": task.cross_entropy(model),
        "bleu": bleu,
        "m": trained.objective.absorbing().norm().item(),
    }
    if spec.diffusion.condition_dropout:
        guided = (1.5, 2.0)
        result["guided"] = {w: task.bleu(model, SamplerOptions(20, seed=1, guidance=w))[0] for w in guided}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
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
            print(json.dumps(result), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    table = Table("objective", "s", "cross-entropy", *(f"BLEU, {calls} calls" for calls in CALLS), "guided")
    for name in options.only:
        row = results[name]
        table.add_row(
            name,
            f"{row['seconds']:.0f}",
            f"{row['cross_entropy']:.3f}",
            *(f"{row['bleu'][calls]:.2f}" for calls in CALLS),
            ", ".join(f"{w}: {score:.2f}" for w, score in row.get("guided", {}).items()),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
