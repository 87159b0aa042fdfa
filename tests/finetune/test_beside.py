"""What is measured beside the task: the loss of plain language modelling, and greedy continuations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import model as models
from zo_finetune import plain_texts
from zo_finetune.beside import Beside, read_texts
from zo_finetune.cli import main
from zo_finetune.scoring import Encoder, Scorer

TEXTS = "The film\nwas great.\n\n\nIt was terrible, and the film was long.\r\n\r\nThe end.\n"


@torch.no_grad()
def test_the_loss_is_that_of_each_next_token(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Of all tokens of all texts alike, against the model's own loss."""
    (tmp_path / "texts").write_text(TEXTS)
    lm = models.load(str(model_folder("llama")), device="cpu")
    encoder = Encoder(lm.tokenizer, lm.form, lm.max_length, lm.vocabulary)
    assert read_texts(str(tmp_path / "texts")) == ["The film was great.", "It was terrible, and the film was long.", "The end."]
    total = count = 0.0
    for text in read_texts(str(tmp_path / "texts")):
        ids = torch.tensor([lm.tokenizer(text).input_ids])
        total += lm.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    with Scorer(lm.model, lm.form, lm.pad_id, lm.tokenizer, lm.max_length) as scorer:
        found = Beside(encoder, str(tmp_path / "texts"), ["It was"]).measure(scorer)
        ids = torch.tensor([lm.tokenizer("It was").input_ids])
        more = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, eos_token_id=2, pad_token_id=0
        )
        written = lm.tokenizer.decode(more[0, ids.shape[1] :], skip_special_tokens=True)
        assert Beside(encoder, None, []).measure(scorer) == {}
    assert found["language_model_loss"] == pytest.approx(total / count, rel=1e-5)
    (one,) = found["continuations"]
    assert one["text"] == "It was" and one["continued"] and written.lstrip().startswith(one["continued"][:10])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"language_texts": "/nowhere/texts"}, "--language-texts /nowhere/texts: there is no such file"),
        ({"language_texts": "EMPTY"}, "has no text: give a file with some"),
        ({"language_texts": "BYTES"}, "cannot be read"),
        ({"language_texts": "TEXTS", "model": "roberta"}, "a masked language model predicts no next token"),
        ({"continue": "It was", "model": "roberta"}, "--continue 'It was': a masked language model predicts no next token"),
    ],
)
def test_what_is_refused(options: dict[str, str], said: str, train_command: Any, tmp_path: Path, capsys: Any) -> None:
    for name, content in {"EMPTY": b"\n \n\n", "BYTES": b"\xff\xfe\xfa", "TEXTS": TEXTS.encode()}.items():
        (tmp_path / name).write_bytes(content)
    if options.get("language_texts", "").isupper():
        options = {**options, "language_texts": str(tmp_path / options["language_texts"])}
    assert main(train_command(tmp_path / "run", **options)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_tells_both(train_command: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "texts").write_text(TEXTS)
    assert (
        main(
            train_command(
                tmp_path / "run", language_texts=tmp_path / "texts", **{"continue": "The film", "dev_examples": 0, "lr": "1e-2"}
            )
        )
        == 0
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"]["language_model_loss"] != result["after"]["language_model_loss"]
    assert result["before"]["continuations"][0]["text"] == "The film"
    said = capsys.readouterr().err
    assert "before: plain language modelling" in said and "after:  'The film' goes on" in said


def test_the_texts_are_twenty_paragraphs() -> None:
    assert len(set(plain_texts.TEXTS)) == 20 and all(150 < len(text) < 400 and text.isascii() for text in plain_texts.TEXTS)
