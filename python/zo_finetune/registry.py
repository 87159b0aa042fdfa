"""The members of a package by name: one file each, and no list beside them that could lack one.

Belongs here: how tasks, objectives, ways to decode and metrics are found. Does not belong here: any of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def discovered(package: str, path: Iterable[str], kind: type[Any]) -> dict[str, Any]:
    """One object of each class with a `name` of its own, a subclass of `kind`, that a module of the package defines; in the order of the files' names.

    Args:
        package, path: the package's `__name__` and `__path__`.

    Raises:
        ValueError: two classes have one name.
    """
    found: dict[str, Any] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(path)):
        content = importlib.import_module(f"{package}.{module}")
        for member in vars(content).values():
            if not (isinstance(member, type) and issubclass(member, kind) and member.__module__ == content.__name__):
                continue
            if (name := vars(member).get("name")) is not None:
                if name in found:
                    raise ValueError(f"{content.__name__} has another {kind.__name__.lower()} called {name!r}: rename one")
                found[name] = member()
    return found
