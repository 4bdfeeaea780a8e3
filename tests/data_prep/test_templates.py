"""Records become documents by the fields and templates that the user names."""

import pytest

from data_prep.templates import FieldError, RecordTemplate, Template

RECORD = {"title": "Emma", "year": 1815, "meta": {"tags": ["novel", "irony"]}, "null": None, "flag": True}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("title", "Emma"),
        ("meta.tags.1", "irony"),
        ("{title} ({year})\n", "Emma (1815)\n"),
        ("{{{meta.tags.0}}}", "{novel}"),
        ("{title}{title}", "EmmaEmma"),
    ],
)
def test_fill(template: str, text: str) -> None:
    assert Template.parse(template).fill(RECORD) == text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("author", "missing_field"),
        ("null", "missing_field"),
        ("meta.tags.2", "missing_field"),
        ("title.x", "missing_field"),
        ("year", "not_a_string"),
        ("meta", "not_a_string"),
        ("{meta}", "not_a_string"),
        ("{flag}", "not_a_string"),
    ],
)
def test_what_a_record_does_not_have(template: str, reason: str) -> None:
    with pytest.raises(FieldError, match=reason):
        Template.parse(template).fill(RECORD)


@pytest.mark.parametrize("template", ["{", "{title", "{}", "{title!r}", "{year:04}", "{{plain}}"])
def test_malformed_templates(template: str) -> None:
    with pytest.raises(ValueError, match=r"field|template"):
        Template.parse(template)


def dialogue(turn: str, last_turn_is_target: bool = False) -> RecordTemplate:
    return RecordTemplate.of("", "", "", "turns", turn, last_turn_is_target)


def test_pairs_and_columns() -> None:
    template = RecordTemplate.of("", "{question}\n\n{context.0}", "answer", "", "", False)
    assert template.kind == "pair"
    assert template.columns == ["answer", "context", "question"]
    assert template.parts_of({"question": "Who?", "context": ["Emma."], "answer": "she"}) == ("Who?\n\nEmma.", "she")


def test_dialogues() -> None:
    by_number = {"turns": [["A", "hi"], ["B", "ho"]]}
    by_name = {"turns": [{"role": "A", "content": "hi"}, {"role": "B", "content": "ho"}]}
    assert dialogue("{0}: {1}\n").parts_of(by_number) == ("A: hi\nB: ho\n",)
    assert dialogue("{role}: {content}\n").parts_of(by_name) == ("A: hi\nB: ho\n",)
    assert dialogue("- {0}\n").parts_of({"turns": ["hi", "ho"]}) == ("- hi\n- ho\n",)
    assert dialogue("{0}: {1}\n", True).parts_of(by_number) == ("A: hi\n", "B: ho\n")
    assert dialogue("{0}", True).kind == "pair"
    with pytest.raises(FieldError, match="fewer_than_two_turns"):
        dialogue("{0}", True).parts_of({"turns": ["hi"]})
    with pytest.raises(FieldError, match="not_a_list"):
        dialogue("{0}").parts_of({"turns": "hi"})
