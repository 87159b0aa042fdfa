"""Modules that run something else for the time of a forward.

Belongs here: putting it there, and what was there back. Does not belong here: what runs instead (frozen.py, narrow.py, scoring.py).

Only `forward` is another: modules, their parameters and hooks stay, and so do the names of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each of these modules runs what is given for it; behind it the `forward` that it had, whatever was raised."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, before in own.items():
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
