"""The run spec: everything that decides what a run computes, validated once, in one place.

A spec is read from a TOML file, changed by `section.key=value` overrides, and checked as a whole: every problem is
reported at once, with its path, the value found, what is allowed and where the value came from. Sharding, offload and
communication are not here; they live in the ds_config (see `ds_configs/README.md`).

Importing this module needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mdseq.errors import UserError

SPEC_DIR = Path(__file__).resolve().parent.parent / "launcher" / "specs"

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of the spec; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Section):
    """The denoiser's shape."""

    embedding_dim: Positive = Field(128, description="dimension of a token's embedding, where the diffusion happens")
    hidden_dim: Positive = Field(768, description="width of the transformer")
    num_layers: Positive = Field(12, description="transformer blocks")
    num_heads: Positive = Field(12, description="attention heads; divides hidden_dim into heads of even size")
    feedforward_dim: Positive = Field(2048, description="inner width of the SwiGLU of a block without experts")
    norm: Literal["pre", "post"] = Field("pre", description="RMSNorm before each sublayer, or after (as published)")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"model.num_heads = {self.num_heads} must divide model.hidden_dim = {self.hidden_dim} into heads of "
                f"even size (rotary positions turn pairs); set hidden_dim to a multiple of {2 * self.num_heads}"
            )
        return self


class AttentionSpec(Section):
    """Which positions a token may attend to, within its document."""

    kind: Literal["sparse", "full"] = Field("sparse", description="sliding window and global tokens, or everything")
    window: Positive = Field(256, description="keys per side (sparse only)")
    dilation: tuple[Positive, ...] = Field(
        (1,), min_length=1, description="gap between the keys of a window; layer i takes entry i modulo the length"
    )
    num_global: Annotated[int, Field(ge=0)] = Field(
        8, description="learned tokens per document that see, and are seen by, the whole document"
    )
    engine: Literal["auto", "banded", "reference"] = Field(
        "auto", description="implementation; reference is the dense definition, for checking"
    )


class ExpertsSpec(Section):
    """Routed experts in place of every block's feed-forward layer."""

    num_experts: Annotated[int, Field(ge=0)] = Field(8, description="experts per block; 0 for a dense feed-forward")
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
    """The forward process and the training objective."""

    num_timesteps: Annotated[int, Field(ge=2)] = Field(2000, description="steps T of the forward process")
    noise_schedule: Literal["sqrt"] = Field("sqrt", description="signal kept at each step (DiffuSeq's sqrt)")
    objective: Literal["target", "published"] = Field(
        "target", description="loss over target tokens only, or DiffuSeq's over every position, padding included"
    )
    absorbing: bool = Field(True, description="soft absorbing state: targets drift to a learned vector m")
    gamma: Fraction = Field(0.5, description="share of target tokens replaced by m at t = T (absorbing only)")
    absorbing_weight: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of ||m|| in the loss")
    timestep_sampling: Literal["uniform", "loss_aware"] = Field(
        "loss_aware", description="how t is drawn: uniformly, or by the loss seen at each t (with its correction)"
    )


class DataSpec(Section):
    """The dataset, and how documents become rows."""

    path: str = Field("", description="folder made by `make prep` (also --data)")
    row_length: Annotated[int, Field(ge=8)] = Field(4096, description="tokens per row")
    packing: Literal["split", "whole"] = Field(
        "split", description="cut documents at row ends (no padding), or keep each whole (for source-target pairs)"
    )
    max_prefix: Fraction = Field(
        0.5, description="half of the texts keep a prefix of up to this share clean, to learn to continue; 0 for none"
    )
    batch_size: Positive = Field(16, description="rows per optimiser step, over all ranks")
    micro_batch_size: Positive = Field(1, description="rows per forward pass of one rank")

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
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward and backward pass")


class ScheduleSpec(Section):
    """How long to train, and the learning rate over time."""

    steps: Positive = Field(50_000, description="optimiser steps")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(500, description="steps of linear warm-up")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="shape after the warm-up")
    final_fraction: Fraction = Field(0.0, description="learning rate at the end, as a share of the peak")


class CheckpointSpec(Section):
    """When to save."""

    interval_steps: Positive = Field(1000, description="steps between checkpoints; the last step is always saved")
    keep_last: Positive = Field(2, description="checkpoints kept")


class ReportSpec(Section):
    """What to show while training."""

    log_interval_steps: Positive = Field(10, description="steps between progress lines and metrics")
    sample_interval_steps: Annotated[int, Field(ge=0)] = Field(1000, description="steps between samples; 0 for none")
    num_samples: Positive = Field(2, description="texts per sample")
    sample_length: Annotated[int, Field(ge=2)] = Field(128, description="tokens per unconditional sample")
    sample_solver_steps: Positive = Field(20, description="denoiser calls per sample")


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
    report: ReportSpec = ReportSpec()

    @model_validator(mode="after")
    def _sample_steps_exist(self) -> Self:
        if self.report.sample_interval_steps and self.report.sample_solver_steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"report.sample_solver_steps = {self.report.sample_solver_steps} must be at most "
                f"diffusion.num_timesteps = {self.diffusion.num_timesteps}; lower it, or set sample_interval_steps = 0"
            )
        return self

    def to_toml(self) -> str:
        """The whole spec, defaults included, as TOML that `load_spec` reads back."""
        return tomli_w.dumps(self.model_dump(mode="json"))


@dataclass(frozen=True)
class ResolvedSpec:
    """A spec and where each of its values came from.

    `origins` maps a dotted path to "file" or "command line"; what it lacks is a default.
    """

    spec: RunSpec
    origins: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(path, value, origin) of every value, in the order of the spec."""
        leaves = flatten(self.spec.model_dump(mode="json"))
        return [(path, str(value), self.origins.get(path, "default")) for path, value in leaves.items()]


def load_spec(path: Path | None, overrides: Iterable[str] = ()) -> ResolvedSpec:
    """Read a spec file, apply `section.key=value` overrides and validate the result.

    Args:
        path: A TOML file, the bare name of a preset in `launcher/specs/`, or None for the defaults.
        overrides: Values in TOML syntax; what is not TOML is taken as a string.

    Raises:
        UserError: Naming every problem of the file and the overrides at once.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        values = _read_toml(path)
        origins = dict.fromkeys(flatten(values), "file")
    for override in overrides:
        key, value = _parse_override(override)
        _assign(values, key, value, override)
        origins[key] = "command line"
    try:
        spec = RunSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error, path, origins)) from None
    return ResolvedSpec(spec, origins)


def preset_names() -> list[str]:
    """The specs that ship with mdseq."""
    return sorted(path.stem for path in SPEC_DIR.glob("*.toml"))


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        preset = SPEC_DIR / f"{path}.toml"
        if not preset.is_file():
            raise UserError(f"no spec at {path}; give a TOML file or one of the presets {', '.join(preset_names())}")
        path = preset
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r} is not of the form section.key=value, for example schedule.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip(), value


def _assign(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {section} is a single value, not a section")
        values = inner
    values[leaf] = value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted paths."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def _known_paths() -> list[str]:
    return list(flatten(RunSpec().model_dump()))


def _describe(error: ValidationError, path: Path | None, origins: Mapping[str, str]) -> str:
    """One paragraph a problem: path, value, origin, what is allowed and the fix."""
    problems = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"])
        if item["type"] == "value_error":  # a check over several keys: its message names them itself
            problems.append(f"  {item['ctx']['error']}")
            continue
        origin = origins.get(location) or _nearby_origin(location, origins)
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(location, [*RunSpec.model_fields, *_known_paths()], n=1)
            advice = f"did you mean {close[0]}?" if close else "remove it; `--dry_run` lists every key"
            problems.append(f"  {location} (from {origin}) is not a key of the run spec; {advice}")
        else:
            allowed = item["msg"].removeprefix("Input ")
            problems.append(f"  {location} = {item['input']!r} (from {origin}) {allowed}{_purpose(location)}")
    source = f"{path}" if path is not None else "the run spec"
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {source}:\n" + "\n".join(problems)


def _nearby_origin(location: str, origins: Mapping[str, str]) -> str:
    """Where a section came from of which only single keys have an origin, or a key of which only the section has."""
    for path, origin in origins.items():
        if f"{location}.".startswith(f"{path}.") or path.startswith(f"{location}."):
            return origin
    return "file"


def _purpose(location: str) -> str:
    section, _, key = location.partition(".")
    model = RunSpec.model_fields.get(section)
    annotation = model.annotation if model is not None else None
    if not (key and isinstance(annotation, type) and issubclass(annotation, Section)):
        return ""
    field = annotation.model_fields.get(key.partition(".")[0])
    return f" ({field.description})" if field is not None and field.description else ""
