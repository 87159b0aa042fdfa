"""A task of one's own, without Python: made of texts, as a TOML file or the command line has them.

Belongs here: what a description must have, and the two tasks that come of it: answers chosen from words, or written freely. Does not belong here:
where the texts come from (chosen_task.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, ClassVar

from zo_finetune.errors import UserError, did_you_mean
from zo_finetune.tasks.base import OF_SEVERAL_LABELS, Candidate, ClassificationTask, Example, Form, Row, Task, as_number, plain
from zo_finetune.tasks.free_answers import FreeAnswers, digits, spans_of

MASK = "mask"
METRICS_OF_WORDS = ("accuracy", "best-threshold", "macro-f1", "auc", "loss", "predicted")
METRICS_OF_ANSWERS = ("f1", "em", "loss")
CURVES = ("accuracy", "f1", "em")  # those that have a standard error: the first of a task's


class Template:
    """A text with {column} for what a row has there; {{ and }} are braces.

    Raises:
        UserError: begins with `where`, and says what is wrong with the text.
    """

    def __init__(self, where: str, text: str) -> None:
        try:
            self.parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{where}: {error}: a brace that is none of a {{column}} is written twice") from None
        for _, name, spec, conversion in self.parts:
            if name == "":
                raise UserError(f"{where}: {{}} names no column: write its name between the braces")
            if spec or conversion:
                raise UserError(f"{where}: {{{name}}} has more than a column's name: write that alone between the braces")

    @property
    def columns(self) -> list[str]:
        return [name for _, name, _, _ in self.parts if name is not None]

    def pieces(self) -> Iterator[tuple[str, str | None]]:
        """A text, and the column behind it."""
        return ((text, name) for text, name, _, _ in self.parts)

    def fill(self, task: Task, row: Row) -> str:
        return "".join(text + (written(task, row, name) if name is not None else "") for text, name in self.pieces())

    def around_mask(self) -> tuple[Template, Template]:
        """What stands before and after {mask}."""
        at = self.columns.index(MASK)
        before, after = object.__new__(Template), object.__new__(Template)
        before.parts = [*self.parts[:at], (self.parts[at][0], None, None, None)]
        after.parts = self.parts[at + 1 :]
        return before, after


def written(task: Task, row: Row, column: str) -> str:
    """A column as text; of numbers, their digits."""
    value = row[column]
    return task.text(row, column) if isinstance(value, Mapping) else digits(task, value, column)


def behind(prompt: str, answer: str) -> str:
    """An answer with the space that parts it from the prompt: where it begins with a letter or digit and the prompt ends with no white space."""
    apart = prompt[-1:].isspace() or not re.match(r"[A-Za-z0-9]", answer)
    return answer if apart else f" {answer}"


class Words(ClassificationTask):
    template: ClassVar[Template | None]
    before: ClassVar[Template]
    after: ClassVar[Template]

    def prompt(self, row: Row) -> str:
        assert self.template is not None  # `forms` says whether there is one
        return self.template.fill(self, row)

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        """Without blanks before the mask: the word brings its own."""
        return self.before.fill(self, row).rstrip(" "), self.after.fill(self, row)

    def example(self, row: Row, form: Form) -> Example:
        made = super().example(row, form)
        if form == "masked":
            return made
        answers = [behind(c.context, c.answer) for c in made.candidates]
        # the same answer follows the neutral text, where the prompt's last character may have parted the words and this one's does not
        apart = " " if any(behind(self.neutral, answer) != answer for answer in answers) and self.neutral else ""
        candidates = (Candidate(c.context, a, neutral=c.neutral + apart) for c, a in zip(made.candidates, answers, strict=True))
        return Example(tuple(candidates), made.label)


class Answers(FreeAnswers):
    template: ClassVar[Template]
    answer_field: ClassVar[str]

    def prompt(self, row: Row) -> str:
        return self.template.fill(self, row)

    def accepted(self, row: Row) -> tuple[tuple[str, ...], ...]:
        return spans_of(self, row, self.answer_field)


def own_task(
    name: str | None,
    *,
    known: Sequence[str],
    prompt: str | None = None,
    masked: str | None = None,
    words: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    label: str | None = None,
    answer: str | None = None,
    metrics: Sequence[str] | None = None,
    decoding: str | None = None,
    neutral: str | None = None,
) -> Task:
    """The task of a description.

    Args:
        name: of the task; `known`: of others, which it may not have.
        prompt: what a causal model goes on with; masked: the same for a masked model, with {mask} where a word belongs.
        words: the answers to choose from; labels: what they are called, by default as themselves; label: the column that has one of these.
        answer: the column of free answers, instead of words.
        metrics, decoding, neutral: see `Task`.

    Raises:
        UserError: names what is wrong with it.
    """
    if name is None:
        raise UserError("a task of your own needs a name: --task NAME, or name in its file")
    if name in known:
        raise UserError(f"there is a task {name} already: give yours another name, or leave its description out")
    if not re.fullmatch(r"[\w.-]{1,60}", name):
        raise UserError(f"a task's name is of letters, digits, _, - and ., not {name!r:.80}")
    if prompt is None and masked is None:
        raise UserError(f"task {name} has no prompt: say what a model reads, with {{column}} for the text of one")
    if (words is None) == (answer is None):
        raise UserError(f"task {name} needs words to choose from, or the column of free answers, and not both")
    told = words is not None
    texts = {
        what: Template(f"task {name}, {what}", text) for what, text in (("prompt", prompt), ("masked", masked)) if text is not None
    }
    columns = list(dict.fromkeys(c for t in texts.values() for c in t.columns if c != MASK))
    target = (label or "label") if told else str(answer)
    check_texts(name, texts, target)
    if neutral is not None and (column := next((c for c in columns if f"{{{c}}}" in neutral), None)):
        raise UserError(f"task {name}: its neutral has {{{column}}}, and is the same for every row, whose columns it does not read")
    if decoding not in (None, own := "scores" if told else "generate"):
        raise UserError(
            f"task {name}: decoding {decoding!r:.80} is not that of {'words' if told else 'free answers'}, {own}: leave it out"
        )
    common: dict[str, Any] = {
        "name": name,
        "summary": "a task of one's own",
        "fields": (*columns, target),
        "neutral": neutral or "",
        "decoding": own,
    }
    if words is None:
        if labels is not None or label is not None:
            raise UserError(f"task {name}: labels are of words, and its answers are free: leave them out")
        if "masked" in texts:
            raise UserError(f"task {name}: a masked model chooses from words, and its answers are free: leave masked out")
        common["metrics"] = checked_metrics(name, metrics, METRICS_OF_ANSWERS, Answers.metrics)
        return new(Answers, common | {"template": texts["prompt"], "answer_field": target})
    meanings = checked_words(name, words, labels)
    two = len(words) == 2
    choice = [one for one in METRICS_OF_WORDS if two or one not in ("auc", "best-threshold")]
    common["metrics"] = checked_metrics(name, metrics, choice, ClassificationTask.metrics if two else OF_SEVERAL_LABELS)
    if "masked" in texts:
        common["before"], common["after"] = texts["masked"].around_mask()
    forms = tuple(form for form, what in (("causal", "prompt"), ("masked", "masked")) if what in texts)
    more = {"template": texts.get("prompt"), "forms": forms, "words": tuple(words), "labels": meanings, "label_field": target}
    return new(Words, common | more)


def new(kind: type[Task], content: dict[str, Any]) -> Task:
    """An instance of a class of its own: what tasks say of themselves are attributes of classes."""
    made: Task = type(kind.__name__, (kind,), content)()
    return made


def check_texts(name: str, texts: dict[str, Template], target: str) -> None:
    for what, template in texts.items():
        columns, masks = [c for c in template.columns if c != MASK], template.columns.count(MASK)
        if masks != (what == MASK + "ed"):
            raise UserError(
                f"task {name}: masked needs one {{{MASK}}}, where the word belongs"
                if what == "masked"
                else f"task {name}: {{{MASK}}} belongs into masked, the prompt of a masked model"
            )
        if not columns:
            raise UserError(f"task {name}: its {what} has no {{column}}: every row would read the same")
        if target in columns:
            raise UserError(
                f"task {name}: its {what} has {{{target}}}, the column of the answer: a model would read what it is asked"
            )


def checked_metrics(name: str, given: Sequence[str] | None, known: Sequence[str], usual: tuple[str, ...]) -> tuple[str, ...]:
    if given is None:
        return usual
    if not given or len(set(given)) < len(given):
        raise UserError(f"task {name}: metrics are one or more of {', '.join(known)}, none twice")
    for one in given:
        if one not in known:
            raise UserError(f"task {name}: metric {one!r:.80} must be one of {', '.join(known)}{did_you_mean(one, known)}")
    if given[0] not in CURVES:
        first = " or ".join(one for one in known if one in CURVES)
        raise UserError(
            f"task {name}: its first metric is what curves and tables show, {first}, and not {given[0]}: name one of them before it"
        )
    return (*given, *(("loss",) if "loss" not in given else ()))  # which runs are compared by


def checked_words(name: str, words: Sequence[str], labels: Sequence[str] | None) -> tuple[str, ...]:
    """What the words stand for."""
    bare = [word.strip() for word in words]
    if len(words) < 2 or not all(bare):
        raise UserError(f"task {name} needs two or more words to choose from, none of them empty")
    if twin := next((word for word in bare if bare.count(word) > 1), None):
        raise UserError(f"task {name}: the word {twin!r:.80} stands twice: nothing could tell the two apart")
    if len({word[:1].isspace() for word in words}) > 1:
        raise UserError(
            f"task {name}: of its words {', '.join(map(repr, words))} some begin with a blank and others do not: give all with it, or none; a space that "
            "a prompt needs before a word comes by itself"
        )
    meanings = bare if labels is None else [one.strip() for one in labels]
    if len(meanings) != len(words):
        raise UserError(
            f"task {name} has {len(words)} words and {len(meanings)} labels: give one label for each word, in the same order"
        )
    keys = [plain(one) if (value := as_number(one)) is None else str(value) for one in meanings]
    if not all(keys) or len(set(keys)) < len(keys):
        raise UserError(f"task {name}: its labels must be texts that differ, and not only in case or spaces")
    return tuple(meanings)
