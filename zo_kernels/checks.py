"""What an argument may be: the constants of the format and the checks that name an argument, its value and the remedy.

Belongs here: checks of numbers, choices and tensors that need nothing but the argument. Does not belong here: what an argument becomes in a
pass (plan.py), checks that one caller alone makes, which stand beside it.
"""

from __future__ import annotations

import bisect
import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the codes of zo_kernels.h
KINDS = {"gaussian": 0, "rademacher": 1}
ROUNDINGS = {"nearest": 0, "stochastic": 1}
MAX_INDEX = 1 << 56  # an element's index i is below this (docs/numerics.md, section 1)
MAX_RANK = 64  # of a low-rank direction (section 11)


def check_word(name: str, value: Any, bits: int = 32) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 1 << bits:
        raise ValueError(f"{name}={value!r} must be an integer in 0 .. 2^{bits} - 1")
    return int(value)


def check_choice(name: str, value: Any, choices: Iterable[str], **elsewhere: str) -> None:
    """`elsewhere`: values that are given in another way, and how."""
    if value not in choices:
        hint = f"; {value!r} is {elsewhere[value]}" if isinstance(value, str) and value in elsewhere else ""
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}{hint}")


def check_options(cls: type, given: Iterable[str]) -> None:
    """The keyword arguments of a class of ours, which hands those that it has not on to the one before it; another's says itself what it takes.

    Raises:
        TypeError: none of them takes one of these; names it, and what is close to it.
    """
    if not cls.__module__.startswith("zo_kernels."):
        return
    known = [
        parameter.name
        for one in cls.__mro__
        if one.__module__.startswith("zo_kernels.") and "__init__" in vars(one)
        for parameter in inspect.signature(vars(one)["__init__"]).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name != "self"
    ]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(dict.fromkeys(known))}"
            raise TypeError(f"{cls.__name__} has no argument {name!r}: {hint}")


class InitSignature:
    """`__signature__` of classes whose `__new__` takes anything, to be looked at: that of their `__init__`."""

    def __get__(self, _: Any, cls: type) -> inspect.Signature:
        own = inspect.signature(vars(next(one for one in cls.__mro__ if "__init__" in vars(one)))["__init__"])
        return own.replace(parameters=list(own.parameters.values())[1:])


def check_fp32(name: str, value: Any) -> float:
    """A number that is finite when it is rounded to fp32."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} must be a number") from None
    if not abs(number) <= 3.4028235e38:
        raise ValueError(f"{name}={value!r} must be finite in fp32; a step with a non-finite loss must be skipped")
    return number


def check_tensor(name: str, t: Any) -> Tensor:
    """A tensor that a pass can read and write through a raw pointer."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}, not a tensor")
    if is_traceable_wrapper_subclass(t):
        raise TypeError(
            f"{name} is a {type(t).__name__}, which has no memory of its own: pass its local tensor, with its offset in `offsets`"
        )
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype}; supported are float32, float16 and bfloat16: convert it, or freeze it")
    if t.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load its weights first")
    if t.layout != torch.strided or not t.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} is not contiguous (strides {t.stride() if t.layout == torch.strided else t.layout}); "
            "the noise is indexed by the contiguous tensor: pass t.contiguous(), or set t.data = t.data.contiguous() first"
        )
    return t


def byte_range(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


def check_overlap(named: list[tuple[str, Tensor]], what: str) -> None:
    """No two of the tensors share memory."""
    spans = sorted((*byte_range(t), str(t.device), name) for name, t in named if t.numel())
    spans.sort(key=lambda s: s[2])  # stable: by device, then by address
    for (_, end, dev, a), (start, _, dev2, b) in zip(spans, spans[1:], strict=False):
        if dev == dev2 and start < end:
            raise ValueError(f"{a} and {b} share memory; {what}: pass a tied tensor once")


def check_apart(written: Iterable[tuple[str, Tensor]], read: Iterable[tuple[str, Tensor]]) -> None:
    """Nothing that a pass reads beside the weights (scales, masks, factors, numbers) shares memory with what it writes: results would depend
    on the order in which a backend works. What is read may be shared among the tensors. The written ones do not overlap."""
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, t in read:
        if t.numel():
            spans.setdefault(str(t.device), []).append((*byte_range(t), name))
    if not spans:
        return
    targets: dict[str, list[tuple[int, int, str]]] = {}
    for name, t in written:
        if t.numel():
            targets.setdefault(str(t.device), []).append((*byte_range(t), name))
    for device, own in spans.items():
        there = sorted(targets.get(device, ()))
        for start, end, name in own:
            k = bisect.bisect_left(there, (end,)) - 1  # the last that begins before this one ends
            if k >= 0 and there[k][1] > start:
                raise ValueError(f"{name} shares memory with {there[k][2]}, which the pass writes: give a copy of it (.clone())")


def check_length(name: str, values: Sequence[Any] | None, n: int) -> Sequence[Any]:
    if values is None:
        return [None] * n
    if not isinstance(values, Sequence) or len(values) != n:
        length = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(f"{name} has length {length}, params has length {n}: give one entry for each tensor")
    return values


def check_list(params: Any, names: Sequence[str] | None = None) -> None:
    """A list of tensors that passes can work on."""
    if isinstance(params, Tensor) or not isinstance(params, Sequence):
        raise TypeError(f"params is a {type(params).__name__}: give a list of tensors")
    for k, t in enumerate(params):
        check_tensor(names[k] if names else f"params[{k}]", t)


def check_streams(streams: Any, n: int) -> list[int]:
    if streams is None:
        raise ValueError("streams is None: give one stream (0 .. 2^32 - 1) for each tensor")
    return [check_word(f"streams[{k}]", s) for k, s in enumerate(check_length("streams", streams, n))]


def check_offsets(offsets: Any, n: int) -> list[int]:
    return [check_word(f"offsets[{k}]", o or 0, 56) for k, o in enumerate(check_length("offsets", offsets, n))]


def check_decay(name: str, decay: Any) -> float | Tensor:
    if not isinstance(decay, Tensor):
        return check_fp32(name, decay)
    if decay.numel() != 1 or decay.dtype != torch.float32:
        raise TypeError(f"{name} is {decay.dtype} {tuple(decay.shape)}; give a float or a one-element float32 tensor")
    return decay
