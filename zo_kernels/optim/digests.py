"""What stands for things that workers compare: a digest of batches, of what a model is given, a number for a text.

Belongs here: which bytes of what count. Does not belong here: who compares them, and what is said then (workers.py).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zo_kernels import shards

SAMPLED = 1 << 16  # bytes of each tensor of a micro-batch that are compared


def print_of(value: Any, most: int | None = None) -> str:
    """A digest of tensors, numbers and texts in whatever holds them. Of other objects the class counts, and tensors that are attributes.

    Args:
        most: bytes of each tensor that count, from its start, beside its shape; None: all.
    """
    found = hashlib.blake2b(digest_size=16)
    _feed(found, value, most)
    return found.hexdigest()


def _feed(found: Any, value: Any, most: int | None) -> None:
    if isinstance(value, Tensor):
        value = shards.whole(value)
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if not value.is_meta and value.layout == torch.strided:
            flat = value.detach().reshape(-1)
            flat = flat if most is None else flat[: most // max(1, value.element_size())]
            found.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            found.update(f"|{key!r:.200}:".encode())
            _feed(found, value[key], most)
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes()[:most])
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}".encode())
        for one in value:
            _feed(found, one, most)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            found.update(f".{field.name}".encode())
            _feed(found, getattr(value, field.name), most)
    else:
        plain = value is None or isinstance(value, (bool, int, float, str, bytes))
        found.update((repr(value) if plain else type(value).__name__).encode())
        for name, one in getattr(value, "__dict__", {}).items():
            if isinstance(one, (Tensor, np.ndarray)):
                found.update(f".{name}".encode())
                _feed(found, one, most)


@contextlib.contextmanager
def watched(model: nn.Module | None) -> Iterator[list[str]]:
    """A digest of what this model is given in its first forward from here on, as its forward is called; empty without one, as in a compiled forward.

    Numbers that are no integers count by type and shape alone: a part of a larger model may be given hidden states, which differ from point to point where it
    shares a weight with what makes them.
    """
    found: list[str] = []

    def look(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and not found:
            found.append(print_of(_whole_numbers([arguments, named]), SAMPLED))

    handle = model.register_forward_pre_hook(look, with_kwargs=True) if model is not None else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


def _whole_numbers(value: Any) -> Any:
    """The tensors in these arguments; of those with other numbers than integers what is left without them."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole_numbers(one) for one in value]
    if not isinstance(value, Tensor):
        return None
    return value if not (value.is_floating_point() or value.is_complex()) else value.new_empty(value.shape, device="meta")


def number_of(text: str) -> float:
    """A float64 number that stands for a text: 52 bits of its digest, never 0."""
    return float((int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 12) | 1)
