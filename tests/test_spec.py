"""A run spec is read, changed and checked as a whole; what is wrong with it is said at once."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdseq.errors import UserError
from mdseq.settings import flatten
from mdseq.spec import SPEC_DIR, RunSpec, load_spec, preset_names


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(path: Path | None, *overrides: str) -> list[str]:
    """The lines of the message about a spec that is wrong."""
    with pytest.raises(UserError) as error:
        load_spec(path, overrides)
    return str(error.value).splitlines()


def test_without_a_file_every_value_is_a_default() -> None:
    resolved = load_spec(None)
    assert resolved.spec == RunSpec()
    assert resolved.origins == {}
    assert {origin for _, _, origin in resolved.rows()} == {"default"}
    assert [path for path, _, _ in resolved.rows()] == list(flatten(RunSpec().model_dump()))


def test_the_defaults_are_the_moe_diffuseq_preset() -> None:
    preset = load_spec(Path("moe_diffuseq")).spec
    assert preset.model_copy(update={"attention": RunSpec().attention}) == RunSpec()


def test_the_presets() -> None:
    assert preset_names() == ["diffuseq", "moe_diffuseq", "pairs", "quickstart", "sa_diffuseq"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_by_name_and_by_path(name: str) -> None:
    by_name = load_spec(Path(name))
    assert by_name == load_spec(SPEC_DIR / f"{name}.toml")
    written = flatten(tomllib.loads((SPEC_DIR / f"{name}.toml").read_text()))
    assert by_name.origins == dict.fromkeys(written, "file")


def test_every_value_says_where_it_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 3\n[schedule]\nsteps = 10\nwarmup_steps = 2\n")
    resolved = load_spec(path, ["schedule.steps=20", "data.path=novels"])
    rows = {key: (value, origin) for key, value, origin in resolved.rows()}
    assert rows["seed"] == ("3", "file")
    assert rows["schedule.steps"] == ("20", "command line")
    assert rows["schedule.warmup_steps"] == ("2", "file")
    assert rows["data.path"] == ("novels", "command line")
    assert rows["schedule.decay"] == ("linear", "default")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("schedule.steps=100", "schedule", "steps", 100),
        ("optimiser.learning_rate=3e-4", "optimiser", "learning_rate", 3e-4),
        ("attention.dilation=[1, 2, 4]", "attention", "dilation", (1, 2, 4)),
        ("attention.dilation=[1,[1,4]]", "attention", "dilation", (1, (1, 4))),
        ("optimiser.betas=[0.8, 0.95]", "optimiser", "betas", (0.8, 0.95)),
        ("diffusion.absorbing=false", "diffusion", "absorbing", False),
        ("model.norm='post'", "model", "norm", "post"),
        ("model.norm=post", "model", "norm", "post"),
        ("data.path=data/my novels", "data", "path", "data/my novels"),
        ("data.path=../a=b", "data", "path", "../a=b"),
        ("data.lengths_of=pairs", "data", "lengths_of", ("pairs",)),
        (" schedule.steps =7", "schedule", "steps", 7),
    ],
)
def test_overrides_are_toml_values_or_bare_strings(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_spec(None, [override]).spec, section), key) == value


def test_the_last_override_wins() -> None:
    assert load_spec(None, ["seed=1", "seed=2"]).spec.seed == 2


@pytest.mark.parametrize("override", ["steps", "=3", "  =3", "schedule.steps"])
def test_an_override_without_key_or_value(override: str) -> None:
    assert "is not of the form section.key=value" in complaint(None, override)[0]


def test_an_override_into_a_single_value(tmp_path: Path) -> None:
    assert "seed is a single value, not a section" in complaint(write(tmp_path, "seed = 1"), "seed.steps=3")[0]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[schedule]\nsteps = 0\n[model]\nnorm = "middle"\nnum_layers = "many"\n[optimiser]\nlearning_rte = 1e-3\n',
    )
    heading, *problems = complaint(path, "diffusion.gamma=1.5", "optimiser.epsilon=nan")
    assert heading == f"6 problems in {path}:"
    by_key = {problem.split()[0]: problem for problem in problems}
    assert len(by_key) == 6

    steps = by_key["schedule.steps"]  # path, value, origin, what is allowed, what it is for
    assert steps == "  schedule.steps = 0 (from file) should be greater than or equal to 1 (optimiser steps)"
    assert "'middle' (from file) should be 'pre' or 'post'" in by_key["model.norm"]
    assert "'many' (from file) should be a valid integer" in by_key["model.num_layers"]
    assert "did you mean optimiser.learning_rate?" in by_key["optimiser.learning_rte"]
    assert "1.5 (from command line) should be less than or equal to 1" in by_key["diffusion.gamma"]
    assert "nan (from command line) should be a finite number" in by_key["optimiser.epsilon"]


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optimiser.learning_rat=1", "optimiser.learning_rate"),
        ("schedule.step=1", "schedule.steps"),
        ("optimizer.learning_rate=1", "optimiser"),
        ("sede=1", "seed"),
    ],
)
def test_an_unknown_key_suggests_the_near_one(override: str, near: str) -> None:
    _, problem = complaint(None, override)
    assert problem.endswith(f"is not a key of the run spec; did you mean {near}?")


def test_an_unknown_key_like_no_other(tmp_path: Path) -> None:
    _, problem = complaint(write(tmp_path, "[model]\nzzzzzzzzzzzzzzzzzzz = 1"))
    assert "(from file)" in problem
    assert problem.endswith("remove it; docs/run_spec.md lists every key")


@pytest.mark.parametrize("override", ["optimizer.learning_rate=1", "seed.value=3"])
def test_a_wrong_section_of_the_command_line_is_not_blamed_on_a_file(override: str) -> None:
    _, problem = complaint(None, override)
    assert "(from command line)" in problem


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", ["optimiser.learning_rate", "optimiser.gradient_clipping", "diffusion.gamma"])
def test_non_finite_numbers_are_refused(key: str, number: str) -> None:
    _, problem = complaint(None, f"{key}={number}")
    assert problem.startswith(f"  {key} = {number} (from command line)")


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1", "seed=4294967296", "seed=1.5", "model=3", "model.num_layers=0", "data.row_length=7",
        "attention.dilation=[]", "attention.dilation=[1, 0]", "attention.dilation=2", "attention.dilation=[[1, 0]]",
        "attention.dilation=[[]]", "attention.dilation=[1, [[2]]]", "attention.dilation=['a']",
        "attention.dilation_schedule=random", "attention.full_every=-1", "attention.num_source_global=-1",
        "attention.engine=fast", "experts.num_experts=-1", "model.dropout=1.0", "model.dropout=-0.1",
        "diffusion.absorbing=perhaps", "diffusion.num_timesteps=1", "optimiser.betas=[0.9]",
        "optimiser.betas=[0.9, 1.0]", "optimiser.learning_rate=0", "optimiser.precision=fp16",
        "schedule.final_fraction=-0.1", "data.path=3", "data.max_prefix=1.1", "data.max_suffix=-0.1",
        "diffusion.noise_schedule=flat", "diffusion.noise_factor=0", "diffusion.continuous_time=sometimes",
        "diffusion.stratified=often", "diffusion.timestep_sampling=sorted", "diffusion.objective=mine",
        "diffusion.denoising_weight=-1", "diffusion.snr_cap=-1", "diffusion.anchor_weight=-1",
        "diffusion.rounding_weight=-1", "diffusion.estimate=mean", "diffusion.self_conditioning=1.5",
        "diffusion.self_conditioning_lag=-0.1", "diffusion.condition_dropout=2", "diffusion.source_dropout=1.1",
    ],
)  # fmt: skip
def test_values_outside_what_is_allowed_are_refused(override: str) -> None:
    key, _, _ = override.partition("=")
    heading, problem = complaint(None, override)
    assert heading == "1 problem in the run spec:"
    assert problem.strip().startswith(key)
    assert "(from command line)" in problem


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["model.hidden_dim=100"], "model.num_heads = 12 must divide model.hidden_dim = 100.*multiple of 24"),
        (["model.hidden_dim=12"], "heads of even size"),
        (["experts.top_k=9"], "experts.top_k = 9 must be at most experts.num_experts = 8; lower top_k"),
        (["data.micro_batch_size=3"], "data.batch_size = 16 must be a multiple of data.micro_batch_size = 3"),
        (
            ["attention.dilation=[1, [1, 2, 4, 8, 16], [1, 2]]"],
            r"attention.dilation = \[1, \[1, 2, 4, 8, 16\], \[1, 2\]\] makes 5 groups of heads, into which "
            "model.num_heads = 12 does not divide; give entries of 1, 2, 3, 4, 6 or 12 dilations",
        ),
        (
            ["attention.dilation=[1, [1, 2]]", "attention.dilation_schedule=interpolate"],
            r"attention.dilation = \[1, \[1, 2\]\] has entries of 1 or 2 groups of heads.*dilation_schedule",
        ),
        (["diffusion.num_timesteps=10"], "report.sample_solver_steps = 20 must be at most .* = 10"),
    ],
)
def test_values_that_contradict_each_other_name_both(overrides: list[str], fix: str) -> None:
    _, problem = complaint(None, *overrides)
    assert re.search(fix, problem)


def test_contradictions_of_several_sections_come_together() -> None:
    heading, *problems = complaint(None, "model.hidden_dim=100", "experts.top_k=9", "data.micro_batch_size=3")
    assert heading == "3 problems in the run spec:"
    assert len(problems) == 3


def test_contradictions_between_sections_come_together() -> None:
    heading, *problems = complaint(None, "diffusion.num_timesteps=10", "attention.dilation=[[1, 1, 1, 1, 1]]")
    assert heading == "2 problems in the run spec:"
    assert [problem.split()[0] for problem in problems] == ["report.sample_solver_steps", "attention.dilation"]


def test_what_may_stand_in_dilation_is_said_in_one_sentence() -> None:
    _, problem = complaint(None, "attention.dilation=[1, [0, 2]]")
    assert problem.startswith("  attention.dilation.1 = [0, 2] (from command line) should be an integer of at least 1")


def test_what_is_switched_off_contradicts_nothing() -> None:
    assert load_spec(None, ["experts.num_experts=0", "experts.top_k=2"]).spec.experts.num_experts == 0
    full = ["attention.kind=full", "attention.dilation=[1, [1, 1, 1, 1, 1]]", "attention.dilation_schedule=interpolate"]
    assert load_spec(None, full).spec.attention.kind == "full"
    quick = load_spec(None, ["diffusion.num_timesteps=10", "report.sample_interval_steps=0"]).spec
    assert quick.report.sample_solver_steps > quick.diffusion.num_timesteps


# What DiffuSeq's loss is, key by key, and something else.
OF_PUBLISHED = {
    "noise_factor": ("1.0", "2.0"), "min_signal": ("0.0", "0.5"), "continuous_time": ("false", "true"),
    "stratified": ("false", "true"),
    "denoising_weight": ("1.0", "0.5"), "snr_cap": ("0.0", "5.0"), "anchor_weight": ("0.0", "1.0"),
    "rounding_weight": ("1.0", "0.0"), "estimate": ("output", "softmax"), "normalise_embeddings": ("false", "true"),
    "self_conditioning": ("0.0", "0.5"), "condition_dropout": ("0.0", "0.1"),
    "source_dropout": ("0.0", "0.1"),
}  # fmt: skip


@settings(max_examples=40)
@given(st.sets(st.sampled_from(sorted(OF_PUBLISHED))))
def test_the_published_objective_is_that_and_nothing_else(changed: set[str]) -> None:
    """The message names exactly what was changed, and what it should be."""
    if "estimate" in changed:
        changed = changed | {"anchor_weight"}  # without which it is refused for another reason
    overrides = [f"diffusion.{key}={values[key in changed]}" for key, values in OF_PUBLISHED.items()]
    elsewhere = load_spec(None, overrides).spec.diffusion
    assert elsewhere.objective == "target", "these settings are fine in themselves"
    published = [*overrides, "diffusion.objective=published"]
    if not changed:
        assert load_spec(None, published).spec.diffusion.objective == "published"
        return
    heading, problem = complaint(None, *published)
    assert heading == "1 problem in the run spec:"
    wanted = ", ".join(f"{key} = {neutral}" for key, (neutral, _) in OF_PUBLISHED.items() if key in changed)
    assert problem.endswith(f"; set {wanted}, or set diffusion.objective = target")


def test_what_the_published_objective_leaves_open() -> None:
    neutral = [f"diffusion.{key}={value}" for key, (value, _) in OF_PUBLISHED.items()]
    for override in (
        "absorbing=false", "absorbing=true", "gamma=0.1", "absorbing_weight=0.5", "absorbing_schedule=uniform",
        "timestep_sampling=uniform", "noise_schedule=warmup_decay", "num_timesteps=50",
        "self_conditioning_lag=0.9",
    ):  # fmt: skip
        overrides = [*neutral, "diffusion.objective=published", f"diffusion.{override}"]
        assert load_spec(None, overrides).spec.diffusion.objective == "published"


TRAINED = "diffusion.denoising_weight={} diffusion.anchor_weight={} diffusion.estimate={}"


@pytest.mark.parametrize(
    ("denoising", "anchor", "estimate", "problem"),
    [
        (0, 0, "output", "denoising_weight = 0 leaves diffusion.estimate = output untrained; raise denoising_weight"),
        (0, 1, "output", "denoising_weight = 0 leaves diffusion.estimate = output untrained; raise denoising_weight"),
        (1, 0, "softmax", "estimate = softmax needs .*anchor_weight = 0 leaves untrained; raise anchor_weight"),
        (0, 0, "softmax", "estimate = softmax needs .*anchor_weight = 0 leaves untrained; raise anchor_weight"),
        (0, 0, "posterior", "estimate = posterior needs .*anchor_weight = 0 leaves untrained; raise anchor_weight"),
        (0.5, 1, "posterior", "denoising_weight = 0.5 trains an output .* set denoising_weight = 0"),
    ],
)
def test_an_estimate_that_nothing_trains_is_refused(
    denoising: float, anchor: float, estimate: str, problem: str
) -> None:
    heading, found = complaint(None, *TRAINED.format(denoising, anchor, estimate).split())
    assert heading == "1 problem in the run spec:"
    assert re.search(problem, found)


@pytest.mark.parametrize(
    ("denoising", "anchor", "estimate"),
    [(1, 0, "output"), (1, 1, "output"), (0, 1, "softmax"), (0.5, 1, "softmax"), (0, 1, "posterior")],
)
def test_an_estimate_that_is_trained_is_fine(denoising: float, anchor: float, estimate: str) -> None:
    spec = load_spec(None, TRAINED.format(denoising, anchor, estimate).split()).spec.diffusion
    assert spec.estimate == estimate


path_text = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="'"))
overrides_that_fit = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1).map(str),
        "attention.dilation": st.lists(
            st.integers(1, 9) | st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=4
        ).map(str),
        "optimiser.learning_rate": st.floats(1e-12, 10).map(repr),
        "diffusion.gamma": st.floats(0, 1).map(repr),
        "diffusion.absorbing": st.sampled_from(["true", "false"]),
        "experts.num_experts": st.integers(2, 64).map(str),
        "data.path": path_text.map(lambda text: f"'{text}'"),
    },
)


@settings(max_examples=50)
@given(overrides_that_fit)
def test_to_toml_reads_back_to_the_same_spec(tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]) -> None:
    resolved = load_spec(None, [f"{key}={value}" for key, value in values.items()])
    path = write(tmp_path_factory.mktemp("spec"), resolved.spec.to_toml())
    again = load_spec(path)
    assert again.spec == resolved.spec
    assert {origin for _, _, origin in again.rows()} == {"file"}


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunSpec().model.num_layers = 3


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    (message,) = complaint(tmp_path / "absent.toml")
    assert str(tmp_path / "absent.toml") in message
    assert ", ".join(preset_names()) in message


@pytest.mark.parametrize("content", [b"[model\n", b"seed = \xff", b"seed = 1\nseed = 2\n"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert f"{path} is not valid TOML" in complaint(path)[0]


def test_importing_the_spec_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, mdseq.spec; sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
