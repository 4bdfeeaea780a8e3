"""A saved model is read back bit for bit, or the user is told what is wrong with the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mdseq.diffusion.objective import DiffusionObjective
from mdseq.errors import UserError
from mdseq.model.saved import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, ModelConfig, load_model, save_model
from mdseq.sparse import Documents
from mdseq.spec import load_spec

VOCAB = 30


def tiny_objective(*overrides: str) -> DiffusionObjective:
    tiny = [
        "model.embedding_dim=8", "model.hidden_dim=16", "model.num_layers=2", "model.num_heads=2",
        "attention.window=3", "attention.dilation=[1, 2]", "experts.num_experts=3", "experts.feedforward_dim=6",
        "diffusion.self_conditioning=0.0",
    ]  # fmt: skip
    torch.manual_seed(0)
    objective = DiffusionObjective(load_spec(None, [*tiny, *overrides]).spec, VOCAB)
    torch.nn.init.normal_(objective.denoiser.head.bias)  # as if it had been trained
    return objective


def config_of(objective: DiffusionObjective) -> ModelConfig:
    return ModelConfig(
        objective.config,
        noise_schedule="cosine",
        num_timesteps=2000,
        gamma=0.25,
        absorbing_schedule="uniform",
        document_kind="text",
        row_length=64,
        step=7,
        condition_dropout=0.1,
        noise_factor=2.5,
        min_signal=0.25,
        estimate="posterior",
        lengths={"kind": "text", "sources_k": [0.0], "quantiles_kq": [[1.0, 2.5, 9.0]]},
    )


def save(folder: Path, objective: DiffusionObjective) -> Path:
    tokenizer = folder / "vocabulary"
    tokenizer.write_bytes(b"a vocabulary")
    save_model(folder / "model", config_of(objective), objective.named_parameters(), tokenizer)
    return folder / "model"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path, tiny_objective())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experts.num_experts=0"],
        ["diffusion.absorbing=false"],
        ["attention.kind=full", "model.norm=post"],
        ["diffusion.self_conditioning=0.5", "diffusion.normalise_embeddings=true"],
        ["diffusion.self_conditioning=0", "diffusion.normalise_embeddings=false"],
    ],
)
def test_round_trip_is_exact(tmp_path: Path, overrides: list[str]) -> None:
    objective = tiny_objective(*overrides)
    model = load_model(save(tmp_path, objective))
    assert model.config == config_of(objective)
    assert model.tokenizer_path.read_bytes() == b"a vocabulary"
    assert torch.equal(model.m_z, objective.absorbing())
    assert not model.denoiser.training

    inputs = torch.randn(2, 9, 8), torch.rand(2, 9), Documents.whole(torch.tensor([9, 5]), 9), torch.randn(2, 9, 8)
    ours, theirs = model.denoiser(*inputs), objective.denoiser.eval()(*inputs)
    assert torch.equal(ours, theirs)
    ours, theirs = model.denoiser.vocabulary(), objective.denoiser.vocabulary()
    assert torch.equal(ours.embedding_vz, theirs.embedding_vz)
    assert torch.equal(ours.bias_v, theirs.bias_v)
    assert theirs.bias_v.any()


def test_what_is_stored_is_every_parameter_in_fp32(saved: Path) -> None:
    """The embedding once, though tokens are embedded and scored by it."""
    from safetensors.torch import load_file

    weights = load_file(saved / WEIGHTS_FILE)
    assert set(weights) == {name for name, _ in tiny_objective().named_parameters()}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert sum(VOCAB in weight.shape for weight in weights.values()) == 2  # the embedding, and the biases


def test_the_digest_is_of_the_weights_alone(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "again").mkdir()
    again = load_model(save(tmp_path / "again", tiny_objective()))
    assert load_model(saved).digest() == again.digest()
    with torch.no_grad():
        again.denoiser.head.bias[3] += 1e-3
    assert load_model(saved).digest() != again.digest()


def test_at_step(saved: Path) -> None:
    config = load_model(saved).config
    assert config.at_step(9).step == 9
    assert config.at_step(9).at_step(config.step) == config


def test_an_existing_folder_is_not_overwritten(saved: Path) -> None:
    with pytest.raises(FileExistsError):
        save(saved.parent, tiny_objective())


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"{saved} does not hold a whole model"):
        load_model(saved)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not hold a whole model"):
        load_model(tmp_path / "absent")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file(saved: Path, name: str, kept: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=f"{saved} does not hold a whole model"):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [{"step": None, "surplus": 1}, {"denoiser": {}}, {"denoiser": 3}],
)
def test_a_config_of_another_shape(saved: Path, change: dict) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="does not hold a whole model"):
        load_model(saved)


@pytest.mark.parametrize("change", [{"hidden_dim": 32}, {"self_conditioning": True}, {"num_experts": 0}])
def test_weights_that_do_not_fit_the_config(saved: Path, change: dict) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(config | {"denoiser": config["denoiser"] | change}))
    with pytest.raises(UserError, match="does not hold a whole model"):
        load_model(saved)


def test_weights_of_another_program(saved: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, saved / WEIGHTS_FILE)
    with pytest.raises(UserError, match="does not hold a whole model"):
        load_model(saved)


def test_the_vocabulary_travels_with_the_weights(saved: Path) -> None:
    assert (saved / TOKENIZER_FILE).is_file()
