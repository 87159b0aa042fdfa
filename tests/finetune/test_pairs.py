"""The objective `pairs`, and batches that hold each label equally often.

Belongs here: which batches there are, which loss a run lowers, what is refused. Does not belong here: the losses' formulas (test_losses.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from zo_finetune import cli
from zo_finetune.config import Config
from zo_finetune.data import Batches
from zo_finetune.errors import UserError
from zo_finetune.files import JOURNAL
from zo_finetune.load import Loaded, load
from zo_finetune.losses import choice_loss, pair_loss
from zo_finetune.objectives import OBJECTIVES, get_objective
from zo_finetune.objectives.pairs import Pairs
from zo_finetune.tasks import get_task

from tests.finetune.conftest import make_rows, write_jsonl
from zo_kernels import journal

COPA = [
    {"premise": f"The cup fell {k} times.", "choice1": "It broke.", "choice2": "I sang.", "question": "effect", "label": k % 2}
    for k in range(30)
]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(1, 3),
    st.integers(0, 2**64 - 1),
)
def test_a_balanced_batch_holds_each_label_equally_often(sizes: list[int], each: int, more: int, micro: int, seed: int) -> None:
    """To within one, in each micro-batch to within one more; over an epoch of its label no item comes again; a function of seed and step."""
    items = [(label, k) for label, size in enumerate(sizes) for k in range(size)]
    labels = [label for label, _ in items]
    size = (len(sizes) * each + more % len(sizes)) * micro
    batches = Batches(items, size, seed, labels)
    found = [batches[s] for s in range(6)]
    again = Batches(items, size, seed, labels)
    assert [again[s] for s in reversed(range(6))] == found[::-1]
    for batch in found:
        counts = Counter(label for label, _ in batch)
        assert len(batch) == size and set(counts) == set(labels) and max(counts.values()) - min(counts.values()) <= 1
        for k in range(micro):
            assert set(counts) == {label for label, _ in batch[k::micro]}
    totals = Counter(label for batch in found for label, _ in batch)
    assert max(totals.values()) - min(totals.values()) <= 1  # over the run, too
    for label, n in enumerate(sizes):
        walk = [item for batch in found for item in batch if item[0] == label]
        for start in range(0, len(walk) - n + 1, n):
            assert len(set(walk[start : start + n])) == n


def test_labels_walk_on_their_own() -> None:
    """Two labels with as many items are not walked through in one order, nor is a seed's walk another's."""
    labels = [0] * 20 + [1] * 20
    walk = [Batches(list(range(40)), 40, seed, labels)[0] for seed in (3, 4)]
    assert [x - 20 for x in walk[0][20:]] != walk[0][:20] != walk[1][:20]
    assert Batches(list(range(40)), 40, 3)[0] == Batches(list(range(40)), 40, 3, [0] * 40)[0]


def loaded(folder: Path, data: Path, **options: Any) -> Loaded:
    sizes = {"train_examples": 12, "dev_examples": 0, "eval_examples": 4, "batch_size": 4}
    return load(Config(model=str(folder), output="", **{"task": "sst2", "data": str(data), "device": "cpu", **sizes, **options}))


def test_what_pairs_lower(model_folder: Callable[[str], Path], data_folder: Path, tmp_path: Path) -> None:
    """Examples against each other where labels are common, candidates of one example where they are not."""
    found = loaded(model_folder("llama"), data_folder, objective="pairs", centre=0.5)
    assert found.labels is not None and len(found.labels) == 12
    assert any("each batch holds negative, positive equally often, as by --balanced" in line for line in found.notes)
    with found.scorer() as scorer, torch.no_grad():
        batch = found.objective.batch(scorer, found.train_set)
        scores = scorer.scores(batch)
        assert torch.equal(found.objective.loss(scorer, batch), pair_loss(scores, torch.tensor(found.labels), 0.5))
    copa = loaded(model_folder("llama"), write_jsonl(tmp_path / "copa.jsonl", COPA), objective="pairs", task="copa")
    assert copa.labels is None and not any("balanced" in line for line in copa.notes)
    with copa.scorer() as scorer, torch.no_grad():
        batch = copa.objective.batch(scorer, copa.train_set)
        assert torch.equal(copa.objective.loss(scorer, batch), choice_loss(scorer.scores(batch), batch.right))
    assert not OBJECTIVES["pairs"].gold_only and OBJECTIVES["pairs"].differentiable and OBJECTIVES["pairs"].captured


def test_balanced_batches_of_other_objectives(model_folder: Callable[[str], Path], data_folder: Path) -> None:
    """The right candidate alone is encoded for the language-model objective; the labels are the rows'."""
    found = loaded(model_folder("llama"), data_folder, objective="language-model", balanced=True)
    assert found.labels is not None and set(found.labels) == {0, 1} and {e.label for e in found.train_set} == {0}
    assert loaded(model_folder("llama"), data_folder).labels is None


def test_a_run(train_command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rare"
    data.mkdir()
    rows = [{"sentence": f"the film was made {k} times", "label": int(k > 1)} for k in range(30)]
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "validation.jsonl", make_rows(12, 2))
    options = {"objective": "pairs", "data": data, "dev_examples": 0, "batch_size": 64, "method": "fzoo"}
    assert cli.main(train_command(tmp_path / "run", "--no-save", **options)) == 0
    said = capsys.readouterr().err
    assert "and each step takes as many" in said and "equally often, as by --balanced" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["hyperparameters"]["objective"] == "pairs" and result["skipped_steps"] == 0


def test_an_interrupted_run_goes_on_with_the_same_batches(
    train_command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of pairs, cut off in step 3 of 5: records and weights are those of a run that nobody disturbed."""
    loss, left = Pairs.loss, [-1]

    def counted(self: Pairs, *args: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(Pairs, "loss", counted)
    options = {"objective": "pairs", "accumulate": 2, "steps": 5, "dev_examples": 0, "eval_examples": 4, "lr": 1e-3}
    for name, calls in (("whole", -1), ("cut", 11)):
        left[0] = calls
        assert cli.main(train_command(tmp_path / name, **options)) == (130 if calls > 0 else 0)
    assert len(journal.read(tmp_path / "cut" / JOURNAL).steps) == 2
    assert cli.main(["resume", str(tmp_path / "cut")]) == 0
    whole, cut = (journal.read(tmp_path / name / JOURNAL).records for name in ("whole", "cut"))
    assert all((whole[field] == cut[field]).all() for field in ("loss", "gradient", "groups"))
    ends = [load_file(next((tmp_path / name / "model").glob("*.safetensors"))) for name in ("whole", "cut")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_choices_without_a_wrong_one(tmp_path: Path) -> None:
    class Row:
        def __init__(self, spans: int, right: tuple[int, ...] = ()) -> None:
            self.spans, self.right, self.label = [None] * spans, frozenset(right), 0

    choices: Any = get_objective("pairs", get_task("record"))
    assert choices.check([Row(2), Row(3, (0, 2))]) == []
    assert choices.check([Row(2), Row(1), Row(2, (0, 1))]) == [
        "2 of 3 training rows have no wrong candidate: --objective pairs learns nothing of them"
    ]
    with pytest.raises(UserError, match="no training row has a wrong one"):
        choices.check([Row(1), Row(2, (0, 1))])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"balanced": True, "task": "copa"}, "--balanced takes as many rows of each label, and task copa has none"),
        ({"objective": "pairs", "batch_size": 4, "task": "sst5"}, "--batch-size 4: a balanced batch holds each of the 5 labels of task sst5"),
        ({"objective": "pairs", "task": "squad"}, "task squad has one candidate for an answer: give loss, language-model, f1"),
        ({"objective": "pairs", "task": "copa", "centre": 0.1}, "--centre 0.1 holds the labels' mean scores together, and task copa has no labels"),
        ({"centre": 0.1}, "--centre 0.1 is of --objective pairs"),
        ({"centre": 0.1, "objective": "auc"}, "--centre 0.1 is of --objective pairs"),
    ],
)  # fmt: skip
def test_what_is_refused(more: dict[str, Any], said: str, data_folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load(Config(model="nowhere", output="", **{"task": "sst2", "data": str(data_folder), **more}))


def test_a_label_without_rows(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [row for row in make_rows(60, 2) if row["label"] == 1]
    with pytest.raises(UserError, match="none of the 12 training rows is 'negative': add such rows"):
        loaded(model_folder("llama"), write_jsonl(tmp_path / "one.jsonl", rows), balanced=True)
