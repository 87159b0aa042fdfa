"""What a task makes of a row: prompts and candidates written out by hand, the labels of every source, what is refused, and scores by definition.

Belongs here: tasks as a user meets them. Does not belong here: scores of examples written for the purpose (test_scoring.py), tables of any kind
(test_data.py), a task of one's own (test_own_task.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from zo_finetune.data import Source, examples_of, labelled, load_splits
from zo_finetune.decoding import Answers
from zo_finetune.errors import UserError
from zo_finetune.metrics import METRICS
from zo_finetune.scoring import Encoder, Scorer
from zo_finetune.tables import Table
from zo_finetune.tasks import TASKS, get_task
from zo_finetune.tasks.base import ClassificationTask, Example, Form, Row, RowError

from tests.finetune.conftest import SHARED, write_jsonl

# fp32 over inputs of different shape: matrix kernels sum in another order (test_scoring.py)
CLOSE = {"rtol": 0.0, "atol": 2e-5}

REFER = 'The trophy is too big. It stays.\nIn the previous sentence, does the pronoun "it" refer to The trophy? Yes or No?\n'
MEANS = 'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nThe bank is shut.\n'
ASKS = "Who wrote Emma ?\nWhat does this ask for? Description, Entity, Expression, Human, Location, or Number?\n"
LATER = "Ann met Kim in Rome.\n- They talked\n- It was hot\n- Later"
FRIENDS = (" Ann's friend left.", " Kim's friend left.", " Rome's friend left.")
PAIR = {"premise": "It rained. All day.", "hypothesis": "The street is wet."}
SUPPOSE = 'Suppose It rained. All day. Can we infer that "The street is wet."? Yes, No, or Maybe?\n'
FILM = {"sentence": "a fine film ", "label": 1}
BLUE = {
    "passage": "The sky -- The sky is blue. ",
    "question": "is the sky blue",
}
TROPHY = {"text": "The trophy is too big. It stays.", "span1_text": "The trophy", "span2_text": "It", "label": 1}
BANK = {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank is shut.", "label": 0}
COOK = {"paragraph": "Ann cooked.", "question": "Who cooked?", "answer": "Ann", "label": 1}
COPA = {"premise": "The man fell.", "choice1": "I pushed him.", "choice2": "The ice was thin.", "question": "cause", "label": 1}
GAP = {"sentence": "Ann fed Kim's cat because _ was away.", "option1": "Ann", "option2": "Kim", "label": 1}
NEWS = {
    "passage": "Ann met Kim in Rome.\n@highlight\nThey talked\n@highlight\nIt was hot",
    "query": "Later @placeholder's friend left.",
    "entities": ["Ann", "Kim", "Rome", "Ann"],
    "answers": ["Kim", "Ann"],
}
HARVARD = {
    "title": "Harvard",
    "context": "It is old. \n It has a team.",
    "question": "What is old? ",
    "answers": ["Harvard", "It", "Harvard"],
}
COUNTS = {"context": "Ann won 3. Kim won 4. ", "question": "Who won?", "answers": [["Ann", "Kim"], ["both"]]}
ASKED = {"text": "Who wrote Emma ?", "label": "human"}
LINE = {"question": "Who wrote Emma?", "sentence": "Emma is by Austen.", "label": 0}
THINGS = (" Expression", " Entity", " Description", " Human", " Location", " Number")

# task, form, row, context, answers, tail, label
WRITTEN: list[tuple[str, Form, dict[str, Any], str, tuple[str, ...], str, int]] = [
    ("sst2", "causal", FILM, "a fine film It was", (" terrible", " great"), "", 1),
    ("sst2", "masked", FILM, "a fine film It was", (" terrible", " great"), ".", 1),
    ("mr", "causal", {**FILM, "label": 0}, "a fine film It was", (" terrible", " great"), "", 0),
    ("mr", "masked", FILM, "a fine film It was", (" terrible", " great"), ".", 1),
    ("cr", "causal", FILM, "a fine film It was", (" terrible", " great"), "", 1),
    ("cr", "masked", FILM, "a fine film It was", (" terrible", " great"), ".", 1),
    ("sst5", "causal", {**FILM, "label": 3}, "a fine film It was", (" terrible", " bad", " okay", " good", " great"), "", 3),
    ("sst5", "masked", {**FILM, "label": 0}, "a fine film It was", (" terrible", " bad", " okay", " good", " great"), ".", 0),
    ("rte", "causal", {**PAIR, "label": 0}, 'It rained. All day.\nDoes this mean that "The street is wet." is true? Yes or No?\n', ("Yes", "No"), "", 0),
    ("rte", "masked", {**PAIR, "label": 1}, "It rained. All day?", (" Yes", " No"), ", the street is wet.", 1),
    ("cb", "causal", {**PAIR, "label": 1}, SUPPOSE, ("Yes", "No", "Maybe"), "", 1),
    ("snli", "causal", {**PAIR, "label": 2}, SUPPOSE, ("Yes", "Maybe", "No"), "", 2),
    ("snli", "masked", {**PAIR, "label": 2}, "It rained. All day?", (" Yes", " Maybe", " No"), ", the street is wet.", 2),
    ("mnli", "causal", {**PAIR, "label": 1}, SUPPOSE, ("Yes", "Maybe", "No"), "", 1),
    ("mnli", "masked", {**PAIR, "premise": "It rained"}, "It rained?", (" Yes", " Maybe", " No"), ", the street is wet.", 0),
    ("qnli", "causal", LINE, 'Emma is by Austen.\nDoes this answer the question "Who wrote Emma?"? Yes or No?\n', ("Yes", "No"), "", 0),
    ("qnli", "masked", {**LINE, "label": 1}, "Who wrote Emma?", (" Yes", " No"), ", emma is by Austen.", 1),
    ("boolq", "causal", {**BLUE, "label": 1}, "The sky -- The sky is blue. Is the sky blue?\n", ("No", "Yes"), "", 1),
    ("boolq", "causal", {**BLUE, "question": "is it?", "label": 0}, "The sky -- The sky is blue. Is it?\n", ("No", "Yes"), "", 0),
    ("wsc", "causal", TROPHY, REFER, ("No", "Yes"), "", 1),
    ("wic", "causal", BANK, MEANS, ("No", "Yes"), "", 0),
    ("multirc", "causal", COOK, 'Ann cooked.\nQuestion: Who cooked?\nI found this answer "Ann". Is that correct? Yes or No?\n', ("No", "Yes"), "", 1),
    ("trec", "masked", ASKED, "", THINGS, ": Who wrote Emma ?", 3),
    ("trec", "causal", ASKED, ASKS, tuple(t[1:] for t in THINGS), "", 3),
    ("copa", "causal", COPA, "The man fell because", (" I pushed him.", " the ice was thin."), "", 1),
    ("copa", "causal", {**COPA, "question": "effect", "label": 0}, "The man fell so", (" I pushed him.", " the ice was thin."), "", 0),
    ("winogrande", "causal", GAP, "Ann fed Kim's cat because", (" Ann was away.", " Kim was away."), "", 1),
    ("squad", "causal", HARVARD, "Title: Harvard\nContext: It is old. \n It has a team.\nQuestion: What is old?\nAnswer:", (" Harvard\n",), "", 0),
    ("drop", "causal", COUNTS, "Passage: Ann won 3. Kim won 4.\nQuestion: Who won?\nAnswer:", (" Ann, Kim\n",), "", 0),
    ("record", "causal", NEWS, LATER, FRIENDS, "", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "row", "context", "answers", "tail", "label"), WRITTEN)
def test_prompts_and_candidates(
    name: str, form: Form, row: dict[str, Any], context: str, answers: tuple[str, ...], tail: str, label: int
) -> None:
    example = get_task(name).example({"label": 0, **row}, form)
    assert {c.context for c in example.candidates} == {context} and {c.tail for c in example.candidates} == {tail}
    assert tuple(c.answer for c in example.candidates) == answers
    assert example.label == label and example.right == (frozenset({0, 1}) if name == "record" else frozenset())


def test_every_task_is_written_out_in_every_form() -> None:
    assert {(name, form) for name, form, *_ in WRITTEN} == {(t.name, form) for t in TASKS.values() for form in t.forms}


def test_the_neutral_context_of_the_calibrated_score() -> None:
    """MeZO's: what comes of the prompt without the row, or nothing; COPA's word and ReCoRD's sentence up to the gap."""
    rows = {name: {"label": 0, **row} for name, form, row, *_ in WRITTEN if form == "causal"}
    neutral = {name: {c.neutral for c in get_task(name).example(row, "causal").candidates} for name, row in rows.items()}
    expected = {"copa": "so", "record": "- Later", **dict.fromkeys(("sst2", "sst5", "mr", "cr"), " It was")}
    assert neutral == {name: {expected.get(name, "")} for name in rows}


TARGET = {"span1_text": "The trophy", "span1_index": 0, "span2_text": "It", "span2_index": 5}
# task, a row as a source has it, class names of its label, and the label that it is
FOUND: list[tuple[str, dict[str, Any], list[str] | None, int]] = [
    ("sst2", {"sentence": "fine", "label": 1, "idx": 0}, ["negative", "positive"], 1),
    ("sst5", {"text": "fine", "label": 4, "label_text": "very positive"}, None, 4),
    ("sst5", {"text": "fine", "label": "very negative"}, None, 0),
    ("mr", {"text": "fine", "label": 1}, ["neg", "pos"], 1),
    ("cr", {"text": "fine", "label": 0, "label_text": "negative"}, None, 0),
    ("rte", {**PAIR, "idx": 3, "label": 1}, ["entailment", "not_entailment"], 1),
    ("rte", {"sentence1": "a.", "sentence2": "b.", "label": 0, "idx": 3}, ["entailment", "not_entailment"], 0),
    ("rte", {**PAIR, "label": "not_entailment", "idx": 0}, None, 1),
    ("cb", {**PAIR, "label": 1}, ["entailment", "contradiction", "neutral"], 1),
    ("cb", {**PAIR, "label": "neutral"}, None, 2),
    ("snli", {**PAIR, "label": 1}, ["entailment", "neutral", "contradiction"], 1),
    ("snli", {"sentence1": "a.", "sentence2": "b.", "gold_label": "contradiction"}, None, 2),
    ("snli", {**PAIR, "label": 0}, ["contradiction", "entailment", "neutral"], 2),
    ("mnli", {**PAIR, "label": 2, "idx": 0}, ["entailment", "neutral", "contradiction"], 2),
    ("qnli", {"question": "Who?", "sentence": "He.", "label": 1, "idx": 0}, ["entailment", "not_entailment"], 1),
    ("boolq", {**BLUE, "answer": True}, None, 1),
    ("boolq", {**BLUE, "label": 0, "idx": 0}, ["False", "True"], 0),
    ("boolq", {**BLUE, "label": False, "idx": 0}, None, 0),
    ("wsc", {**TROPHY, "span1_index": 0, "span2_index": 5, "label": 1}, ["False", "True"], 1),
    ("wsc", {"text": TROPHY["text"], "target": TARGET, "idx": 0, "label": True}, None, 1),
    ("wic", {**BANK, "start1": 8, "label": 1}, ["False", "True"], 1),
    ("wic", {**BANK, "version": 1.1, "label": False}, None, 0),
    ("multirc", {**COOK, "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 1}, ["False", "True"], 1),
    ("trec", {"text": "Who ?", "coarse_label": 0, "fine_label": 0}, ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"], 0),
    ("trec", {"text": "Who ?", "coarse_label": 1, "fine_label": 0}, ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"], 1),
    ("trec", {"sentence": "Who ?", "label": "Expression"}, None, 0),
    ("copa", {**COPA, "idx": 0}, ["choice1", "choice2"], 1),
    ("winogrande", {**GAP, "label": 0}, None, 0),
    ("winogrande", {**GAP, "label": "1"}, None, 1),
    ("winogrande", {k: v for k, v in GAP.items() if k != "label"} | {"answer": "1"}, None, 0),
    ("winogrande", {k: v for k, v in GAP.items() if k != "label"} | {"answer": 2}, None, 1),
    ("squad", {"id": "5", **HARVARD, "answers": {"text": ["It"], "answer_start": [0]}}, None, 0),
    ("drop", {"passage": "Ann won.", "question": "Who?", "answers_spans": {"spans": ["Ann"], "types": ["span"]}}, None, 0),
    ("record", {**NEWS, "entity_spans": {}, "idx": {"passage": 0, "query": 0}}, None, 1),
]  # fmt: skip


def table_of(row: dict[str, Any], names: list[str] | None = None) -> Source:
    labels = [c for c in row if "label" in c and not c.startswith("fine")]
    return Source(Table([*row], [*row], [tuple(row.values())], class_names=dict.fromkeys(labels, names) if names else {}), "rows")


@pytest.mark.parametrize(("name", "row", "names", "label"), FOUND)
def test_rows_as_the_sources_have_them(name: str, row: dict[str, Any], names: list[str] | None, label: int) -> None:
    """Of the hub's parquet sets, SuperGLUE's and SNLI's own files and others: columns by their names there, labels by name or by the class names."""
    assert next(examples_of(table_of(row, names), [0], get_task(name), "causal", {})).label == label


def test_a_column_that_is_named_keeps_its_meaning() -> None:
    """--column label=answer is WinoGrande's answer, from 1."""
    row = {k: v for k, v in GAP.items() if k != "label"} | {"answer": "1", "label": "x"}
    assert next(examples_of(table_of(row), [0], get_task("winogrande"), "causal", {"label": "answer"})).label == 0


def test_a_column_that_could_have_been_meant_is_told(tmp_path: Path) -> None:
    """WinoGrande's own column of labels counts from 0 whatever stands beside it."""
    rows = [{**GAP, "sentence": f"{k} {GAP['sentence']}", "label": 1, "answer": "1"} for k in range(9)]
    splits = load_splits(str(write_jsonl(tmp_path / "rows.jsonl", rows)), get_task("winogrande"), "causal", seed=0)
    assert {e.label for e in splits.train} == {1}
    assert splits.notes[1].endswith("rows.jsonl: label is read from column 'label', and not from answer, which is there, too")


@pytest.mark.parametrize(
    ("name", "row", "columns", "said"),
    [
        ("wsc", {"text": "He did.", "target": "he", "label": 0}, {}, "column 'target' stands for span1_text and span2_text, and holds no record"),
        ("sst2", FILM, {"sentence": "label"}, "column 'label' stands for sentence and label, and holds no record"),
        ("copa", {**COPA, "choice1": COPA["choice2"]}, {}, "two of its candidates are the same, which no score could tell apart"),
    ],
)  # fmt: skip
def test_columns_and_candidates_are_two(name: str, row: dict[str, Any], columns: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=f"rows, row 1: {said}"):
        next(examples_of(table_of(row), [0], get_task(name), "causal", columns))


def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    """As SNLI's card says of -1; of other tasks, whose cards do not, they are refused."""
    rows = [{**PAIR, "premise": f"It rained {k} days.", "label": -1 if k % 5 == 0 else k % 3} for k in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load_splits(str(path), get_task("snli"), "causal", seed=0)
    assert len(splits.train) + len(splits.dev) + len(splits.eval) == 32
    assert any("rows.jsonl: 8 rows have no label and are left out" in note for note in splits.notes)
    one = labelled(Source(Table([*rows[0]], [*rows[0]], [tuple(row.values()) for row in rows]), "rows"), {}, get_task("snli"))
    assert one.rows.place(0) == "row 1, line 2"
    with pytest.raises(UserError, match=r"rows\.jsonl, row \d+: field 'label' is -1; test sets of the hub have -1"):
        load_splits(str(path), get_task("cb"), "causal", seed=0)
    write_jsonl(path, [{**PAIR, "label": "-"}] * 3)
    with pytest.raises(UserError, match=r"no row has a label \(label is '-' in row 1\): choose another split or file"):
        load_splits(str(path), get_task("mnli"), "causal", seed=0)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("sst5", {**FILM, "label": 5}, "field 'label' is 5; the labels of sst5 are 0 (very negative), 1 (negative), 2 (neutral)"),
        ("rte", {**PAIR, "label": "maybe"}, "field 'label' is 'maybe'; the labels of rte are 0 (entailment), 1 (not_entailment)"),
        ("rte", {**PAIR, "premise": " ", "label": 0}, "field 'premise' is ' '; rte needs a text there"),
        ("boolq", {**BLUE, "label": None}, "field 'label' is None; the row has no label"),
        ("wsc", {**TROPHY, "span2_text": {"span1_text": "x"}}, "field 'span2_text' is None; wsc needs a text there"),
        ("copa", {**COPA, "question": "why"}, "field 'question' is 'why'; copa needs cause or effect there"),
        ("copa", {**COPA, "label": 2}, "field 'label' is 2; copa needs a whole number there, 0 to 1"),
        ("winogrande", {**GAP, "sentence": "no gap"}, "field 'sentence' is 'no gap'; winogrande needs one gap there, written _"),
        ("winogrande", {**GAP, "sentence": "_ and _"}, "winogrande needs one gap there"),
        ("winogrande", {**GAP, "label": -1}, "field 'label' is -1; winogrande needs a whole number there, 0 to 1"),
        ("winogrande", {**GAP, "answer": ""}, "field 'answer' is ''; winogrande needs 1 or 2 there"),
        ("squad", {**HARVARD, "answers": {"text": []}}, "field 'answers' is {'text': []}; squad needs an answer there, or a list of them"),
        ("squad", {**HARVARD, "answers": None}, "field 'answers' is None; squad needs a text there"),
        ("drop", {**COUNTS, "answers": [[], ["Ann"]]}, "field 'answers' is [[], ['Ann']]; drop needs an answer there"),
        ("drop", {**COUNTS, "answers": {"spans": [], "types": []}}, "drop needs an answer there"),
        ("record", {**NEWS, "query": "no gap"}, "field 'query' is 'no gap'; record needs @placeholder there"),
        ("record", {**NEWS, "answers": []}, "field 'answers' is []; record needs a list of texts there"),
        ("record", {**NEWS, "answers": ["Bob"]}, "field 'answers' is ['Bob']; none of them is among the entities"),
        ("record", {**NEWS, "entities": ["Ann", 3]}, "field 'entities' is 3; record needs a text there"),
    ],
)  # fmt: skip
def test_rows_that_no_task_can_use(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as error:
        get_task(name).example(row, "causal")
    assert said in str(error.value)


def test_a_fifth_of_few_rows_is_held_out_at_most(tmp_path: Path) -> None:
    """WSC's 554 rows: 500 for dev, as public suites have it, leave 54 to train on."""
    rows = write_jsonl(
        tmp_path / "train.jsonl", [{**TROPHY, "text": f"{k} is too big. It stays.", "label": k % 2} for k in range(554)]
    )
    write_jsonl(tmp_path / "validation.jsonl", [{**TROPHY, "label": k % 2} for k in range(104)])
    splits = load_splits(str(rows.parent), get_task("wsc"), "causal", seed=0)
    assert [len(part) for part in (splits.train, splits.dev, splits.eval)] == [444, 110, 104]


ANSWERED: list[tuple[str, dict[str, Any], tuple[tuple[str, ...], ...]]] = [
    ("squad", HARVARD, (("Harvard",), ("It",))),
    ("squad", {**HARVARD, "answers": {"text": ["It", "It"], "answer_start": [0, 0]}}, (("It",),)),
    ("squad", {**HARVARD, "answers": "It"}, (("It",),)),
    ("drop", COUNTS, (("Ann", "Kim"), ("both",))),
    ("drop", {**COUNTS, "answers": "Ann"}, (("Ann",),)),
    ("drop", {**COUNTS, "answers": 7}, (("7",),)),
    ("drop", {**COUNTS, "answers": [["3"], ["3"], ["4"]]}, (("3",), ("4",))),
    ("drop", {**COUNTS, "answers": {"spans": ["Ann", "Kim"], "types": ["span", "span"]}}, (("Ann", "Kim"),)),
    ("drop", {**COUNTS, "answers": {"spans": ["Ann", "Kim", "Ann", "Bo"], "types": ["span"] * 4}}, (("Ann", "Kim"), ("Ann", "Bo"))),
    ("drop", {**COUNTS, "answers": {"spans": ["3", "4"], "types": ["number", "number"]}}, (("3",), ("4",))),
    ("drop", {**COUNTS, "answers": {"spans": ["1 May 2000", "Ann", "Kim"], "types": ["date", "span", "span"]}}, (("1 May 2000",), ("Ann", "Kim"))),
    ("drop", {**COUNTS, "answers": {"number": "3", "date": {"day": "", "month": "", "year": ""}, "spans": []}}, (("3",),)),
    ("drop", {**COUNTS, "answers": {"number": "", "date": {"day": "1", "month": "May", "year": ""}, "spans": []}}, (("1 May",),)),
    ("drop", {**COUNTS, "answers": {"number": "", "date": {}, "spans": ["Ann", "Kim"]}}, (("Ann", "Kim"),)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "accepted"), ANSWERED)
def test_accepted_answers(name: str, row: dict[str, Any], accepted: tuple[tuple[str, ...], ...]) -> None:
    """The spans of one answer of DROP belong together; each annotator's answer is one. The first is trained on."""
    example = get_task(name).example(row, "causal")
    assert example.references == accepted
    assert [c.answer for c in example.candidates] == [f" {', '.join(accepted[0])}\n"] and example.label == 0


# ---- scores, by definition ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_definition(model: Any, tokenizer: Any, example: Example, form: Form, most: int) -> torch.Tensor:
    """Mean log p of each candidate's tokens: one forward of its whole text, as the tokenizer has it, which loses its beginning."""
    scores = []
    for c in example.candidates:
        if form == "causal":
            ids = tokenizer(c.context + c.answer, add_special_tokens=False).input_ids
            before = tokenizer(c.context, add_special_tokens=False).input_ids
            n = len(ids) - next(
                (k for k, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
            )
            answer = ids[-n:]
            ids = [tokenizer.bos_token_id, *ids[-most:]]  # of which all but the last are read
            where = range(len(ids) - n - 1, len(ids) - 1)
        else:
            answer = tokenizer(c.answer, add_special_tokens=False).input_ids
            ids = tokenizer(c.context + tokenizer.mask_token * len(answer) + c.tail).input_ids
            where = [k for k, i in enumerate(ids) if i == tokenizer.mask_token_id]
        log_probs = model(input_ids=torch.tensor([ids[:most]])).logits[0].double().log_softmax(-1)
        scores.append(torch.stack([log_probs[p, a] for p, a in zip(where, answer, strict=True)]).mean())
    return torch.stack(scores).float()


def assert_scores(model: Any, tokenizer: Any, examples: list[Example], form: Form, most: int) -> None:
    encoder = Encoder(tokenizer, form, most)
    with Scorer(model, form, tokenizer.pad_token_id or 0) as scorer, torch.no_grad():
        encoded = encoder.encode_all(examples)
        assert all(span.targets for e in encoded for span in e.spans)  # no answer of 0 tokens, whatever merges
        together = scorer.scores(scorer.collate(encoded))
    for example, row in zip(examples, together, strict=True):
        expected = by_definition(model, tokenizer, example, form, most)
        torch.testing.assert_close(row[: len(expected)], expected, **CLOSE)
        assert torch.isneginf(row[len(expected) :]).all()


@pytest.fixture(scope="module")
def tiny(tokenizer: Any, causal_tokenizer: Any) -> dict[str, tuple[Any, Any]]:
    """Form -> a random model that reads 320 tokens, and its tokenizer."""
    import transformers as tf

    torch.manual_seed(0)
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return {
        "causal": (tf.LlamaForCausalLM(tf.LlamaConfig(**size, max_position_embeddings=320)).eval(), causal_tokenizer),
        "masked": (tf.RobertaForMaskedLM(tf.RobertaConfig(**size, max_position_embeddings=322, pad_token_id=1)).eval(), tokenizer),
    }


@pytest.mark.parametrize(("name", "form"), sorted({(name, form) for name, form, *_ in WRITTEN}))
def test_scores_of_every_task(name: str, form: Form, tiny: dict[str, tuple[Any, Any]]) -> None:
    rows = [{"label": 0, **row} for task, f, row, *_ in WRITTEN if (task, f) == (name, form)]
    examples = [get_task(name).example(row, form) for row in rows]
    model, tokenizer = tiny[form]
    assert_scores(model, tokenizer, examples, form, 320)


REAL = {
    "sst2": "sst2/validation", "sst5": "sst5/validation", "rte": "rte/validation", "boolq": "boolq/validation", "copa": "copa/validation",
    "cb": "extras/cb/validation", "wsc": "extras/wsc/validation", "winogrande": "extras/winogrande_xl/validation", "snli": "extras/snli_10k/dev",
}  # fmt: skip
STORIES = SHARED / "models" / "stories15m"


@pytest.fixture(scope="module")
def stories() -> tuple[Any, Any]:
    import transformers as tf

    if not (STORIES / "model.safetensors").exists():
        pytest.skip(f"stories15m is not at {STORIES}")
    return tf.AutoModelForCausalLM.from_pretrained(STORIES).eval(), tf.AutoTokenizer.from_pretrained(STORIES)


@pytest.mark.parametrize("name", REAL)
def test_scores_of_real_rows_by_a_real_model(name: str, stories: tuple[Any, Any]) -> None:
    path = SHARED / "data" / f"{REAL[name]}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with path.open() as file:
        rows = [json.loads(next(file)) for _ in range(1 if name == "boolq" else 2)]
    model, tokenizer = stories
    assert_scores(model, tokenizer, [get_task(name).example(row, "causal") for row in rows], "causal", 256)


def test_record_is_scored_on_what_differs(tiny: dict[str, tuple[Any, Any]]) -> None:
    """Not on the sentence before the gap, which all entities share: its length has no say in the score."""
    model, tokenizer = tiny["causal"]
    with Scorer(model, "causal", 0) as scorer, torch.no_grad():
        encoder = Encoder(tokenizer, "causal", 320)
        for query in ("@placeholder left.", "Much later, when it was cold and the film was over, @placeholder left."):
            encoded = encoder.encode(get_task("record").example({**NEWS, "query": query}, "causal"))
            texts = [tokenizer.decode(span.targets).strip() for span in encoded.spans]
            assert texts == ["Ann left.", "Kim left.", "Rome left."]
            assert scorer.scores(scorer.collate([encoded])).isfinite().all()


# ---- several right answers, columns of other names ------------------------------------------------------------------------------


def test_several_candidates_may_count_as_right() -> None:
    """An answer among several right ones is right, whichever of them is trained on; without others the label alone is."""
    scores = torch.tensor([[0.0, 1.0, 2.0]] * 3 + [[float("nan")] * 3])
    chosen = torch.tensor([2, 2, 2, -1])
    labels = torch.tensor([0, 0, 2, 0])
    right = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 0]]).bool()
    assert METRICS["accuracy"].measure(Answers(scores, labels, chosen, None, right))["accuracy"] == 0.5
    assert METRICS["accuracy"].measure(Answers(scores, labels, chosen))["accuracy"] == 0.25


class Moods(ClassificationTask):
    name, fields, labels, words = "moods", ("text", "label"), ("low", "high"), (" low", " high")
    aliases: ClassVar = {"text": ("sentence", "review")}

    def prompt(self, row: Row) -> str:
        return self.text(row, "text")


def test_a_column_may_have_another_name(tmp_path: Path) -> None:
    """The field's own name comes first, then its aliases in their order, and --column before both."""
    plain = [{"label": k % 2, "own": f"own {k}", "sentence": f"sentence {k}", "review": f"review {k}"} for k in range(10)]

    def contexts(*drop: str, columns: dict[str, str] | None = None) -> set[str]:
        kept = [{("text" if c == "own" else c): v for c, v in row.items() if c not in drop} for row in plain]
        path = write_jsonl(tmp_path / "rows.jsonl", kept)
        return {
            e.candidates[0].context.split()[0] for e in load_splits(str(path), Moods(), "causal", seed=0, columns=columns).train
        }

    assert contexts() == {"own"} and contexts("own") == {"sentence"} and contexts("own", "sentence") == {"review"}
    assert contexts(columns={"text": "review"}) == {"review"}
    with pytest.raises(UserError, match=r"has the columns label; task moods needs text, label: rename them"):
        contexts("own", "sentence", "review")
