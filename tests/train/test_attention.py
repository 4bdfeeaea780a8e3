"""A run names its engine, or says why it cannot have it."""

from __future__ import annotations

import pytest
import torch

from mdseq.errors import UserError
from mdseq.spec import load_spec
from mdseq.train.attention import choose_attention

CPU = torch.device("cpu")


def test_the_engine_follows_the_device_and_the_rows():
    assert choose_attention(load_spec(None).spec, CPU).engine == "banded"
    assert choose_attention(load_spec(None, ["data.row_length=128"]).spec, CPU).engine == "dense"


def test_an_engine_that_cannot_run_here_is_the_users_mistake():
    with pytest.raises(UserError, match=r"^attention\.engine: flash cannot run: no GPU; give auto, reference, dense"):
        choose_attention(load_spec(None, ["attention.engine=flash"]).spec, CPU)
