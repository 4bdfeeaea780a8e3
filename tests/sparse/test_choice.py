"""Which engine answers a call, and what is said about it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from mdseq.sparse import Documents, Pattern, attend
from mdseq.sparse.attend import Call, Choice, _log_once, choose

CPU = Call("cpu", torch.float32, head_dim=64, needs_gradient=True, num_slots=4096)
H200 = replace(CPU, device_type="cuda", dtype=torch.bfloat16, capability=(9, 0), has_triton=True)
WITHOUT_TRITON = replace(H200, has_triton=False)


@pytest.mark.parametrize(
    ("call", "engine", "reason"),
    [
        (H200, "fused", "bfloat16 on a GPU"),
        (replace(H200, dtype=torch.float32), "fused", "float32 on a GPU"),
        (replace(H200, num_documents=129), "fused", "bfloat16 on a GPU"),
        (WITHOUT_TRITON, "flash", "fused: triton is not installed"),
        (replace(H200, dtype=torch.float16, head_dim=256), "flash", "head dimension of 16, 32, 64, 128, not 256"),
        (replace(WITHOUT_TRITON, dtype=torch.float32), "flex", "flash: it needs bfloat16 or float16, not float32"),
        (replace(H200, head_dim=20), "flex", "multiple of 8"),
        (replace(H200, head_dim=264), "flex", "at most 256"),
        (replace(H200, head_dim=12), "banded", "flex: it needs a head dimension of at least 16, not 12"),
        (replace(H200, dtype=torch.float64), "banded", "not float64"),
        (replace(H200, capability=(7, 5)), "banded", "this one has 7.5"),
        (replace(H200, num_documents=129, head_dim=40), "flex", "flash: slow with more than 128 documents a row"),
        (replace(H200, num_documents=129, head_dim=8), "flash", "not 8"),
        (CPU, "banded", "no GPU"),
        (replace(CPU, needs_gradient=False), "banded", "no GPU"),
        (replace(CPU, num_slots=128), "dense", "no GPU, short rows"),
    ],
)
def test_auto_takes_the_fastest_that_can_run(call, engine, reason):
    choice = choose("auto", call)
    assert choice.engine == engine
    assert reason in choice.reason


def test_an_engine_that_can_run_is_taken_as_asked():
    for engine in ("reference", "dense", "banded", "fused", "flash", "flex"):
        assert choose(engine, H200) == Choice(engine, "asked for")
    assert choose("flex", replace(CPU, needs_gradient=False)).engine == "flex"


@pytest.mark.parametrize(
    ("engine", "call", "message"),
    [
        ("flash", CPU, "flash cannot run: no GPU; give auto, reference, dense, banded$"),
        ("flash", replace(H200, dtype=torch.float32), "not float32; give auto, reference, dense, banded, fused, flex$"),
        ("fused", CPU, "fused cannot run: no GPU; give auto, reference, dense, banded$"),
        ("fused", replace(H200, head_dim=80), "not 80; give auto, reference, dense, banded, flash, flex$"),
        ("flex", CPU, "no backward pass without a GPU; give auto, reference, dense, banded$"),
        ("flesh", H200, "'flesh' does not exist; give auto, reference, dense, banded, fused, flash, flex$"),
    ],
)
def test_an_engine_that_cannot_run_is_refused_with_those_that_can(engine, call, message):
    with pytest.raises(ValueError, match=message):
        choose(engine, call)


def test_the_choice_is_logged_once(caplog):
    layout = Documents.whole(torch.tensor([5]), 6).layout()
    x = torch.randn(1, 6, 2, 8)
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="mdseq.sparse"):
        for _ in range(3):
            attend(x, x, x, Pattern(2), layout)
    assert [record.getMessage() for record in caplog.records] == ["attention engine: dense (no GPU, short rows)"]
