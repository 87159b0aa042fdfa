"""CR (Hu and Liu 2004): is a sentence of a customer's review positive? MeZO has it for masked models alone."""

from __future__ import annotations

from zo_finetune.tasks.sentiment import Sentiment


class CR(Sentiment):
    name = "cr"
    summary = "sentiment of a customer review's sentence (causal prompt: ours)"
    source = "SetFit/SentEval-CR"
