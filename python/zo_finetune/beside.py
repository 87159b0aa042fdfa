"""What is measured beside the task, before a training and after it: what a model has forgotten, and how it goes on with a text.

Belongs here: the loss of plain language modelling on texts of another kind, and greedy continuations. Does not belong here: the task's own evaluation
(evaluate.py), when either is made (run.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zo_finetune import console
from zo_finetune.data import in_batches
from zo_finetune.decoding.generate import Generation, write
from zo_finetune.errors import UserError, one_line
from zo_finetune.files import path_of
from zo_finetune.scoring import Encoded, Encoder, Scorer, Span

LOSS, CONTINUED = "language_model_loss", "continuations"  # in an evaluation
ROWS = 4  # texts at once: each of their tokens has logits
MOST_BYTES = 1 << 24


def read_texts(path: str) -> list[str]:
    """The texts of a file, which empty lines part.

    Raises:
        UserError: there is no such file, it is no text, or has none.
    """
    file = path_of("--language-texts", path)
    if not file.is_file():
        raise UserError(
            f"--language-texts {path}: there is no such file: give one of plain text, with empty lines between the texts"
        )
    if (size := file.stat().st_size) > MOST_BYTES:
        raise UserError(f"--language-texts {path} has {size:,} bytes, and at most {MOST_BYTES:,} are read: give a part of it")
    try:
        parts = file.read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--language-texts {path} cannot be read: {one_line(error)}; give a file of UTF-8 text") from error
    if not (texts := [" ".join(part.split()) for part in parts if part.strip()]):
        raise UserError(f"--language-texts {path} has no text: give a file with some, and empty lines between them")
    return texts


class Beside:
    """What a run measures beside its task.

    Args:
        texts: a file of texts, or None.
        continued: texts that the model goes on with.

    Raises:
        UserError: as `read_texts`; a masked model has no next token; or a text has none that could be predicted.
    """

    def __init__(self, encoder: Encoder, texts: str | None, continued: Sequence[str]) -> None:
        option = f"--language-texts {texts}" if texts is not None else f"--continue {continued[0]!r:.80}" if continued else None
        if option is not None and encoder.form == "masked":
            raise UserError(f"{option}: a masked language model predicts no next token: leave it out")
        self.prompts = list(continued)
        self._prompts = [self._encoded(encoder, text, "--continue") for text in self.prompts]
        self.texts = [self._encoded(encoder, text, "--language-texts") for text in ([] if texts is None else read_texts(texts))]

    @staticmethod
    def _encoded(encoder: Encoder, text: str, option: str) -> Encoded:
        """Every token but the first is predicted."""
        ids = [*encoder.before, *encoder.tokenizer(text, add_special_tokens=False).input_ids][: encoder.max_length]
        if len(ids) < 2 or (encoder.vocabulary is not None and max(ids) >= encoder.vocabulary):
            raise UserError(f"{option}: {text!r:.80} has no token that the model could predict: leave it out")
        span = Span(0, tuple(range(len(ids) - 1)), tuple(ids[1:]))
        return Encoded((tuple(ids[:-1]),), (span,), 0, prompt=tuple(ids))

    @torch.no_grad()
    def measure(self, scorer: Scorer) -> dict[str, Any]:
        """Its keys of an evaluation: the mean loss of a token over all texts, in nats; each text to go on with, and what the model writes."""
        found: dict[str, Any] = {}
        if self.texts:
            total = count = 0.0
            with console.Phase("plain language modelling"):
                for part in in_batches(self.texts, ROWS):
                    batch = scorer.collate(part)
                    total -= scorer.token_log_probs(batch).double().sum().item()
                    count += batch.present.sum().item()
            found[LOSS] = total / count
        if self._prompts:
            with console.Phase("going on with texts"):
                written = write(scorer, Generation().batch(scorer, self._prompts))
            found[CONTINUED] = [{"text": text, "continued": more} for text, more in zip(self.prompts, written, strict=True)]
        return found


def say(when: str, evaluation: Mapping[str, Any]) -> None:
    """The lines about it."""
    if LOSS in evaluation:
        console.say(f"{when} plain language modelling {evaluation[LOSS]:.4f} nats a token")
    for one in evaluation.get(CONTINUED, ()):
        console.say(f"{when} {one['text']!r} goes on {one['continued']!r}")
