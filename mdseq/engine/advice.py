"""What to change where memory does not suffice, and how much that saves, by estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mdseq.engine.config import DS_CONFIG_DIR, EngineConfig, load_engine_config
from mdseq.engine.memory import estimate_memory
from mdseq.errors import UserError
from mdseq.model.denoiser import DenoiserConfig
from mdseq.model.recompute import ActivationCheckpointing
from mdseq.spec import RunSpec

SPARING_MORE: dict[str, ActivationCheckpointing] = {"none": "recompute", "recompute": "offload"}
GIB = 2**30


def memory_advice(spec: RunSpec, engine: EngineConfig, vocab_size: int, *, on_gpu: bool) -> list[str]:
    """Changes of the spec or the ds_config that save memory of a rank, the most first, each a line."""

    def total(spec: RunSpec, engine: EngineConfig) -> int:
        return estimate_memory(DenoiserConfig.of(spec, vocab_size), spec, engine, on_gpu=on_gpu).total

    now = total(spec, engine)
    savings = [(now - total(changed, other), text) for text, changed, other in _changes(spec, engine, on_gpu)]
    return [f"{text} saves about {saved / GIB:.2f} GiB" for saved, text in sorted(savings, reverse=True) if saved > 0]


def _changes(spec: RunSpec, engine: EngineConfig, on_gpu: bool) -> Iterator[tuple[str, RunSpec, EngineConfig]]:
    rows, length = spec.data.micro_batch_size, spec.data.row_length
    if rows > 1:
        text = f"data.micro_batch_size = {rows // 2} instead of {rows}"
        more = replace(engine, micro_batches=engine.micro_batches * 2)
        yield text, _changed(spec, "data", micro_batch_size=rows // 2), more
    else:
        text = f"data.row_length = {length // 2} instead of {length}"
        yield text, _changed(spec, "data", row_length=length // 2), engine
    if mode := SPARING_MORE.get(spec.model.activation_checkpointing):
        text = f"model.activation_checkpointing = {mode}"
        yield text, _changed(spec, "model", activation_checkpointing=mode), engine
    for name in ("zero3", "zero3_experts", "zero3_offload"):
        try:
            sparing = load_engine_config(DS_CONFIG_DIR / f"{name}.json", spec, engine.num_ranks, on_gpu)
        except UserError:  # no experts to spread
            continue
        yield f"ds_configs/{name}.json", spec, sparing


def _changed(spec: RunSpec, section: str, **values: Any) -> RunSpec:
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=values)})
