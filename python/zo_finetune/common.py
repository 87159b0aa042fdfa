"""What the runs of one comparison have in common, made once: the base model, the rows, the hidden states of what is frozen.

Belongs here: what may be handed from one run to the next, so that it has the bits that it would have alone. Does not belong here: how any of it is
made (model.py, data.py, cached.py).

A run alone makes each of these as a function of its configuration; here they are kept by what they are a function of. The weights that a run trained go back
to a copy that was taken before the first one's, so the model is handed on only where that copy is small against it; frozen weights nobody writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from torch import Tensor

from zo_finetune.config import Config
from zo_finetune.data import Splits
from zo_finetune.model import LanguageModel
from zo_kernels.quantized import trained_weights

T = TypeVar("T")

MOST_TRAINED = 0.5  # of a model's bytes: the copy of what a run trains, in host memory
# Options that neither the base model, nor rows, nor hidden states are a function of; a difference of any other keeps runs apart.
OWN = (
    "method",
    "options",
    "objective",
    "centre",
    "balanced",
    "steps",
    "lr",
    "eps",
    "seed",
    "eval_every",
    "keep",
    "output",
    "save",
    "overwrite",
)


class Common:
    """Kept from run to run. One model at a time."""

    def __init__(self) -> None:
        self._splits: dict[str, Splits] = {}
        self._model: tuple[str, LanguageModel, dict[str, Tensor]] | None = None
        self._kept: dict[str, Any] = {}

    def splits(self, config: Config, seed: int, read: Callable[[], Splits]) -> Splits:
        """The rows, read once for each seed of their sample."""
        return _once(self._splits, _text(config, seed), read)

    def model(self, config: Config) -> LanguageModel | None:
        """The model of the runs before, with the weights that it was loaded with; None: there is none."""
        if self._model is None or self._model[0] != _of_model(config):
            self._model = None
            self._kept.clear()
            return None
        _, lm, start = self._model
        for name, tensor in _changing(lm).items():
            tensor.data.copy_(start[name])
            tensor.grad = None
        return lm

    def hold(self, config: Config, lm: LanguageModel) -> None:
        """Hand on a model that was just loaded, if what is trained of it is little."""
        mine = _changing(lm)
        if self._model is None and sum(t.nbytes for t in mine.values()) <= MOST_TRAINED * sum(
            p.nbytes for p in lm.model.parameters()
        ):
            self._model = (_of_model(config), lm, {name: t.detach().to("cpu", copy=True) for name, t in mine.items()})

    def kept(self, config: Config, lm: LanguageModel, more: Sequence[Any], make: Callable[[], T]) -> T:
        """What `make` returns, made once for each configuration with `more` as long as this model is handed on."""
        if self._model is None or self._model[1] is not lm:
            return make()
        return _once(self._kept, _text(config, *more), make)


def _once(known: dict[str, T], key: str, make: Callable[[], T]) -> T:
    if key not in known:
        known[key] = make()
    return known[key]


def _text(config: Config, *more: Any) -> str:
    shared = {name: value for name, value in asdict(config).items() if name not in OWN}
    return hashlib.sha256(json.dumps([shared, *more], sort_keys=True, default=repr).encode()).hexdigest()


def _of_model(config: Config) -> str:
    """An adapter's first weights are a function of the seed, too."""
    return _text(config, None if config.peft == "none" else config.seed)


def _changing(lm: LanguageModel) -> dict[str, Tensor]:
    """What a run may write: trained weights, and buffers."""
    return trained_weights(lm.model) | dict(lm.model.named_buffers())
