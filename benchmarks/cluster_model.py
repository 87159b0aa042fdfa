"""How long workers take for a step, a round of losses, a visit of all blocks, and a run in which some die.

Belongs here: the model of cluster.py, as functions of numbers. Does not belong here: the numbers, and what follows.

A worker makes its cells of the table of losses one after another; its time in a step is theirs times 1 + X, X exponential, plus, rarely, a pause. The step
takes the slowest of all workers' times. In an exchange each worker sends its losses to all others at once; a ring and a tree, which the library does not make,
are here beside it. A message of gloo's crosses a link twice: who receives says that it is ready, then the numbers come.

Blocks of weights come over one link into two slots: the next one comes while one is used, into the slot that the one before it has left. A worker that dies
stops all: they start again, replay the journal, and go on with the step that was under way; what dies meanwhile begins that anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zo_kernels.optim.workers import FRAME, HEAD


@dataclass(frozen=True)
class Delays:
    """How late a worker is: the mean of X, the probability of a pause, and its seconds."""

    jitter: float = 0.0
    pauses: float = 0.0
    pause: float = 0.0


def slowest(each: Sequence[float], delays: Delays, steps: int, draw: np.random.Generator) -> Any:
    """Seconds until the last worker has made its cells, of so many steps [steps]. each: of each worker's cells, without delays. Of n workers alike the latest
    is drawn at once: its distribution function is one's to the power n."""
    worst = np.zeros(steps)
    for own, count in zip(*np.unique(each, return_counts=True), strict=True):
        pausing = draw.binomial(count, delays.pauses, steps)
        for several, extra in ((count - pausing, 0.0), (pausing, delays.pause)):
            # 1 - U^(1/n), without losing what is near 1
            last = -np.log(-np.expm1(np.log(draw.random(steps)) / np.maximum(several, 1)))
            worst = np.maximum(worst, np.where(several > 0, own * (1 + delays.jitter * last) + extra, 0.0))
    return worst


EXCHANGES = ("losses", "a ring", "a tree")  # as in ranks.csv; the first is the library's


def links(kind: str, workers: int) -> int:
    """How many links an exchange crosses, one after another. In a tree all receivers are ready from the start, in a ring each for its next two messages, which
    are halves of one worker's losses."""
    if workers == 1:
        return 0
    return {"losses": 2, "a ring": 2 * (workers - 1), "a tree": 1 + math.ceil(math.log2(workers))}[kind]


def messages(kind: str, workers: int) -> int:
    """How many others a worker sends to, or how often."""
    return math.ceil(math.log2(workers)) if kind == "a tree" else workers - 1


def exchange(kind: str, workers: int, link: float, software: float, once: float) -> float:
    """Seconds of an exchange of a few numbers.

    Args:
        link: seconds of the longest one. software: seconds of each message beside it; once: of an exchange.
    """
    return links(kind, workers) * link + (messages(kind, workers) * software + once if workers > 1 else 0.0)


def forwards(share: Sequence[int], batches: int) -> tuple[int, ...]:
    """How many of a share's points each visit of the blocks serves: every one makes its next micro-batch."""
    counts = Counter(cell // batches for cell in share).values()
    return tuple(sum(count > visit for count in counts) for visit in range(max(counts)))


def frame(share: int) -> int:
    """Bytes that a worker says to each other one in a round of losses."""
    return 8 * (HEAD + max(FRAME - HEAD, share))


def rounds(share: int, journal: bool = True) -> int:
    """Exchanges of a step with one table of losses."""
    return 1 + (share > FRAME - HEAD) + journal


def visits(uploads: Sequence[float], computes: Sequence[float]) -> float:
    """Seconds of one visit of all blocks: two slots, one link, one device."""
    arrived, used = [0.0], [0.0]
    for k, (up, use) in enumerate(zip(uploads, computes, strict=True)):
        arrived.append(max(arrived[-1], used[max(0, k - 1)]) + up)
        used.append(max(arrived[-1], used[-1]) + use)
    return used[-1]


def run(
    steps: int, step: float, losses: float, restart: float, replay: float, draw: np.random.Generator, kept: int = 0, most: float = math.inf
) -> tuple[float, int]:  # fmt: skip
    """Seconds until so many steps are done, and how often it was begun again; infinite after `most`.

    Args:
        losses: a second, of all workers together. restart: seconds; replay: of each step that was done, or that was done since a multiple of `kept`.
    """
    seconds, done, ready, deaths = 0.0, 0, 0.0, 0
    while seconds <= most:
        gap = draw.exponential(1 / losses) if losses else math.inf
        left = ready + (steps - done) * step
        if gap >= left:
            return seconds + left, deaths
        seconds, deaths = seconds + gap, deaths + 1
        if gap > ready:
            done += int((gap - ready) / step)
        ready = restart + replay * (done % kept if kept else done)
    return math.inf, deaths
