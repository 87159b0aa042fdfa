"""A linear probe: logistic regression on a model's last hidden states, whose weights stay as they are.

Belongs here: hidden states, the regression, the choice of its one number. Does not belong here: which rows (load.py), what an answer is worth (metrics/),
files (baseline.py).

Of a task with labels, the state is that of the prompt's last token (of a masked model, the mask's), and the classes are the labels. Where candidates
differ from row to row, each has the state of its last token behind the prompt, and one linear score serves all: it is learned from the differences of
the right candidate's state and each other's (of two candidates this is the conditional logit of McFadden 1974). States are standardised by the training
rows, and the penalty is the one of `PENALTIES` with the smallest cross-entropy on the dev rows.

MeZO's linear probing (large_models/trainer.py) is another: scikit-learn's LogisticRegressionCV (ten penalties, five folds) over the states before every
token of the answers, with the tokens as classes, as new rows of the vocabulary head. With one token for an answer the states are the same as here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from zo_finetune.data import in_batches
from zo_finetune.errors import UserError
from zo_finetune.model import LanguageModel
from zo_finetune.scoring import Encoded
from zo_finetune.tasks.base import Form, Task

PENALTIES = tuple(10.0**k for k in range(-4, 5))  # C of scikit-learn: small ones hold the weights small
USUAL = 1.0  # without dev rows whose labels the training rows have
MOST_ITERATIONS = 5000  # MeZO's


@dataclass(frozen=True)
class Spot:
    """Where a state is read: the tokens of an input, and the place of one of them."""

    tokens: tuple[int, ...]
    place: int


@dataclass(frozen=True)
class Probe:
    """A fitted probe. `table`: of the evaluation rows, fp32 [N, C], log-probabilities of labels or scores of candidates; -inf where there is none."""

    table: Tensor
    penalty: float
    dev_losses: dict[float, float]
    width: int  # of a state


def spots(task: Task, example: Encoded, form: Form) -> list[Spot]:
    """Of the prompt alone where the task has labels, whatever they are; else of each candidate."""
    if task.class_names is not None:
        span = example.spans[0]
        tokens = example.inputs[span.row]
        return [Spot(tokens if form == "masked" else tokens[: span.positions[0] + 1], span.positions[0])]
    whole = [example.inputs[s.row][: s.positions[0] + 1] + s.targets for s in example.spans]
    return [Spot(tokens, len(tokens) - 1) for tokens in whole]


@torch.no_grad()
def states(
    language_model: LanguageModel, wanted: Sequence[Spot], batch_size: int, progress: Callable[[int], None] = lambda n: None
) -> Tensor:
    """The last hidden states, fp32 [N, width] on the CPU, by the model without its vocabulary head.

    Raises:
        UserError: the model has none, or they are not finite.
    """
    base = language_model.model.base_model
    found: dict[int, Tensor] = {}
    for part in in_batches(sorted(range(len(wanted)), key=lambda k: len(wanted[k].tokens)), batch_size):
        lengths = [len(wanted[k].tokens) for k in part]
        ids = torch.full((len(part), max(lengths)), language_model.pad_id)
        for row, k in enumerate(part):
            ids[row, : lengths[row]] = torch.tensor(wanted[k].tokens)
        inputs: dict[str, Any] = {"input_ids": ids.to(language_model.device)}
        if language_model.form == "masked":
            inputs["attention_mask"] = (
                (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long().to(language_model.device)
            )
        else:
            inputs["use_cache"] = False
        hidden = getattr(base(**inputs), "last_hidden_state", None)
        if hidden is None or hidden.shape[:2] != ids.shape:
            raise UserError(f"{type(base).__name__} gives no hidden states to probe: choose another --model")
        places = torch.tensor([wanted[k].place for k in part], device=hidden.device)
        found.update(zip(part, hidden[torch.arange(len(part), device=hidden.device), places].float().cpu(), strict=True))
        progress(len(part))
    made = torch.stack([found[k] for k in range(len(wanted))])
    if not made.isfinite().all():
        raise UserError(f"hidden states of the model are not finite in {language_model.model.dtype}: choose another --dtype")
    return made


@dataclass(frozen=True)
class Rows:
    """States of a split: of row n, those from `first[n]` to `first[n + 1]`. `labels`: of the rows, or the right candidates' places in them."""

    states: np.ndarray
    first: list[int]
    labels: np.ndarray
    right: tuple[frozenset[int], ...]

    def table(self, scores: np.ndarray) -> Tensor:
        """[N, C] of a score for each state; -inf where a row has fewer."""
        rows = [torch.from_numpy(scores[a:b]).float() for a, b in zip(self.first, self.first[1:], strict=False)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)


def rows_of(
    task: Task, language_model: LanguageModel, examples: Sequence[Encoded], batch_size: int, progress: Callable[[int], None]
) -> Rows:
    """The states of some examples. `progress`: called with the number of states of each batch that is done."""
    places = [spots(task, example, language_model.form) for example in examples]
    first = np.cumsum([0, *map(len, places)]).tolist()
    found = states(language_model, [spot for row in places for spot in row], batch_size, progress).numpy()
    return Rows(found, first, np.array([e.label for e in examples]), tuple(e.right for e in examples))


class OfLabels:
    """Labels as classes, `labels` of them.

    Raises:
        UserError: the training rows have one alone.
    """

    def __init__(self, train: Rows, labels: int) -> None:
        self.scaler = StandardScaler().fit(train.states)
        self.inputs, self.targets, self.labels = self.scaler.transform(train.states), train.labels, labels
        self.seen = torch.from_numpy(np.unique(train.labels))
        if len(self.seen) < 2:
            raise UserError("all training rows have one label: a probe has nothing to learn from; give other rows, or more of them")

    def tables(self, penalty: float, parts: Sequence[Rows]) -> list[Tensor]:
        """Log-probabilities of the labels, [N, labels] of each part."""
        model = LogisticRegression(C=penalty, max_iter=MOST_ITERATIONS).fit(self.inputs, self.targets)
        found = []
        for rows in parts:
            table = torch.full((len(rows.labels), self.labels), -torch.inf)
            distances = torch.from_numpy(model.decision_function(self.scaler.transform(rows.states)))
            if distances.ndim == 1:  # of two classes, the second one's
                distances = torch.stack((torch.zeros_like(distances), distances), 1)
            table[:, self.seen] = torch.log_softmax(distances, 1).float()
            found.append(table)
        return found


class OfCandidates:
    """One linear score for all candidates. Each difference is there twice, as right minus wrong and as wrong minus right, and all those of a row weigh
    as much as another row's.

    Raises:
        UserError: no training row has a wrong candidate.
    """

    def __init__(self, train: Rows) -> None:
        self.scaler = StandardScaler().fit(train.states)
        inputs, differences, weights = self.scaler.transform(train.states), [], []
        for n, (first, end) in enumerate(zip(train.first, train.first[1:], strict=False)):
            wrong = [k for k in range(end - first) if k != train.labels[n] and k not in train.right[n]]
            differences += [inputs[first + train.labels[n]] - inputs[first + k] for k in wrong]
            weights += [0.5 / len(wrong) for _ in wrong]
        if not differences:
            raise UserError("no training row has a wrong candidate: a probe has nothing to learn from; give other rows")
        self.inputs = np.concatenate([differences, np.negative(differences)])
        self.targets, self.weights = np.repeat([1, 0], len(differences)), np.tile(weights, 2)

    def tables(self, penalty: float, parts: Sequence[Rows]) -> list[Tensor]:
        """Scores of the candidates, [N, C] of each part; -inf where a row has fewer."""
        model = LogisticRegression(C=penalty, max_iter=MOST_ITERATIONS, fit_intercept=False)
        model.fit(self.inputs, self.targets, sample_weight=self.weights)
        return [rows.table(self.scaler.transform(rows.states) @ model.coef_[0]) for rows in parts]


def probe(train: Rows, dev: Rows | None, evaluation: Rows, labels: int | None) -> Probe:
    """Fit on `train`, choose by `dev`, and answer `evaluation`.

    Args:
        labels: how many there are; None: candidates are scored.

    Raises:
        UserError: see `OfLabels` and `OfCandidates`.
    """
    kind = OfCandidates(train) if labels is None else OfLabels(train, labels)
    width = train.states.shape[1]
    if dev is None or (labels is not None and not {*dev.labels} & {*train.labels}):  # none of whose labels has a probability
        return Probe(kind.tables(USUAL, [evaluation])[0], USUAL, {}, width)
    targets = torch.from_numpy(dev.labels)
    losses: dict[float, float] = {}
    tables: dict[float, Tensor] = {}
    for penalty in PENALTIES:
        watched, tables[penalty] = kind.tables(penalty, [dev, evaluation])
        known = watched.gather(1, targets[:, None]).isfinite().squeeze(1)  # training rows may lack a label of dev's
        losses[penalty] = torch.nn.functional.cross_entropy(watched[known], targets[known]).item()
    best = min(losses, key=losses.__getitem__)
    return Probe(tables[best], best, losses, width)
