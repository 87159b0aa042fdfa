"""Accuracy where a question has several answers and each is a row of its own (MultiRC): its name says that it is no share of questions."""

from __future__ import annotations

from zo_finetune.metrics.accuracy import Accuracy


class PerAnswerAccuracy(Accuracy):
    name, title = "per-answer-accuracy", "per-answer accuracy"
