"""What a task is: how a row of data becomes a prompt for each candidate answer.

Belongs here: the record types, the two base classes and what all tasks read from a row. Does not belong here: any particular task or
family of tasks (one file each, beside this one), tokens (scoring.py), files (data.py),
what an answer is worth (metrics/). A task sees rows (dicts) and returns text; it knows neither tokenizer nor model.

To add a task, write a file with a subclass beside this one; nothing lists it:

    fixed answers (SST-2)
        a `ClassificationTask`: `labels`, `words`, `prompt`, and `masked_prompt` if a masked language model can do it; families of them
        are in sentiment.py, entailment.py and yes_no.py
    answers that differ from row to row (COPA, ReCoRD, WinoGrande)
        a `Task` with its own `example`: one `Candidate` each; `objective = "language-model"` where MeZO trains that
    free answers (SQuAD, DROP)
        `FreeAnswers` in free_answers.py: `prompt`, and the answers that are accepted
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Row = Mapping[str, Any]
Form = Literal["causal", "masked"]

BETWEEN_SPANS = ", "  # how an answer of several spans is written as one text, and read again
OF_SEVERAL_LABELS = ("accuracy", "loss", "predicted")  # metrics of a task with more than two: AUC is of two
MAX_TEXT = 1_000_000  # characters of a text: beyond any context, and some tokenizers take quadratic time


def plain(name: str) -> str:
    """A class name as it is compared."""
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def as_number(text: Any) -> float | None:
    """A finite number in whatever type, or as text; None for anything else."""
    try:
        number = float(text) if isinstance(text, (int, float, str)) and not isinstance(text, bool) else None
    except (ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None


def whole(value: Any) -> int | None:
    """A whole number in whatever type, or as its decimal string; None for anything else."""
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None


def decapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


@dataclass(frozen=True)
class Candidate:
    """One possible answer, in its place.

    A causal model reads `context` and is scored on `answer` (the tail is not read). A masked model reads `context`, as many
    mask tokens as `answer` has tokens, then `tail`. Whatever separates the words belongs to the strings: the answer usually
    starts with a space. Where candidates differ in the context and share the answer (WinoGrande), the scores compare how well
    the same answer follows.

    `neutral` stands in place of `context` where it is asked how likely the answer is anyway: MeZO's calibrated score is the sum of the answer's
    log-probabilities after `context` minus that after `neutral`."""

    context: str
    answer: str
    tail: str = ""
    neutral: str = ""


@dataclass(frozen=True)
class Example:
    """A row, ready to be scored or answered.

    candidates: the possible answers; of a free answer the one reference that is trained on.
    label: the candidate that is trained on, and a demonstration's answer: `context + answer + tail`.
    right: every index that counts as right, where there are several; empty: `label` alone.
    references: of a free answer, each accepted answer as the tuple of its spans; empty where candidates are chosen from.
    """

    candidates: tuple[Candidate, ...]
    label: int
    right: frozenset[int] = frozenset()
    references: tuple[tuple[str, ...], ...] = ()


class RowError(ValueError):
    """A row that a task cannot use. Whoever knows the file and the row number adds them (data.py)."""

    def __init__(self, field: str, value: Any, remedy: str) -> None:
        shown = repr(value)
        super().__init__(f"field {field!r} is {shown if len(shown) <= 80 else shown[:77] + '...'}; {remedy}")


class Task(ABC):
    """Rows to examples. Subclasses are stateless: one instance serves every split."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for `--help`
    fields: ClassVar[tuple[str, ...]]  # the columns a row must have
    aliases: ClassVar[
        Mapping[str, tuple[str, ...]]
    ] = {}  # field -> other names of its column, in order: where its own is no column
    source: ClassVar[str | None] = None  # the default --data: a data set on the hub
    source_config: ClassVar[str | None] = None  # and its configuration
    neutral: ClassVar[str] = ""  # of candidates: see there
    objective: ClassVar[str] = "classification"  # what is trained: a file of objectives/, by its name
    forms: ClassVar[tuple[Form, ...]] = ("causal",)
    decoding: ClassVar[str] = "scores"  # how an answer comes about: a file of decoding/
    comparison: ClassVar[str] = "squad"  # of free answers with the accepted ones: a scorer of metrics/texts.py
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")  # files of metrics/; the first is what curves and tables show

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the candidates if they are the same for every row, else None."""
        return None

    @abstractmethod
    def example(self, row: Row, form: Form) -> Example:
        """The example of one row.

        Args:
            row: the columns named in `fields`, perhaps among others.
            form: whose prompt to make; one of `forms`.

        Raises:
            RowError: a value does not belong to the task.
        """

    def specimen(self) -> Row:
        """A row in which every text is its field's name in braces, to show what becomes of it (docs/tasks.md)."""
        return {field: f"{{{field}}}" for field in self.fields}

    def text(self, row: Row, field: str) -> str:
        """The text of a column, or, where that holds a record (SuperGLUE's `target`), of its entry of the field's name."""
        value = row[field]
        return self.clean(value.get(field) if isinstance(value, Mapping) else value, field)

    def clean(self, value: Any, field: str) -> str:
        """A text with its surrounding white space removed; a value that is no text, is empty, far too long or cannot be written in UTF-8
        (half of a surrogate pair, as JSON may have) is a `RowError`."""
        if not isinstance(value, str) or not value.strip():
            raise RowError(field, value, f"{self.name} needs a text there: correct the row or remove it")
        if len(value) > MAX_TEXT:
            raise RowError(field, value, f"a text has at most {MAX_TEXT:,} characters, this one {len(value):,}: shorten it")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise RowError(field, value, "it holds half of a surrogate pair, which is no character: correct the row or remove it")
        return value.strip()

    def index(self, row: Row, field: str, count: int) -> int:
        """The number of one of `count` candidates, from 0; anything else is a `RowError`."""
        number = whole(row[field])
        if number is None or not 0 <= number < count:
            raise RowError(
                field, row[field], f"{self.name} needs a whole number there, 0 to {count - 1}: correct the row or remove it"
            )
        return number


class ClassificationTask(Task):
    """A task with the same few answers for every row. Trained by cross-entropy over the answers' scores (MeZO, appendix E)."""

    labels: ClassVar[tuple[str, ...]]  # what the labels 0, 1, ... mean
    words: ClassVar[tuple[str, ...]]  # the answer that stands for each label
    synonyms: ClassVar[Mapping[str, str]] = {}  # other names of labels, as data sets have them -> the label
    unlabelled: ClassVar[
        tuple[Any, ...]
    ] = ()  # what stands for no label by the data's own documentation: such rows are left out, and counted
    label_field: ClassVar[str] = "label"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "auc", "predicted", "best-threshold")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels

    def specimen(self) -> Row:
        return {**super().specimen(), self.label_field: 0}

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """The text that a causal model continues with one of `words`."""

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        """The text before and after the mask, for a masked model; only asked of a task that has "masked" among its `forms`. In the mask's place a
        word has a space before it, wherever it stands: so it is one token of RoBERTa's."""
        raise NotImplementedError(f"task {self.name} names the form 'masked' without a prompt for it")

    def number(self, name: str) -> int | None:
        """Which label a name stands for: its own in any case, with spaces, - or _ between words, a synonym, or the only one that begins so ("neg").
        Of names that are numbers, the one of the same value."""
        known = [plain(one) for one in self.labels]
        key = plain(self.synonyms.get(plain(name), name))
        if key in known:
            return known.index(key)
        if (value := as_number(name)) is not None:
            return next((k for k, one in enumerate(self.labels) if as_number(one) == value), None)
        begun = [k for k, one in enumerate(known) if len(key) >= 3 and one.startswith(key)]
        return begun[0] if len(begun) == 1 else None

    def label(self, row: Row) -> int:
        """The label as an index. It may be given as that number, whole in whatever type, as its decimal string, or by name; where names of labels are
        numbers themselves, a number is a name."""
        value: Any = row[self.label_field]
        named = any(as_number(one) is not None for one in self.labels)
        meaning = ", ".join(name if named else f"{k} ({name})" for k, name in enumerate(self.labels))
        remedy = f"the labels of {self.name} are {meaning}: correct the row, or choose another --task"
        if value is None or value == "" or value != value:
            raise RowError(self.label_field, value, f"the row has no label; {remedy}")
        known = self.number(str(value)) if named or isinstance(value, (str, bool)) else None
        if known is None and not named:
            known = whole(value)
        if known is not None and 0 <= known < len(self.labels):
            return known
        if known == -1:
            remedy = f"test sets of the hub have -1 in place of labels that are kept secret: evaluate on another split; {remedy}"
        raise RowError(self.label_field, value, remedy)

    def example(self, row: Row, form: Form) -> Example:
        if form == "causal":
            (context, tail), words = (self.prompt(row), ""), self.words
        else:
            (context, tail), words = self.masked_prompt(row), tuple(f" {word.lstrip()}" for word in self.words)
        return Example(tuple(Candidate(context, word, tail, self.neutral) for word in words), self.label(row))
