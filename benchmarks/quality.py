"""Quality after minutes of training: a run of pairs through the real engine, scored as published systems are.

    python -m benchmarks.quality --data DATASET_OF_PAIRS --minutes 8 [--models ours diffuseq] [section.key=value ...]

A short run finds how fast a model trains here, and so how many steps the minutes hold; the run itself is one process of
launcher/run.py. The sampler's settings are those that score best on held-out pairs; the test split is scored once with
them: BLEU-4 over whitespace tokens, unsmoothed, lengths predicted from the source, one candidate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sacrebleu
import torch
from rich.console import Console
from rich.table import Table

from mdseq.cli.weights import load_run
from mdseq.data.corpus import Corpus
from mdseq.data.tokenizer import SpecialToken
from mdseq.errors import UserError, exit_status
from mdseq.evaluate.likelihood import LikelihoodOptions, Measure, Scorer
from mdseq.evaluate.rows import ScoredRows
from mdseq.generate.prompts import PREDICTED, Prompt, Quantile
from mdseq.generate.sampler import SamplerOptions
from mdseq.generate.text import TextGenerator
from mdseq.spec import load_spec

ROOT = Path(__file__).parent.parent
PAIRS = load_spec(Path("pairs")).spec
SIZES = ("hidden_dim", "num_layers", "num_heads", "feedforward_dim")
SHAPE = [
    *(f"model.{size}={getattr(PAIRS.model, size)}" for size in SIZES),
    "data.row_length=288", "data.packing=whole", "data.batch_size=228", "data.micro_batch_size=228",
    "schedule.warmup_steps=300", "checkpoint.interval_steps=1000000", "checkpoint.keep_last=1",
    "report.sample_interval_steps=0", "report.valid_rows=256", "report.log_interval_steps=50",
]  # fmt: skip
MODELS: dict[str, list[str]] = {
    "ours": ["--spec", "pairs", *SHAPE],
    "diffuseq": [
        "--spec", "diffuseq", *SHAPE, "optimiser.learning_rate=3e-4", "optimiser.ema_decay=0.999",
        "optimiser.precision=bf16",
    ],
}  # fmt: skip
MEDIAN = 0.5
# The sampler, and which quantile of the lengths that targets of such a source have is written.
SETTINGS: dict[str, list[tuple[SamplerOptions, float]]] = {
    "ours": [
        (SamplerOptions(20, solver="mask_predict", temperature=0.0), MEDIAN),
        (SamplerOptions(50, solver="mask_predict", temperature=0.0), MEDIAN),
        (SamplerOptions(50, solver="mask_predict", temperature=0.0), 0.45),
        (SamplerOptions(50, solver="mask_predict", temperature=0.0), 0.4),
    ],
    "diffuseq": [
        (SamplerOptions(20), MEDIAN),
        (SamplerOptions(20, temperature=0.0), MEDIAN),
        (SamplerOptions(200, solver="ddpm", clamp=True), MEDIAN),
    ],
}
PROBE_STEPS = 150  # the first third is start-up
LOADING_SHARE = 0.02  # of the minutes, for what stands between the steps


@dataclass(frozen=True)
class Score:
    """One model, trained and scored.

    Attributes:
        minutes: Of training, from the first step to the last.
        bound: Nats per target token of held-out pairs.
        chosen: Setting that is best on held-out pairs, as `describe` puts it.
        valid_bleu: Of each setting on held-out pairs.
        test_bleu: With the chosen.
        pairs_per_second: Written on the test split.
    """

    name: str
    steps: int
    tokens: int
    minutes: float
    parameters: int
    bound: Measure
    chosen: str
    valid_bleu: dict[str, float]
    test_bleu: float
    pairs_per_second: float


class Pairs:
    """Sources and references of a split.

    Attributes:
        sources, references: Texts.
        lengths: Tokens of the references.
        length_error: Mean absolute error of the predicted lengths, tokens.
    """

    def __init__(self, data: Path, split: str, generator: TextGenerator, at_most: int | None = None) -> None:
        corpus = Corpus.open(data, split)
        count = min(at_most or corpus.num_documents, corpus.num_documents)
        assert generator.lengths is not None
        self.generator = generator
        self.sources: list[str] = []
        self.lengths: list[int] = []
        self.references: list[str] = []
        errors: list[int] = []
        for document in np.linspace(0, corpus.num_documents - 1, count).astype(int):
            tokens, start = corpus.tokens(int(document)).astype(np.int64), corpus.target_start(int(document))
            source, target = (self._text(part) for part in (tokens[:start], tokens[start:]))
            self.sources.append(source)
            self.references.append(target)
            self.lengths.append(len(tokens) - start)
            errors.append(abs(generator.lengths.at(tokens[:start], MEDIAN) - self.lengths[-1]))
        self.length_error = float(np.mean(errors))

    def bleu(self, options: SamplerOptions, quantile: float | None, batch_size: int = 256) -> float:
        """Of texts whose length is this quantile of what is predicted; None for the length of the reference."""
        prompts = [
            Prompt(source, length if quantile is None else Quantile(quantile), index)
            for index, (source, length) in enumerate(zip(self.sources, self.lengths, strict=True))
        ]
        texts = self.generator.generate(prompts, options, batch_size)
        found = [" ".join(text.split()) for text in texts]
        wanted = [" ".join(text.split()) for text in self.references]
        return sacrebleu.corpus_bleu(found, [wanted], tokenize="none", smooth_method="none", force=True).score

    def _text(self, tokens: np.ndarray) -> str:
        return self.generator.tokenizer.decode(tokens[tokens >= len(SpecialToken)])


def train(name: str, options: argparse.Namespace, output: Path, steps: int) -> list[dict]:
    """A run's metrics, logged line by line."""
    log = output.with_suffix(".log")
    command = [
        sys.executable, str(ROOT / "launcher" / "run.py"), "--ds_config", str(options.ds_config), "--data",
        str(options.data), "--output", str(output), "--resume", "never", *MODELS[name], *options.overrides,
        f"schedule.steps={steps}",
    ]  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as to:
        status = subprocess.run(command, stdout=to, stderr=subprocess.STDOUT).returncode
    if status:
        raise UserError(f"training of {name} ended with status {status}; the end of {log} is\n{_tail(log)}")
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-25:])


def steps_within(name: str, options: argparse.Namespace) -> int:
    """Steps that the minutes hold, by a short run."""
    logged = "report.log_interval_steps=10"
    probe = argparse.Namespace(**{**vars(options), "overrides": [*options.overrides, logged]})
    metrics = train(name, probe, options.output / f"{name}-probe", PROBE_STEPS)
    late = [line for line in metrics if line["step"] > PROBE_STEPS // 3 and "valid_loss" not in line]
    tokens_a_step = metrics[-1]["tokens"] / metrics[-1]["step"]
    rate = float(np.median([line["tokens_per_second"] for line in late]))
    return max(1, int(60 * options.minutes * (1 - LOADING_SHARE) * rate / tokens_a_step))


def measure(name: str, options: argparse.Namespace) -> Score:
    steps = options.steps or steps_within(name, options)
    run = options.output / name
    started = time.perf_counter()
    metrics = train(name, options, run, steps)
    print(f"{name}: {steps:,} steps, {(time.perf_counter() - started) / 60:.1f} min with start and end", flush=True)
    for line in [line for line in metrics if "valid_loss" in line]:
        print(f"  step {line['step']:,}: loss {line['loss']:.3f} valid {line['valid_loss']:.3f}", flush=True)
    seconds = sum(
        (after["tokens"] - before["tokens"]) / after["tokens_per_second"]
        for before, after in itertools.pairwise(metrics)
        if after["tokens_per_second"]
    )
    saved = load_run(run)
    generator = TextGenerator.of(saved)
    held_out = Pairs(options.data, "valid", generator, options.pairs)
    bleu: dict[str, float] = {}
    for setting in SETTINGS[name]:
        bleu[describe(*setting)] = held_out.bleu(*setting)
        print(f"  {describe(*setting)}: valid BLEU {bleu[describe(*setting)]:.2f}", flush=True)
    chosen, quantile = max(SETTINGS[name], key=lambda setting: bleu[describe(*setting)])
    print(f"  with the lengths of the references: {held_out.bleu(chosen, None):.2f}", flush=True)
    test = Pairs(options.data, options.score, generator, options.test_pairs)
    errors = f"{held_out.length_error:.2f} on held-out pairs, {test.length_error:.2f} on {options.score}"
    print(f"  mean error of predicted lengths, tokens: {errors}", flush=True)
    started = time.perf_counter()
    test_bleu = test.bleu(chosen, quantile)
    rate = len(test.sources) / (time.perf_counter() - started)
    shown = [Prompt(source, PREDICTED, index) for index, source in enumerate(test.sources[:3])]
    for prompt, text in zip(shown, generator.generate(shown, chosen), strict=True):
        print(f"    {prompt.source!r}\n -> {text!r}", flush=True)
    corpus = Corpus.open(options.data, "valid")
    documents = np.linspace(0, corpus.num_documents - 1, min(256, options.pairs)).astype(int)
    rows = ScoredRows.of(corpus, documents, row_length=2**20)
    scorer = Scorer(generator.model, generator.tokenizer, corpus, rows, LikelihoodOptions(num_levels=16, batch_size=64))
    return Score(
        name=name,
        steps=steps,
        tokens=metrics[-1]["tokens"],
        minutes=seconds / 60,
        parameters=sum(parameter.numel() for parameter in saved.denoiser.parameters()),
        bound=scorer.score().nats_per_token,
        chosen=describe(chosen, quantile),
        valid_bleu=bleu,
        test_bleu=test_bleu,
        pairs_per_second=rate,
    )


def describe(options: SamplerOptions, quantile: float) -> str:
    changed = {key: value for key, value in asdict(options).items() if value != getattr(SamplerOptions(), key)}
    changed.pop("num_calls", None)
    if quantile != MEDIAN:
        changed["length quantile"] = quantile
    return ", ".join([f"{options.num_calls} calls", *(f"{key} {value}" for key, value in changed.items())])


def table_of(scores: Sequence[Score]) -> Table:
    table = Table(title="test BLEU-4 (whitespace tokens), one candidate, predicted lengths", title_justify="left")
    names = ["model", "parameters", "steps", "M tokens", "min", "bound, nats", "sampler", "valid", "test", "pairs/s"]
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "sampler") else "right")
    for score in scores:
        table.add_row(
            score.name, f"{score.parameters / 1e6:.1f} M", f"{score.steps:,}", f"{score.tokens / 1e6:.0f}",
            f"{score.minutes:.1f}", f"{score.bound.value:.2f} ± {score.bound.standard_error:.2f}",
            score.chosen, f"{max(score.valid_bleu.values()):.2f}", f"{score.test_bleu:.2f}",
            f"{score.pairs_per_second:.0f}",
        )  # fmt: skip
    return table


def run(options: argparse.Namespace) -> None:
    if not options.data.is_dir():
        raise UserError(f"no dataset at {options.data}; build one of pairs with python -m data_prep")
    scores = []
    for name in options.models:
        scores.append(measure(name, options))
        if options.json:
            options.json.write_text(json.dumps([asdict(score) for score in scores], indent=1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    console = Console() if Console().is_terminal else Console(width=140)
    console.print(f"{device}, torch {torch.__version__}", table_of(scores), sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a dataset of pairs with splits train, valid and test")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, for each model; default 8")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs to choose the sampler by")
    parser.add_argument("--score", default="test", metavar="SPLIT", help="the split that is scored; default test")
    parser.add_argument("--test_pairs", type=int, help="of that split; default: all")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "cpu.json")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to both specs")
    options = parser.parse_intermixed_args(arguments)
    return exit_status(lambda: run(options), "stopped")


if __name__ == "__main__":
    raise SystemExit(main())
