"""The run spec: everything that decides what a run computes, validated once, in one place.

A spec is read from a TOML file, changed by `section.key=value` overrides, and checked as a whole: every problem is
reported at once, with its path, the value found, what is allowed and where the value came from. Sharding, offload and
communication are not here; they live in the ds_config (see `ds_configs/README.md`).

Importing this module needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mdseq.errors import UserError
from mdseq.settings import Resolved, Section, read_toml, resolve

SPEC_DIR = Path(__file__).resolve().parent.parent / "launcher" / "specs"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
OneWord = Annotated[str, Field(pattern=r"^\S*$")]


class ModelSpec(Section):
    """The denoiser's shape."""

    embedding_dim: Positive = Field(128, description="dimension of a token's embedding, where the diffusion happens")
    hidden_dim: Positive = Field(768, description="width of the transformer")
    num_layers: Positive = Field(12, description="transformer blocks")
    num_heads: Positive = Field(12, description="attention heads; divides hidden_dim into heads of even size")
    feedforward_dim: Positive = Field(2048, description="inner width of the SwiGLU of a block without experts")
    norm: Literal["pre", "post"] = Field("pre", description="RMSNorm before each sublayer, or after (as published)")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of features dropped in training, of what the blocks get and their sublayers add"
    )
    activation_checkpointing: Literal["none", "recompute", "offload"] = Field(
        "none",
        description="for longer rows in the same memory: keep only each block's input, on the device or in CPU memory, "
        "and compute the block again in the backward pass; the result is the same",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"model.num_heads = {self.num_heads} must divide model.hidden_dim = {self.hidden_dim} into heads of "
                f"even size (rotary positions turn pairs); set hidden_dim to a multiple of {2 * self.num_heads}"
            )
        return self


def _explain_dilation(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One sentence in place of pydantic's complaint about each of the two forms."""
    try:
        return validate(value)
    except ValidationError:
        allowed = "should be an integer of at least 1, or a list of them, such as [1, 4]: one per equal group of heads"
        raise PydanticCustomError("dilation", allowed) from None


Dilation = Annotated[Positive | Annotated[tuple[Positive, ...], Field(min_length=1)], WrapValidator(_explain_dilation)]


class AttentionSpec(Section):
    """Which positions a token may attend to, within its document.

    The gap between the keys of a window is scheduled over the layers: `dilation = [1, 1, 2, 4]` gives it layer by
    layer, and an entry that is itself a list gives one to each of as many equal groups of heads: `[1, [1, 4]]`.
    """

    kind: Literal["sparse", "full"] = Field("sparse", description="sliding window and global tokens, or everything")
    window: Positive = Field(256, description="keys per side (sparse only)")
    dilation: tuple[Dilation, ...] = Field(
        (1,), min_length=1, description="gap between the keys of a window; a list in it: of each group of heads"
    )
    dilation_schedule: Literal["repeat", "interpolate"] = Field(
        "repeat",
        description="layer i takes entry i modulo the length, or the entries are spread over the layers, first to last",
    )
    full_every: Count = Field(0, description="every n-th layer attends to the whole document; 0 for none (sparse only)")
    num_global: Count = Field(
        8, description="learned tokens per document that see, and are seen by, the whole document (sparse only)"
    )
    num_source_global: Count = Field(
        0,
        description="leading source tokens of each document that are global too, such as a question or the text to "
        "rewrite (sparse only)",
    )
    engine: Literal["auto", "reference", "dense", "banded", "fused", "flash", "flex"] = Field(
        "auto", description="implementation: auto is the fastest that can run; see docs/attention.md"
    )

    @property
    def head_groups(self) -> tuple[int, ...]:
        """How many groups of heads each entry of `dilation` makes."""
        return tuple(1 if isinstance(entry, int) else len(entry) for entry in self.dilation)

    @model_validator(mode="after")
    def _groups_interpolate(self) -> Self:
        if self.kind == "sparse" and self.dilation_schedule == "interpolate" and len(set(self.head_groups)) > 1:
            raise ValueError(
                f"attention.dilation = {_brackets(self.dilation)} has entries of {_words(self.head_groups)} groups of "
                "heads, between which attention.dilation_schedule = interpolate cannot go; give all entries as many, "
                "such as [[1, 1], [1, 4]], or set dilation_schedule = repeat"
            )
        return self


class ExpertsSpec(Section):
    """Routed experts in place of every block's feed-forward layer."""

    num_experts: Count = Field(8, description="experts per block; 0 for a dense feed-forward")
    top_k: Positive = Field(2, description="experts that a token is sent to")
    feedforward_dim: Positive = Field(1024, description="inner width of one expert's SwiGLU")
    balance_weight: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of each layer's load-balance loss")
    z_weight: Annotated[float, Field(ge=0)] = Field(0.001, description="weight of each layer's router z-loss")

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(
                f"experts.top_k = {self.top_k} must be at most experts.num_experts = {self.num_experts}; "
                "lower top_k or raise num_experts"
            )
        return self


class DiffusionSpec(Section):
    """The forward process and the training objective; docs/diffusion.md explains them."""

    noise_schedule: Literal["sqrt", "cosine", "linear", "warmup_decay"] = Field(
        "sqrt", description="signal kept at each timestep: DiffuSeq's, improved DDPM's, DDPM's, DiffuSeq-v2's"
    )
    num_timesteps: Annotated[int, Field(ge=2)] = Field(2000, description="timesteps T of the forward process")
    noise_factor: Annotated[float, Field(gt=0)] = Field(
        4.0, description="noise so many times as strong, for embeddings that are told apart too easily"
    )
    min_signal: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share alpha of the embedding below which noise takes no more of it; 0 for the whole schedule. "
        "Where gamma = 1 takes all of a target away, noise need not",
    )
    continuous_time: bool = Field(False, description="train between the T timesteps too")
    timestep_sampling: Literal["uniform", "loss_aware"] = Field(
        "loss_aware", description="how t is drawn: uniformly, or by the loss seen at each t (with its correction)"
    )
    stratified: bool = Field(
        True, description="spread the timesteps of a global batch evenly, for gradients of less variance"
    )
    absorbing: bool = Field(True, description="soft absorbing state: targets drift to a learned vector m")
    gamma: Fraction = Field(0.5, description="share of target tokens replaced by m at t = T (absorbing only)")
    absorbing_schedule: Literal["sigma", "uniform"] = Field(
        "sigma",
        description="the share at t: gamma * sigma_t (as published), or for each document anything from 0 to gamma, "
        "which is what the solver mask_predict goes through",
    )
    absorbing_weight: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of ||m|| in the loss")
    objective: Literal["target", "published"] = Field(
        "target", description="loss over target tokens only, or DiffuSeq's over every position, padding included"
    )
    denoising_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the squared error of the predicted embedding"
    )
    snr_cap: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weigh the squared error by min(signal-to-noise ratio, this); 0 for the same weight at every t"
    )
    anchor_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="weight of the cross-entropy of the tokens given the predicted embedding"
    )
    rounding_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the cross-entropy of the tokens given their own embedding, slightly noised"
    )
    estimate: Literal["output", "softmax", "posterior"] = Field(
        "posterior",
        description="what is taken for the clean embedding: the denoiser's output, or the mean under the probabilities "
        "that anchor_weight trains, by themselves or times what a noisy embedding says of its own token",
    )
    normalise_embeddings: bool = Field(True, description="all embeddings of the same length, sqrt(embedding_dim)")
    self_conditioning: Fraction = Field(
        0.0, description="share of steps in which documents are denoised with an earlier estimate at hand; 0 for none"
    )
    self_conditioning_lag: Fraction = Field(
        0.1, description="that estimate is made up to this share of T earlier, as it is while sampling"
    )
    condition_dropout: Fraction = Field(
        0.0, description="share of documents that lose their source, so that sampling can be guided by it"
    )
    source_dropout: Fraction = Field(
        0.0, description="share of all source tokens that are lost, against learning few documents by heart"
    )

    @model_validator(mode="after")
    def _loss_and_estimate_agree(self) -> Self:
        published: dict[str, Any] = {
            "noise_factor": 1.0, "min_signal": 0.0, "continuous_time": False, "stratified": False,
            "denoising_weight": 1.0, "snr_cap": 0.0, "anchor_weight": 0.0, "rounding_weight": 1.0, "estimate": "output",
            "normalise_embeddings": False, "self_conditioning": 0.0, "condition_dropout": 0.0, "source_dropout": 0.0,
        }  # fmt: skip
        changed = [key for key, value in published.items() if getattr(self, key) != value]
        if self.objective == "published" and changed:
            wanted = ", ".join(f"{key} = {str(published[key]).lower()}" for key in changed)
            raise ValueError(
                f"diffusion.objective = published is DiffuSeq's loss and nothing else; set {wanted}, or set "
                "diffusion.objective = target"
            )
        if self.estimate == "output" and not self.denoising_weight:
            raise ValueError(
                "diffusion.denoising_weight = 0 leaves diffusion.estimate = output untrained; raise denoising_weight, "
                "or set estimate = softmax or posterior"
            )
        if self.estimate != "output" and not self.anchor_weight:
            raise ValueError(
                f"diffusion.estimate = {self.estimate} needs probabilities of tokens, which diffusion.anchor_weight "
                "= 0 leaves untrained; raise anchor_weight, or set estimate = output"
            )
        if self.estimate == "posterior" and self.denoising_weight:
            raise ValueError(
                f"diffusion.denoising_weight = {self.denoising_weight} trains an output that diffusion.estimate = "
                "posterior does not take for an embedding; set denoising_weight = 0"
            )
        return self


class DataSpec(Section):
    """The dataset, and how documents become rows."""

    path: str = Field("", description="folder made by `make prep` (also --data)")
    row_length: Annotated[int, Field(ge=8)] = Field(4096, description="tokens per row")
    packing: Literal["split", "whole"] = Field(
        "split", description="cut documents at row ends (no padding), or keep each whole (for source-target pairs)"
    )
    shuffle_window: Positive = Field(
        65_536,
        description="rows that are shuffled together: more mix better, fewer fit into memory while they are read",
    )
    mixture: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="weight of each source in the rows, 0 for none; default: the dataset's, or all rows alike"
    )
    lengths_of: tuple[str, ...] = Field(
        (),
        description="sources whose lengths generation predicts from, such as the pairs as they are, without reversed "
        "or sampled ones; default: all",
    )
    max_prefix: Fraction = Field(
        0.5, description="half of the texts keep a prefix of up to this share clean, to learn to continue; 0 for none"
    )
    max_suffix: Fraction = Field(
        0.25, description="half of the texts keep a suffix of up to this share clean, to learn to fill gaps; 0 for none"
    )
    batch_size: Positive = Field(16, description="rows per optimiser step, over all ranks")
    micro_batch_size: Positive = Field(1, description="rows per forward pass of one rank")

    @field_validator("lengths_of", mode="before")
    @classmethod
    def _one_source(cls, sources: object) -> object:
        return (sources,) if isinstance(sources, str) else sources

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"data.batch_size = {self.batch_size} must be a multiple of data.micro_batch_size = "
                f"{self.micro_batch_size}"
            )
        return self


class OptimiserSpec(Section):
    """AdamW, gradient clipping, precision and the average of the weights."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay of Adam's moments"
    )
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 for none")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9999, description="decay of the average of the weights that generation uses; ramps up over the first steps"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the forward and backward pass; with bf16, a GPU multiplies in TF32 what stays in fp32, such as "
        "scores of the vocabulary",
    )


class ScheduleSpec(Section):
    """How long to train, and the learning rate over time."""

    steps: Positive = Field(50_000, description="optimiser steps")
    warmup_steps: Count = Field(500, description="steps of linear warm-up")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="shape after the warm-up")
    final_fraction: Fraction = Field(0.0, description="learning rate at the end, as a share of the peak")


class CheckpointSpec(Section):
    """When to save."""

    interval_steps: Positive = Field(1000, description="steps between checkpoints; the last step is always saved")
    keep_last: Positive = Field(2, description="checkpoints kept")
    keep_every_steps: Count = Field(0, description="also keep those of every so many steps; 0 for none")
    keep_best: Count = Field(0, description="also keep so many with the lowest held-out loss")
    background: bool = Field(True, description="write while training goes on; takes memory for one copy of the state")


class GuardSpec(Section):
    """What not to let happen to a run."""

    spike_factor: Annotated[float, Field(ge=0)] = Field(
        10.0, description="skip steps whose loss or gradient norm exceeds so many times the median of late; 0 for none"
    )
    max_skipped: Positive = Field(20, description="steps skipped in a row, beyond which the run stops")
    arrival_seconds: Positive = Field(600, description="how long the ranks wait for each other at the start")
    start_seconds: Positive = Field(
        1500, description="how long the preparations may take, from when all ranks are there, and then the first step"
    )
    hang_seconds: Positive = Field(600, description="time without a step, after the first, that ends the run")


class ReportSpec(Section):
    """What to show while training."""

    log_interval_steps: Positive = Field(10, description="steps between progress lines and metrics")
    sample_interval_steps: Count = Field(1000, description="steps between samples; 0 for none")
    valid_interval_steps: Count = Field(
        1000, description="steps between losses of held-out rows, if the dataset has any; 0 for none"
    )
    valid_rows: Positive = Field(64, description="held-out rows, rounded up to whole batches")
    num_samples: Positive = Field(2, description="texts per sample")
    sample_length: Annotated[int, Field(ge=2)] = Field(128, description="tokens per sample of a model of texts")
    sample_solver_steps: Positive = Field(20, description="denoiser calls per sample")


class SlurmSpec(Section):
    """What every job asks Slurm for."""

    partition: OneWord = Field("", description="partition")
    account: OneWord = Field("", description="account")
    qos: OneWord = Field("", description="quality of service")
    setup: tuple[str, ...] = Field((), description='shell lines to run first, such as ["module load cuda"]')

    def named(self) -> dict[str, str]:
        """Those of the first three that are given, by their names."""
        values = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return {key: value for key, value in values.items() if value}


class ClusterSpec(SlurmSpec):
    """What `make submit` asks Slurm for; what is empty, or 0, is the cluster's default. See docs/clusters.md."""

    cpu_partition: OneWord = Field("", description="partition of jobs that build data; empty: as partition")
    nodes: Positive = Field(1, description="nodes")
    gpus_per_node: Count = Field(8, description="GPUs of a node, one process each; 0 for nodes without")
    ranks_per_node: Positive = Field(1, description="processes of a node without GPUs")
    cpus_per_node: Count = Field(0, description="CPUs of a node; 0: whole nodes, which nobody else shares")
    memory_gb_per_node: Annotated[float, Field(ge=0)] = Field(0.0, description="memory of a node; 0: all of it")
    time_minutes: Annotated[int, Field(ge=1)] = Field(
        1440, description="time limit of a job; an unfinished run is saved before it, and the job queued again"
    )
    save_seconds: Annotated[int, Field(ge=60)] = Field(
        300, description="how long before the time limit the run is told to save"
    )
    restarts: Count = Field(3, description="of a run that crashes, within one job")
    options: tuple[Annotated[str, Field(pattern=r"^--[a-z-]+(=[^\n]*)?$")], ...] = Field(
        (), description='more options of sbatch, such as ["--constraint=h100", "--exclude=n13"]'
    )
    network: OneWord = Field("", description="network interface between nodes, such as ib0; empty: by their addresses")
    container: str = Field("", description="image to run in: what pyxis or apptainer calls it; empty: none")
    container_runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="what starts the container")
    container_mounts: tuple[str, ...] = Field(
        (), description="more folders that the container sees; the checkout, the data and the run folder always are"
    )
    scratch: str = Field(
        "",
        description="folder on each node's own disk, to which the dataset is copied, and where caches go; empty: none",
    )
    preflight: bool = Field(False, description="check the nodes before the run")

    @property
    def ranks_of_node(self) -> int:
        """Processes of a node."""
        return self.gpus_per_node or self.ranks_per_node

    @property
    def num_ranks(self) -> int:
        """World size."""
        return self.nodes * self.ranks_of_node

    @model_validator(mode="after")
    def _time_to_save(self) -> Self:
        if self.save_seconds >= 60 * self.time_minutes:
            raise ValueError(
                f"cluster.save_seconds = {self.save_seconds} leaves nothing of cluster.time_minutes = "
                f"{self.time_minutes}; lower it, or raise time_minutes"
            )
        return self


class RunSpec(Section):
    """One run, whole."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="key of every random draw")
    model: ModelSpec = ModelSpec()
    attention: AttentionSpec = AttentionSpec()
    experts: ExpertsSpec = ExpertsSpec()
    diffusion: DiffusionSpec = DiffusionSpec()
    data: DataSpec = DataSpec()
    optimiser: OptimiserSpec = OptimiserSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    guard: GuardSpec = GuardSpec()
    report: ReportSpec = ReportSpec()
    cluster: ClusterSpec = ClusterSpec()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = [
            *self._samples_of_too_many_steps(),
            *self._heads_that_do_not_divide(),
            *self._checkpoints_that_cannot_be_judged(),
        ]
        if problems:
            raise ValidationError.from_exception_data(
                "RunSpec",
                [InitErrorDetails(type="value_error", input=None, ctx={"error": ValueError(it)}) for it in problems],
            )
        return self

    def _samples_of_too_many_steps(self) -> Iterator[str]:
        if self.report.sample_interval_steps and self.report.sample_solver_steps > self.diffusion.num_timesteps:
            yield (
                f"report.sample_solver_steps = {self.report.sample_solver_steps} must be at most "
                f"diffusion.num_timesteps = {self.diffusion.num_timesteps}; lower it, or set sample_interval_steps = 0"
            )

    def _checkpoints_that_cannot_be_judged(self) -> Iterator[str]:
        saved, judged = self.checkpoint.interval_steps, self.report.valid_interval_steps
        if self.checkpoint.keep_best and (not judged or saved % judged):
            yield (
                f"checkpoint.keep_best needs a held-out loss at every checkpoint, and report.valid_interval_steps = "
                f"{judged} does not divide checkpoint.interval_steps = {saved}; change one of them, or set "
                "keep_best = 0"
            )

    def _heads_that_do_not_divide(self) -> Iterator[str]:
        num_heads, groups = self.model.num_heads, self.attention.head_groups
        wrong = sorted({count for count in groups if num_heads % count})
        if self.attention.kind == "sparse" and wrong:
            allowed = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
            yield (
                f"attention.dilation = {_brackets(self.attention.dilation)} makes {_words(wrong)} groups of heads, "
                f"into which model.num_heads = {num_heads} does not divide; give entries of {_words(allowed)} "
                "dilations, or change num_heads"
            )


def _brackets(value: Any) -> str:
    """Nested tuples as TOML writes them."""
    return f"[{', '.join(map(_brackets, value))}]" if isinstance(value, tuple) else str(value)


def _words(numbers: Iterable[int]) -> str:
    """`1, 2 or 4`"""
    *others, last = map(str, sorted(set(numbers)))
    return f"{', '.join(others)} or {last}" if others else last


def load_spec(path: Path | None, overrides: Iterable[str] = ()) -> Resolved[RunSpec]:
    """Read a spec file, apply `section.key=value` overrides and validate the result.

    Args:
        path: A TOML file, the bare name of a preset in `launcher/specs/`, or None for the defaults.
        overrides: Values in TOML syntax; what is not TOML is taken as a string.

    Raises:
        UserError: Naming every problem of the file and the overrides at once.
    """
    values: dict[str, Any] = read_toml(_spec_file(path)) if path is not None else {}
    return resolve(RunSpec, "run spec", path, values, overrides)


def preset_names() -> list[str]:
    """The specs that ship with mdseq."""
    return sorted(path.stem for path in SPEC_DIR.glob("*.toml"))


def _spec_file(path: Path) -> Path:
    if path.is_file():
        return path
    preset = SPEC_DIR / f"{path}.toml"
    if not preset.is_file():
        raise UserError(f"no spec at {path}; give a TOML file or one of the presets {', '.join(preset_names())}")
    return preset
