"""MR (Pang and Lee 2005): is a sentence of a film review positive? MeZO has it for masked models alone."""

from __future__ import annotations

from zo_finetune.tasks.sentiment import Sentiment


class MR(Sentiment):
    name = "mr"
    summary = "sentiment of a film review's sentence (causal prompt: ours)"
    source = "cornell-movie-review-data/rotten_tomatoes"
