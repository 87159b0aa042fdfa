"""What stands around an example's question besides the question: demonstrations before it, or nothing that tells the answer.

Belongs here: texts and which rows they are made of. Does not belong here: prompts (tasks/), tokens and truncation (scoring.py), scores (decoding/).

In-context learning as in MeZO (Malladi et al. 2023; large_models/run.py, utils.py): demonstrations are drawn from the training rows anew for every
example, by a seed that depends on its index alone, each is the whole prompt with its right answer, and blank lines join them. Other than there, no
example is shown with its own text, whose label would be the answer, and the numbers drawn are Python's, not NumPy's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from zo_finetune.data import text_of
from zo_finetune.errors import UserError
from zo_finetune.tasks.base import Example

BETWEEN = "\n\n"


class Demonstrations:
    """Draws from `pool`, the training rows: `shots` for each example.

    Raises:
        UserError: (`around`) fewer than `shots` are left without those of the example's own text.
    """

    def __init__(self, pool: Sequence[Example], shots: int, seed: int) -> None:
        self.pool, self.shots, self.seed = pool, shots, seed
        self._texts = [text_of(example) for example in pool]
        self._counts = Counter(self._texts)

    def drawn(self, index: int, example: Example) -> list[int]:
        """Places in the pool, all different, of the demonstrations for the example with this index; a function of seed, index and pool."""
        own = text_of(example)
        if (left := len(self.pool) - self._counts[own]) < self.shots:
            raise UserError(f"--shots {self.shots}: there are {left} training rows to draw from: give fewer, or more rows")
        draw = random.Random((self.seed << 32) + index).random  # the stream that Python promises (data.shuffled)
        found: dict[int, None] = {}
        while len(found) < self.shots:
            if self._texts[place := int(draw() * len(self.pool))] != own:
                found[place] = None
        return list(found)

    def around(self, index: int, example: Example) -> Example:
        """The example behind its demonstrations."""
        before = "".join(demonstration(self.pool[place]) + BETWEEN for place in self.drawn(index, example))
        return replace(example, candidates=tuple(replace(c, context=before + c.context) for c in example.candidates))


def demonstration(example: Example) -> str:
    """The prompt of an example with its answer."""
    candidate = example.candidates[example.label]
    return f"{candidate.context}{candidate.answer}{candidate.tail}".strip()


def neutral(example: Example) -> Example:
    """The same candidates in their neutral surroundings, which tell nothing of the example; no space begins a text, as in MeZO."""
    candidates = []
    for candidate in example.candidates:
        context = candidate.neutral.lstrip(" ")
        answer = candidate.answer if context else candidate.answer.lstrip(" ")
        candidates.append(replace(candidate, context=context, answer=answer, tail=""))
    return Example(tuple(candidates), 0)
