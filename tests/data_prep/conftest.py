"""A small vocabulary, so that most builds need not train one."""

from pathlib import Path

import pytest

from data_prep.vocabulary import WindowSample, train_vocabulary


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = WindowSample.for_vocabulary(512)
    for number in range(60):
        sample.add(f"def mill_{number}(river):\n    return river + {number}  # past the old mill\n")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_vocabulary(sample, 512))
    return path
