"""What a task is: how a row of data becomes a prompt for each candidate answer.

Belongs here: the record types and the two base classes. Does not belong here: any particular task (one file each, beside this one),
tokens (scoring.py), files (data.py), what an answer is worth (metrics/). A task sees rows (dicts) and returns text; it knows neither tokenizer nor model.

To add a task, write a file with a subclass beside this one; nothing lists it:

    fixed answers (SST-2, SST-5, RTE, CB, BoolQ, WSC, WIC, MultiRC, SNLI, MNLI, TREC)
        a `ClassificationTask`: `labels`, `words`, `prompt`, and `masked_prompt` if a masked language model can do it
    answers that differ from row to row (COPA, ReCoRD, WinoGrande)
        a `Task` with its own `example`: one `Candidate` each; `objective = "language-model"` where MeZO trains that
    free answers (SQuAD, DROP)
        `objective = "language-model"`, one candidate, the reference answer
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Row = Mapping[str, Any]
Form = Literal["causal", "masked"]

BETWEEN_SPANS = ", "  # how an answer of several spans is written as one text, and read again
MAX_TEXT = 1_000_000  # characters of a text: beyond any context, and some tokenizers take quadratic time


def plain(name: str) -> str:
    """A class name as it is compared."""
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


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

    def text(self, row: Row, field: str) -> str:
        """A text column with its surrounding white space removed; a value that is no text, is empty, far too long or cannot be
        written in UTF-8 (half of a surrogate pair, as JSON may have) is a `RowError`."""
        value = row[field]
        if not isinstance(value, str) or not value.strip():
            raise RowError(field, value, f"{self.name} needs a text there: correct the row or remove it")
        if len(value) > MAX_TEXT:
            raise RowError(field, value, f"a text has at most {MAX_TEXT:,} characters, this one {len(value):,}: shorten it")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise RowError(field, value, "it holds half of a surrogate pair, which is no character: correct the row or remove it")
        return value.strip()


class ClassificationTask(Task):
    """A task with the same few answers for every row. Trained by cross-entropy over the answers' scores (MeZO, appendix E)."""

    labels: ClassVar[tuple[str, ...]]  # what the labels 0, 1, ... mean
    words: ClassVar[tuple[str, ...]]  # the answer that stands for each label
    label_field: ClassVar[str] = "label"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "auc", "predicted")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.labels

    @abstractmethod
    def prompt(self, row: Row) -> str:
        """The text that a causal model continues with one of `words`."""

    def masked_prompt(self, row: Row) -> tuple[str, str]:
        """The text before and after the mask, for a masked model; only asked of a task that has "masked" among its `forms`."""
        raise NotImplementedError(f"task {self.name} names the form 'masked' without a prompt for it")

    def number(self, name: str) -> int | None:
        """Which label a name stands for: its own in any case, with spaces, - or _ between words, or the only one that begins so ("neg")."""
        key, known = plain(name), [plain(one) for one in self.labels]
        if key in known:
            return known.index(key)
        begun = [k for k, one in enumerate(known) if len(key) >= 3 and one.startswith(key)]
        return begun[0] if len(begun) == 1 else None

    def label(self, row: Row) -> int:
        """The label as an index. It may be given as that number, whole in whatever type, as its decimal string, or by name."""
        value: Any = row[self.label_field]
        meaning = ", ".join(f"{k} ({name})" for k, name in enumerate(self.labels))
        remedy = f"the labels of {self.name} are {meaning}: correct the row, or choose another --task"
        if value is None or value == "" or value != value:
            raise RowError(self.label_field, value, f"the row has no label; {remedy}")
        known: int | float | None = None
        if isinstance(value, (str, bool)):
            known = self.number(str(value))
        if known is None and isinstance(value, str):
            with contextlib.suppress(ValueError):
                known = float(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            known = value
        if known is not None and known in range(len(self.labels)):  # by value: 1.0 is, 0.5 and an infinity are not
            return int(known)
        if known == -1:
            remedy = f"test sets of the hub have -1 in place of labels that are kept secret: evaluate on another split; {remedy}"
        raise RowError(self.label_field, value, remedy)

    def example(self, row: Row, form: Form) -> Example:
        context, tail = (self.prompt(row), "") if form == "causal" else self.masked_prompt(row)
        return Example(tuple(Candidate(context, word, tail, self.neutral) for word in self.words), self.label(row))
