"""The perturbed linear: both forwards of a layer in a step, x W^T at theta + s and at theta - s, for one read of the weights.

Belongs here: the public function, its checks, and the two-pass way that serves where no kernel does and that the tests compare with.
Does not belong here: device code (_backends/_triton_linear.py), launches (_backends/triton.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zo_kernels import _backends as backends
from zo_kernels import checks
from zo_kernels.plan import Entry, Pass, Plan, Terms, make_terms


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    terms: Terms,
    seed: int,
    stream: int,
    bias_stream: int | None = None,
    halves: bool = True,
    kind: str = "gaussian",
    offset: int = 0,
    bias_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``F.linear(x, theta + s)`` for the first half of x and ``F.linear(x, theta - s)`` for the second; s = sum_k c_k z(seed, stream, tag_k).

    The perturbed weights are those that `perturb_` would have written, bit for bit (up to the sign of a zero): theta ± s in fp32, rounded to
    nearest even to the weight's dtype. They exist in registers only. Products are summed in fp32, as in a matrix product of torch, in an
    order that depends on the shapes and not on values.

    The kernel is Triton's, for K and `offset` that are multiples of 32. Anything else, and any other backend, takes two passes: `perturb_`
    into a buffer of the weight's size and `F.linear`, for each half. Nothing in the library calls this function: scratch mode does not, because
    no benchmark has shown yet where it wins (`benchmarks/gpu_linear.py`).

    Args:
        x: [2M, K], or [2B, ..., K] whose first dimension holds the two halves one after the other; the weight's dtype and device.
        weight: [N, K], contiguous, float32, float16 or bfloat16.
        bias: [N] or None, contiguous, the weight's dtype and device. It is perturbed too, with its own stream.
        terms, seed, kind: as in `perturb_`.
        stream, bias_stream: the noise's names for weight and bias, 0 .. 2^32 - 1.
        halves: False: all of x, of any shape [..., K], meets theta + s.
        offset, bias_offset: index of the tensor's first element in the unsharded tensor.
        backend: "triton" for the kernel, or the backend that perturbs in two passes; default: Triton where it runs, else the best
            for the device, or ``ZO_KERNELS_BACKEND``.

    Returns:
        [..., N] in the dtype of x. Never part of a graph: zeroth-order steps do not differentiate.

    Raises:
        TypeError, ValueError: an argument is wrong; names it, its value and the remedy.
        RuntimeError: the backend asked for is not available; says why.
    """
    tags, coefs = make_terms(terms)
    checks.check_word("seed", seed, 64)
    checks.check_choice("kind", kind, checks.KINDS)
    _check_operands(x, weight, bias, bias_stream, halves)
    tensors = [(weight, stream, offset, "weight"), *([] if bias is None else [(bias, bias_stream, bias_offset, "bias")])]
    entries = []
    for t, tensor_stream, first, name in tensors:
        checks.check_word("stream" if t is weight else "bias_stream", tensor_stream)
        checks.check_word("offset" if t is weight else "bias_offset", first, 56)
        if first + t.numel() > checks.MAX_INDEX:
            raise ValueError(f"{name}: offset {first} with {t.numel()} elements exceeds 2^56, the contract's largest index")
        entries.append(Entry(t.detach(), t.detach(), int(tensor_stream or 0), int(first)))
    p = Pass(seed, tags, coefs, kind=kind).on(weight.device)
    module = _server(weight.device, backend)
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        if two_pass_reason(x, weight, offset) is None and hasattr(module, "linear"):
            y = module.linear(rows.contiguous(), entries[0], entries[1] if bias is not None else None, p, halves)
        else:
            y = _two_passes(rows, entries, p, halves, module)
    return y.view(*x.shape[:-1], weight.shape[0])


def two_pass_reason(x: Tensor, weight: Tensor, offset: int = 0) -> str | None:
    """Why the kernel cannot serve these arguments, or None."""
    if weight.shape[1] % 32 or offset % 32:
        return f"rows of {weight.shape[1]} elements from element {offset}: a Philox call serves 32 elements of one row only if both are multiples of 32"
    if not x.numel() or not weight.numel():
        return "nothing to multiply"
    return None


def _server(device: torch.device, backend: str | None) -> ModuleType:
    """The backend asked for; without a request the one with a kernel for this, if it can run, else the one that perturbs fastest."""
    if not (backend or os.environ.get("ZO_KERNELS_BACKEND")):
        for name in backends.PREFERENCE.get(device.type, ()):
            module = backends.load(name)
            if hasattr(module, "linear") and not (module.status() or module.supports(device)):
                return module
    return backends.pick(device, backend)


def _check_operands(x: Any, weight: Any, bias: Any, bias_stream: Any, halves: bool) -> None:
    checks.check_tensor("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give [N, K]")
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, not a tensor")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}: convert x")
    if x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: the last dimensions must agree")
    if halves and (x.ndim < 2 or x.shape[0] % 2):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its first dimension must hold two halves of equal size: give torch.cat([x, x]), or halves=False"
        )
    if bias is None:
        if bias_stream is not None:
            raise ValueError(f"bias_stream={bias_stream!r} without a bias: give the bias, or leave the stream out")
        return
    checks.check_tensor("bias", bias)
    if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.device != weight.device:
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}; give {weight.dtype} {tuple(weight.shape[:1])} on {weight.device}"
        )
    if bias_stream is None:
        raise ValueError("bias_stream is None: give the bias's stream; a bias that is not perturbed can be added to the result")


def _two_passes(x: Tensor, entries: Sequence[Entry], p: Pass, halves: bool, module: ModuleType) -> Tensor:
    """The same with the perturbed weights in buffers, one half after the other."""
    values = [torch.empty_like(e.src) for e in entries]
    targets = tuple(Entry(e.src, v, e.stream, e.offset) for e, v in zip(entries, values, strict=True))
    plan = Plan(targets, x.device, x.dtype)
    results = []
    M = x.shape[0] // 2
    for half, sign in ((x[:M], 1), (x[M:], -1)) if halves else ((x, 1),):
        coefs = sign * p.coefs if isinstance(p.coefs, Tensor) else [sign * c for c in p.coefs]
        module.perturb(plan, Pass(p.seed, p.tags, coefs, kind=p.kind))
        results.append(torch.nn.functional.linear(half, *values))
    return torch.cat(results)
