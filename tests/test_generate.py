"""`mdseq generate`: what may be asked for, what comes out, and what is said about mistakes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from mdseq.cli import generate as command_module
from mdseq.cli import main
from mdseq.cli.results import FileResults
from mdseq.cli.weights import load_run
from mdseq.diffusion.absorbing import Absorption
from mdseq.diffusion.estimates import READINGS
from mdseq.diffusion.time_grids import TIME_GRIDS
from mdseq.generate.sampler import SOLVERS, SamplerOptions
from mdseq.generate.text import TextGenerator
from mdseq.model.saved import SavedModel
from tests.generate.models import save_tiny_model

FAST = ["--steps", "2"]


@pytest.fixture(scope="module")
def text_model(text_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("text") / "model", text_dataset))


@pytest.fixture(scope="module")
def pair_model(pair_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("pair") / "model", pair_dataset, condition_dropout=0.1))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def inputs() -> Path:
    """Nine records; one with an end of line in its text that JSON allows, and half a character beside it."""
    sources = ["the river", "", "seven grey cats " * 7, "an old\u2028mill", "fish", "snow " * 4, "of", "past", "dream"]
    records = [{"src": source, "gaps": f"{source} [[4]] and [[2]]", "id": i} for i, source in enumerate(sources)]
    records[6]["other"] = "\ud800"
    lines = [json.dumps(record, ensure_ascii=record["id"] == 6) for record in records]
    path = Path("in.jsonl")
    path.write_text("\n".join([*lines[:4], "", *lines[4:], ""]), encoding="utf-8")
    return path


def generate(model: str, *arguments: object) -> int:
    return main(["generate", model, *FAST, *map(str, arguments)])


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


def complaint(capsys: pytest.CaptureFixture[str], model: str, *arguments: object) -> str:
    assert generate(model, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# What may be asked for


def test_one_text_is_printed_as_it_is(text_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(text_model, "--source", "the river", "--length", 20) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert first.out.strip("\n")
    generate(text_model, "--source", "the river", "--length", 20, "--seed", 1)
    assert capsys.readouterr().out != first.out


def test_in_bf16(text_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers alone, not what embeddings are scored against."""
    loaded = []

    def load(*asked) -> SavedModel:
        loaded.append(load_run(*asked))
        return loaded[-1]

    monkeypatch.setattr(command_module, "load_run", load)
    assert generate(text_model, "--source", "the river", "--length", 20, "--precision", "bf16") == 0
    assert capsys.readouterr().out.strip("\n")
    dtypes = {name: weight.dtype for name, weight in loaded[0].denoiser.named_parameters()}
    in_fp32 = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert in_fp32 == {"embedding.weight", "head.bias"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def test_several_are_numbered(text_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(text_model, "--length", 8, "--num", 3) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("---")] == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]


@pytest.mark.parametrize("model", ["text_model", "pair_model"])
def test_gaps(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], model: str) -> None:
    source = ["--source", "the river runs"] if model == "pair_model" else []
    model = request.getfixturevalue(model)
    assert generate(model, "--infill", "The  king [[8]] and\twent [[4]]home\n", *source) == 0
    out = capsys.readouterr().out
    assert out.startswith("The  king ")
    assert " and\twent " in out
    assert out.endswith("home\n\n")
    assert generate(model, "--infill", "[[8]] <3>", "--gap_marker", "<N>", *source) == 0
    assert capsys.readouterr().out.startswith("[[8]] ")


def test_a_long_text_comes_in_blocks_and_is_the_same_in_a_file(
    text_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ["--length", 150, "--min_length", 150]
    assert generate(text_model, *long) == 0
    printed = capsys.readouterr().out
    assert generate(text_model, *long, "--output", "out.jsonl") == 0
    assert lines("out.jsonl") == [{"src": "", "generated": printed[:-1]}]
    assert generate(text_model, *long, "--block", 20, "--context", 10) == 0
    assert capsys.readouterr().out != printed


def test_pairs_are_as_long_as_predicted(pair_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for length in ([], ["--length", "predicted"], ["--length", "sampled"], ["--length", 40]):
        assert generate(pair_model, "--source", "The river runs.\n", *length) == 0
        texts[str(length)] = capsys.readouterr().out
    assert texts["[]"] == texts["['--length', 'predicted']"]
    assert len(set(texts.values())) >= 2


def test_a_quantile_of_the_predicted_lengths(text_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--length", "predicted", "--min_length", 1000]
    sizes = []
    for quantile in ([], ["--length_quantile", 0.5], ["--length_quantile", 0], ["--length_quantile", 1]):
        assert generate(text_model, *source, *quantile) == 0
        sizes.append(len(capsys.readouterr().out))
    assert sizes[2] < sizes[0] == sizes[1] < sizes[3]


def test_a_quantile_of_lengths_that_are_not_predicted_is_refused(
    text_model: str, pair_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quantile = ["--length_quantile", 0.4]
    for told, model, *options in (
        ["leave out --length 40", pair_model, "--length", 40],
        ["leave out --length sampled", pair_model, "--length", "sampled"],
        ["marked with; leave out --length_quantile", pair_model, "--infill", "[[4]]"],
        ["give --length predicted as well", text_model],
    ):
        assert generate(model, *options, *quantile) == 2
        assert told in capsys.readouterr().err
    assert generate(text_model, "--length", "predicted", *quantile) == 0


@pytest.mark.parametrize("options", [[], ["--infill_key", "gaps"], ["--num", 2], ["--candidates", 3, "--length", 5]])
def test_batches_do_not_change_the_texts(pair_model: str, inputs: Path, options: list) -> None:
    for batch_size in (1, 3, 8):
        arguments = ["--input", inputs, "--output", f"{batch_size}.jsonl", "--batch_size", batch_size, *options]
        assert generate(pair_model, *arguments) == 0
    assert Path("1.jsonl").read_bytes() == Path("3.jsonl").read_bytes() == Path("8.jsonl").read_bytes()
    records = lines("1.jsonl")
    num = 2 if options[:1] == ["--num"] else 1
    assert [record["id"] for record in records] == [i for i in range(9) for _ in range(num)]
    assert records[6 * num]["other"] == "\ud800"
    if "--infill_key" in options:
        assert all(record["generated"].startswith(record["src"]) for record in records)


def test_standard_output_has_the_lines_of_a_file(
    pair_model: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(pair_model, "--input", inputs, "--output", "out.jsonl") == 0
    assert capsys.readouterr().out == ""
    assert generate(pair_model, "--input", inputs) == 0
    assert capsys.readouterr().out == Path("out.jsonl").read_text(encoding="utf-8")


def test_the_chosen_candidate_is_one_of_them(pair_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", "the river", "--length", 12]
    assert generate(pair_model, *arguments, "--num", 4) == 0
    out = capsys.readouterr().out
    candidates = [part.partition("\n")[2].removesuffix("\n") for part in out.split("--- ")[1:]]
    for select in ("bleu", "rouge", "embedding"):
        assert generate(pair_model, *arguments, "--candidates", 4, "--select", select) == 0
        assert capsys.readouterr().out.removesuffix("\n") in candidates


def test_every_candidate_of_every_text_has_noise_of_its_own(
    pair_model: str, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []

    def stream(self, prompts, *_):
        for index, prompt in enumerate(prompts):
            ids.append(prompt.sample_id)
            yield index, "a text"

    monkeypatch.setattr(TextGenerator, "stream", stream)
    assert generate(pair_model, "--input", inputs, "--num", 2, "--candidates", 3) == 0
    assert ids == list(range(9 * 2 * 3))


def test_all_options_of_the_sampler(pair_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(command_module.SOLVERS) == set(SOLVERS)
    assert set(command_module.TIME_GRIDS) == set(TIME_GRIDS)
    assert set(command_module.ESTIMATES) == set(READINGS)
    options = ["--solver", "ddpm", "--time_grid", "log_snr", "--guidance", "1.5", "--threshold", "0.9"]
    more = ["--clamp", "--absorb", "--patience", 1, "--temperature", "0.9", "--estimate", "posterior"]
    assert generate(pair_model, "--source", "the", *options, *more) == 0


def test_the_samplers_options_reach_the_sampler(pair_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own name, and by default those of the sampler."""
    asked = []

    def stream(self, prompts, options, *_):
        asked.append((options, self.model.reading))
        return ((index, "a text") for index, _ in enumerate(prompts))

    monkeypatch.setattr(TextGenerator, "stream", stream)
    options = [
        "--solver", "ddpm", "--time_grid", "log_snr", "--seed", 4, "--temperature", 0.25, "--guidance", 1.5,
        "--clamp", "--threshold", 0.5, "--absorb", "--patience", 3, "--confidence", 0.75, "--estimate", "softmax",
    ]  # fmt: skip
    assert generate(pair_model, "--num", 2, *options) == generate(pair_model, "--num", 2) == 0
    assert asked == [
        (SamplerOptions(2, "ddpm", "log_snr", 4, 0.25, 1.5, True, 0.5, True, 3, 0.75), "softmax"),
        (SamplerOptions(2), "output"),
    ]


def test_by_default_the_output_is_what_the_model_was_trained_to_say(
    pair_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(save_tiny_model(Path("posterior"), pair_dataset, reading="posterior"))
    texts = {}
    for estimate in ([], ["--estimate", "posterior"], ["--estimate", "output"]):
        assert generate(saved, "--source", "the river", "--length", 20, *estimate) == 0
        texts[" ".join(estimate)] = capsys.readouterr().out
    assert texts[""] == texts["--estimate posterior"] != texts["--estimate output"]


def test_a_model_trained_for_mask_predict_is_sampled_by_it(
    pair_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absorption = Absorption(1.0, "uniform")
    saved = str(save_tiny_model(Path("absorbing"), pair_dataset, absorption=absorption, min_signal=0.3))
    texts = {}
    for solver in ([], ["--solver", "mask_predict"]):
        assert generate(saved, "--source", "the river", "--length", 20, *solver) == 0
        texts[" ".join(solver)] = capsys.readouterr().out
    assert texts[""] == texts["--solver mask_predict"]
    said = complaint(capsys, saved, "--source", "the river", "--solver", "dpm_2m")
    assert "solver dpm_2m begins with noise alone" in said
    assert "(diffusion.min_signal = 0.3); use mask_predict" in said


@pytest.mark.parametrize("suffix", ["html", "png"])
@pytest.mark.parametrize(
    "arguments",
    [["--length", 10], ["--length", 90, "--block", 9], ["--infill", "a [[3]] b"], ["--num", 2, "--output", "o.jsonl"]],
)
def test_a_trace(text_model: str, suffix: str, arguments: list) -> None:
    assert generate(text_model, *arguments, "--trace", f"trace.{suffix}") == 0
    assert Path(f"trace.{suffix}").stat().st_size > 1000


def test_a_long_row_is_told_about_once(pair_model: str, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.jsonl").write_text("\n".join(json.dumps({"src": "the river " * n}) for n in (40, 30, 1)))
    assert generate(pair_model, "--input", "long.jsonl") == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"warning: a row of \d+ tokens is longer than the 64 of the training", warning)


# Interruptions


class Interrupted(FileResults):
    """Ctrl-C after some texts."""

    left = 0

    def add(self, index: int, text: str) -> None:
        if Interrupted.left == 0:
            raise KeyboardInterrupt
        Interrupted.left -= 1
        super().add(index, text)


@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_command_goes_on(
    pair_model: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    rng = random.Random(seed)
    arguments = ["--input", inputs, "--num", 2, "--length", "sampled"]
    assert generate(pair_model, *arguments, "--output", "whole.jsonl") == 0

    Interrupted.left = rng.randint(2, 17)
    kept = Interrupted.left
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "FileResults", Interrupted)
        assert generate(pair_model, *arguments, "--output", "out.jsonl") == 130
    assert f"{kept} of 18 texts are kept in out.jsonl.part" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()

    part = Path("out.jsonl.part")
    content = part.read_bytes()
    torn = content[: rng.randint(content.index(b"\n") + 1, len(content))]  # as a power cut may leave it
    part.write_bytes(torn)
    kept = torn.count(b"\n") - 1
    assert generate(pair_model, *arguments, "--output", "out.jsonl", "--batch_size", rng.choice([1, 3, 8])) == 0
    err = capsys.readouterr().err
    assert err == (f"{kept} of 18 texts are kept in out.jsonl.part; going on\n" if kept else "")
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seed", 5], "--seed was 0 and is 5 now"),
        (["--length", 7], "--length was sampled and is 7 now"),
        (["--infill_key", "gaps"], "--infill_key was not given and is gaps now"),
        ("model", "the model was that of step 7"),
        ("input", "the input was 9 lines of SHA-256"),
    ],
)
def test_another_command_does_not_go_on(
    pair_model: str, pair_dataset: Path, inputs: Path, monkeypatch, capsys, changes: object, message: str
) -> None:
    arguments = ["--input", inputs, "--length", "sampled", "--output", "out.jsonl"]
    Interrupted.left = 3
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "FileResults", Interrupted)
        generate(pair_model, *arguments)
    capsys.readouterr()
    if changes == "model":
        pair_model = str(save_tiny_model(Path("other").absolute(), pair_dataset, step=8, condition_dropout=0.1))
    elif changes == "input":
        inputs.write_text('{"src": "another"}\n')
    elif "--infill_key" in changes:
        arguments = ["--input", inputs, "--output", "out.jsonl", *changes]
    else:
        arguments += changes
    error = complaint(capsys, pair_model, *arguments)
    assert message in error
    assert "holds 3 texts of another command" in error


# Mistakes


def test_nothing_of_the_user_is_overwritten(text_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, option in (("mine.jsonl", "--output"), ("mine.html", "--trace")):
        Path(name).write_text("a holiday")
        assert f"{name} exists and is never overwritten" in complaint(capsys, text_model, option, name)
        assert Path(name).read_text() == "a holiday"


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("text_model", ["--guidance", 2], "--guidance 2 needs a model that was trained to do without its source"),
        ("text_model", ["--infill", "no gap"], "has no gap to fill"),
        ("text_model", ["--infill", "a [[0]]"], "has a gap of no tokens"),
        ("text_model", ["--infill", "a [[3]]", "--gap_marker", "x"], "gap marker 'x' is not allowed"),
        ("text_model", ["--infill", "a [[3]]", "--length", 3], "leave out --length"),
        ("text_model", ["--infill", "a [[3]]", "--source", "b"], "put it into --infill"),
        ("text_model", ["--infill_key", "gaps"], "--infill_key is a key of --input"),
        ("text_model", ["--input", "in.jsonl", "--source", "a"], "leave out --source and --infill"),
        ("text_model", ["--input", "absent.jsonl"], "cannot read --input absent.jsonl: No such file"),
        ("text_model", ["--input", "empty.jsonl"], "--input empty.jsonl is empty"),
        ("text_model", ["--input", "latin.jsonl"], "it is not UTF-8 at byte 9"),
        ("text_model", ["--input", "torn.jsonl"], "torn.jsonl, line 2 is not JSON"),
        ("text_model", ["--input", "list.jsonl"], "list.jsonl, line 1 is no JSON object"),
        ("text_model", ["--input", "half.jsonl"], "half.jsonl, line 1 holds half a character"),
        ("text_model", ["--source", "a\udcff"], "the command line holds half a character"),
        (
            "text_model",
            ["--input", "in.jsonl", "--source_key", "text"],
            "in.jsonl, line 1 has no text under 'text', of the keys 'src', 'gaps', 'id'; name another with",
        ),
        ("pair_model", ["--input", "gaps.jsonl", "--infill_key", "gaps"], "record 1 has no text under 'src'"),
        ("text_model", ["--trace", "a.html", "--candidates", 2], "leave out one of them"),
        ("text_model", ["--trace", "a.mp4"], "a.mp4: a trace is a page, an animation or a picture"),
        ("text_model", ["--trace", "absent/a.html"], "there is no folder absent"),
        ("text_model", ["--output", "absent/out.jsonl"], "there is no folder absent"),
        ("absent", [], "no run folder at absent"),
    ],
)
def test_mistakes(request, capsys, inputs: Path, model: str, arguments: list, message: str) -> None:
    Path("empty.jsonl").write_text("\n\n")
    Path("latin.jsonl").write_bytes(b'{"src": "\xe9"}\n')
    Path("torn.jsonl").write_text('{"src": "a"}\n{"src": "b\n')
    Path("list.jsonl").write_text('["src"]\n')
    Path("half.jsonl").write_text('{"src": "\\ud800"}\n')
    Path("gaps.jsonl").write_text('{"gaps": "a [[3]]"}\n')
    before = sorted(Path().iterdir())
    folder = model if model == "absent" else request.getfixturevalue(model)
    capsys.readouterr()  # the dataset may have been built just now
    assert message in complaint(capsys, folder, *arguments)
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "many"],
        ["--length", "0"],
        ["--length", "long"],
        ["--guidance", "nan"],
        ["--guidance", "-1"],
        ["--guidance", "inf"],
        ["--threshold", "0"],
        ["--threshold", "1.1"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
        ["--num", "0"],
        ["--candidates", "0"],
        ["--block", "0"],
        ["--patience", "-1"],
        ["--confidence", "1.5"],
        ["--solver", "euler"],
        ["--estimate", "mean"],
        ["--temperature", "-0.5"],
        ["--temperature", "inf"],
    ],
)
def test_values_that_are_never_allowed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate("absent", *arguments)
    assert exit_.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err
