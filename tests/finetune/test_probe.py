"""`zo-finetune probe`: scikit-learn on hidden states read one text at a time, for labels and for candidates, causal and masked.

Belongs here: which states, the regression, the choice of its penalty. Does not belong here: rows, the folder (test_evaluate.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from zo_finetune import probe
from zo_finetune.cli import main
from zo_finetune.config import Probing
from zo_finetune.data import load_splits
from zo_finetune.errors import UserError
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Example

from tests.finetune.conftest import make_rows, write_jsonl

ModelFolder = Callable[[str], Path]
CLOSE = {"abs": 2e-3}  # states of padded batches differ by fp32's rounding, and the regressions by what they stop at


@pytest.fixture
def command(model_folder: ModelFolder, tmp_path: Path) -> Callable[..., list[str]]:
    def build(data: Path, *more: str, model: str = "llama", task: str = "sst2", output: str = "out") -> list[str]:
        where = ["--model", str(model_folder(model)), "--data", str(data), "--task", task, "--output", str(tmp_path / output)]
        return ["probe", *where, "--device", "cpu", "--batch-size", "7", *more]

    return build


def result_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "result.json").read_text()), [json.loads(line) for line in lines]


def pairs(n: int) -> list[dict[str, Any]]:
    """COPA's columns; the right choice is the one with a fine word."""
    made = make_rows(2 * n, 4)
    rows = []
    for k in range(n):
        choices = [made[2 * k]["sentence"], made[2 * k + 1]["sentence"]]  # dull, fine
        right = k % 3 == 0
        first, second = choices if right else choices[::-1]
        rows.append({"premise": f"film {k}", "choice1": first, "choice2": second, "question": "cause", "label": int(right)})
    return rows


class States:
    """Last hidden states of one text at a time, as transformers has them."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, texts: list[str], mask: bool = False) -> np.ndarray:
        found = []
        for text in texts:
            ids = self.tokenizer(text, return_tensors="pt").input_ids
            place = ids[0].tolist().index(self.tokenizer.mask_token_id) if mask else -1
            found.append(self.model(ids).last_hidden_state[0, place])
        return torch.stack(found).numpy()


def log_probs(model: LogisticRegression, states: np.ndarray) -> np.ndarray:
    """Of two classes. `predict_log_proba` takes the logarithm of 1 - p as fp32 has it, which for a sure answer is another number."""
    margins = model.decision_function(states).astype(np.float64)
    return -np.logaddexp(0.0, np.stack((margins, -margins), 1))


def by_hand(
    train: np.ndarray, labels: list[int], dev: np.ndarray, dev_labels: list[int], test: np.ndarray
) -> tuple[float, np.ndarray]:
    """(C, log-probabilities of the test rows) of the regression with the smallest cross-entropy on the dev rows."""
    scaler = StandardScaler().fit(train)
    best: tuple[float, float, np.ndarray] = (np.inf, 0.0, train)
    for c in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4):
        model = LogisticRegression(C=c, max_iter=5000).fit(scaler.transform(train), labels)
        loss = -np.mean(log_probs(model, scaler.transform(dev))[np.arange(len(dev)), dev_labels])
        if loss < best[0]:
            best = (float(loss), c, log_probs(model, scaler.transform(test)))
    return best[1:]


@pytest.mark.parametrize("model", ["llama", "roberta"])
def test_a_probe_is_scikit_learn_on_the_last_hidden_states(
    model: str, command: Callable[..., list[str]], model_folder: ModelFolder, data_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Of the prompt's last token, or of the mask; the rows are those of a run."""
    assert main(command(data_folder, "--seed", "1", "--dev-examples", "20", model=model)) == 0
    result, predictions = result_of(tmp_path / "out")
    splits = load_splits(str(data_folder), get_task("sst2"), "masked" if model == "roberta" else "causal", dev_examples=20, seed=1)
    read = States(model_folder(model))

    def texts(rows: list[Example]) -> list[str]:
        return [e.candidates[0].context + ("<mask>." if model == "roberta" else "") for e in rows]

    train, dev, test = (read(texts(rows), model == "roberta") for rows in (splits.train, splits.dev, splits.eval))
    penalty, wanted = by_hand(train, [e.label for e in splits.train], dev, [e.label for e in splits.dev], test)
    assert result["probe"]["penalty"] == penalty and result["probe"]["width"] == 32
    assert result["probe"]["train_rows"] == 40 and result["probe"]["dev_rows"] == 20 and len(result["probe"]["dev_losses"]) == 9
    assert np.array([p["scores"] for p in predictions]) == pytest.approx(wanted, **CLOSE)
    assert [p["row"] for p in predictions] == splits.rows["eval"]
    assert result["majority"] == 0.5 and result["rows"] == 30
    if model == "llama":  # the random masked model says nothing of a sentence in its mask's place
        assert result["metrics"]["accuracy"] >= 0.7
    assert capsys.readouterr().out.startswith("linear probe: accuracy ")


def test_candidates_of_their_own_share_a_score(
    command: Callable[..., list[str]], model_folder: ModelFolder, tmp_path: Path
) -> None:
    """COPA: regression without intercept on the difference of the right candidate's state and the other's."""
    rows = pairs(60)
    write_jsonl(tmp_path / "train.jsonl", rows[:40])
    write_jsonl(tmp_path / "validation.jsonl", rows[40:])
    assert main(command(tmp_path, "--dev-examples", "0", task="copa")) == 0
    result, predictions = result_of(tmp_path / "out")
    splits, read = load_splits(str(tmp_path), get_task("copa"), "causal", dev_examples=0, seed=0), States(model_folder("llama"))
    train, test = ([read([c.context + c.answer for c in e.candidates]) for e in rows] for rows in (splits.train, splits.eval))
    scaler = StandardScaler().fit(np.concatenate(train))
    differences = np.stack(
        [scaler.transform(s)[e.label] - scaler.transform(s)[1 - e.label] for s, e in zip(train, splits.train, strict=True)]
    )
    model = LogisticRegression(C=1.0, max_iter=5000, fit_intercept=False)
    model.fit(np.concatenate([differences, -differences]), [1] * 40 + [0] * 40, sample_weight=[0.5] * 80)
    for said, states in zip(predictions, test, strict=True):
        scores = scaler.transform(states) @ model.coef_[0]
        assert said["scores"][1] - said["scores"][0] == pytest.approx(scores[1] - scores[0], **CLOSE)
    assert result["metrics"]["accuracy"] > 0.8 and result["majority"] is None and result["probe"]["penalty"] == 1.0


def rows_of(states: list[list[float]], labels: list[int], each: int = 1, right: list[set[int]] | None = None) -> probe.Rows:
    first = [*range(0, len(states) + 1, each)]
    sets = tuple(frozenset(r) for r in right or [set()] * len(labels))
    return probe.Rows(np.array(states, dtype=np.float32), first, np.array(labels), sets)


def test_labels_that_training_lacks() -> None:
    """They have no score, and dev rows that have them are passed over."""
    train = rows_of([[0.0], [0.1], [1.0], [1.1]], [0, 0, 2, 2])
    made = probe.probe(train, rows_of([[0.0], [5.0], [1.0]], [0, 1, 2]), rows_of([[0.0], [1.0]], [0, 1]), 3)
    assert made.table[:, 1].tolist() == [-torch.inf] * 2 and made.table.argmax(1).tolist() == [0, 2]
    assert all(np.isfinite(loss) for loss in made.dev_losses.values())
    unseen = probe.probe(train, rows_of([[0.0]], [1]), rows_of([[0.0], [1.0]], [0, 1]), 3)  # nothing to choose by
    assert (unseen.penalty, unseen.dev_losses) == (probe.USUAL, {}) and unseen.table.argmax(1).tolist() == [0, 2]


def test_every_right_candidate_is_spared() -> None:
    """A second right candidate is not taken for a wrong one: what sets it apart from the first says nothing."""
    states = [[1.0, 0.3], [0.0, -0.3], [1.2, 9.0], [0.9, -0.1], [0.1, 0.1], [1.1, 9.1]]
    asked = rows_of([[0.0, -9.0], [1.0, 0.0], [0.5, 0.0]], [1], 3)
    assert probe.probe(rows_of(states, [0, 0], 3, [{0, 2}, {0, 2}]), None, asked, None).table.argmax(1).tolist() == [1]
    assert probe.probe(rows_of(states, [0, 0], 3), None, asked, None).table.argmax(1).tolist() == [0]


def test_mistakes_are_one_line(command: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> None:
    same = [{**row, "label": 1} for row in make_rows(30, 2)]
    assert main(command(write_jsonl(tmp_path / "same.jsonl", same))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said
        == "zo-finetune: error: all training rows have one label: a probe has nothing to learn from; give other rows, or more of them"
    )
    with pytest.raises(UserError, match=r"--batch-size 0 must be greater than 0"):
        Probing(model="m", task="sst2", data="d", output="o", batch_size=0).check()
    with pytest.raises(UserError, match=r"no training row has a wrong candidate"):
        probe.probe(rows_of([[1.0], [2.0]], [0, 0]), None, rows_of([[1.0]], [0]), None)
    assert not (tmp_path / "out").exists()
