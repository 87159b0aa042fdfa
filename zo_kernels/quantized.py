"""Weights that a quantiser packed (bitsandbytes in 4 and 8 bits, torchao): what of them is bytes, and which of their tensors are scales.

Belongs here: recognising them by type, without their libraries; the plain tensors that stand for one in a fingerprint; their scales. Does not belong here:
quantising a model, or its forwards, which are the libraries' own.

A forward may keep a packed weight in another layout, so that what stands for a weight is what no forward changes: its codes in the order in which they
were made, and its scales as precisely as every layout has them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_IN_BLOCK = 32  # rows that bitsandbytes' layout for AVX512-BF16 interleaves


def library(t: Any) -> str:
    """ "bitsandbytes-4bit", "bitsandbytes-8bit", "torchao", or "" of a tensor that none of them packed."""
    for cls in type(t).__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "bitsandbytes" and cls.__name__ == "Params4bit":
            return "bitsandbytes-4bit" if getattr(t, "quant_state", None) is not None else ""
        if package == "bitsandbytes" and cls.__name__ == "Int8Params":
            return "bitsandbytes-8bit" if t.dtype == torch.int8 else ""
        if package == "torchao" and hasattr(t, "__tensor_flatten__"):
            return "torchao"
    return ""


def elements(p: Tensor) -> int:
    """How many weights a parameter is; in 4 bits a byte is two of them."""
    return math.prod(p.quant_state.shape) if library(p) == "bitsandbytes-4bit" else p.numel()  # type: ignore[attr-defined]


def keep_what_runs(model: nn.Module | None) -> None:
    """Matrices in 4 bits that bitsandbytes cannot bring into its layout for AVX512-BF16 stay in the usual one, in which it multiplies on any processor. It
    tries at the first forward without gradients, and fails where rows are no multiple of 32, or columns none of a block."""
    for module in model.modules() if model is not None else ():
        weight: Any = getattr(module, "weight", None)
        if getattr(module, "support_avx512bf16_for_cpu", False) and library(weight) == "bitsandbytes-4bit":
            rows, columns = weight.quant_state.shape
            module.support_avx512bf16_for_cpu = not (rows % _IN_BLOCK or columns % weight.quant_state.blocksize)  # type: ignore[assignment]


# ---- what stands for a weight ------------------------------------------------------------------------------------------


def _described(**numbers: Any) -> Tensor:
    """What is said of a weight beside its tensors, as a tensor of its JSON, so that it is compared as they are."""
    text = json.dumps(numbers, sort_keys=True, default=str).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _in_order(t: Tensor, state: Any) -> Tensor:
    """The codes of 4 bits, two a byte and the first one above, from the layout that bitsandbytes makes for AVX512-BF16: of 32 rows, and of two columns after
    the other, 64 codes in 32 bytes, the second half above."""
    rows, columns = state.shape
    low_high = torch.stack([t & 0xF, t >> 4], dim=-2)  # [rows, columns / 2] bytes are [..., 32] ones
    pairs = low_high.reshape(-1, 2 * _IN_BLOCK).reshape(rows // _IN_BLOCK, columns // 2, _IN_BLOCK, 2)
    codes = pairs.transpose(1, 2).reshape(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1]


def _four_bits(p: Any) -> dict[str, Tensor]:
    state, raw = p.quant_state, p.data.view(torch.uint8)
    if getattr(state, "packing_format_for_cpu", False):
        codes, scales = _in_order(raw.reshape(-1, _IN_BLOCK), state), state.absmax.T.reshape(-1)
    else:
        codes, scales = raw.reshape(-1), state.absmax.reshape(-1)
        if state.nested:
            inner = state.state2
            scales = inner.code[scales.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: scales.numel()] + state.offset
    about = _described(quant_type=state.quant_type, blocksize=state.blocksize, shape=list(state.shape))
    # The other layout has scales in bf16 alone, and those that were packed themselves no longer so.
    return {"codes": codes, "scales": scales.to(torch.bfloat16), "table": state.code, "format": about}


def _flattened(t: Any) -> dict[str, Tensor]:
    names, about = t.__tensor_flatten__()
    found = {"format": _described(type=type(t).__name__, **about)}
    for name in names:
        inner = getattr(t, name)
        found.update({f"{name}.{n}": x for n, x in _flattened(inner).items()} if library(inner) else {name: inner})
    return found


def parts(p: Tensor, module: nn.Module | None = None) -> dict[str, Tensor]:
    """The plain tensors that stand for a packed weight, by name; empty for one that is not packed.

    Args:
        module: that has it: bitsandbytes' module in 8 bits keeps the scales once it has run.
    """
    kind = library(p)
    if kind == "bitsandbytes-4bit":
        return _four_bits(p)
    if kind == "bitsandbytes-8bit":
        return {"codes": p.data, **({"scales": scale} if (scale := _scale(p, module)[1]) is not None else {})}
    return _flattened(p) if kind else {}


def spread(
    named: Iterable[tuple[str, Tensor]], model: nn.Module | None = None, trained: Collection[int] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Named weights, each packed one as its parts, ``NAME.PART``.

    Args:
        model: that has them. trained: ids of scales that change, and stand for nothing.
    """
    for name, p in named:
        module = model.get_submodule(name.rpartition(".")[0]) if model is not None and library(p) else None
        if found := parts(p, module):
            changing = {"scale", "scales"} if id(_scale(p, module)[1]) in trained else set()
            yield from ((f"{name}.{part}", t.detach()) for part, t in found.items() if part not in changing)
        else:
            yield name, p


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Everything by which a run may know a model's weights: its parameters, tied ones under each name, and the parts and scales of packed ones."""
    named = list(model.named_parameters(remove_duplicate=False))
    packed = [(n, p) for n, p in named if library(p)]
    return {**dict(named), **dict(spread(packed, model)), **dict(_scales(model))}


# ---- scales ------------------------------------------------------------------------------------------------------------


def _scale(p: Any, module: nn.Module | None) -> tuple[str, Tensor | None]:
    """The scale of a packed weight and what its library calls it; None: it has none in floating point by itself."""
    kind, name, found = library(p), "", None
    if kind == "bitsandbytes-4bit" and not getattr(p.quant_state, "packing_format_for_cpu", False):
        name, found = "absmax", p.quant_state.absmax
    elif kind == "bitsandbytes-8bit":  # beside the weight until the module's first forward, which takes it
        name, found = "SCB", p.SCB if getattr(p, "SCB", None) is not None else getattr(getattr(module, "state", None), "SCB", None)
    elif kind == "torchao" and "scale" in p.__tensor_flatten__()[0]:
        name, found = "scale", p.scale
    return name, found if isinstance(found, Tensor) and found.is_floating_point() else None


def _scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        if library(p):
            what, scale = _scale(p, model.get_submodule(name.rpartition(".")[0]))
            if scale is not None:
                yield f"{name}.{what}", scale


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is trained, by name: parameters that require a gradient, tied ones once, and scales that `quantized_scales` made trainable."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return named | {n: scale for n, scale in _scales(model) if scale.requires_grad}


def is_trained(p: Tensor) -> bool:
    """Whether a parameter is, or, of a packed one, its scale that lies beside it."""
    return p.requires_grad or ((scale := _scale(p, None)[1]) is not None and scale.requires_grad)


def largest_codes(model: nn.Module) -> dict[str, float]:
    """How many of its own size each of `quantized_scales` makes of a block's largest weight, by name: 1 where a scale is that weight (bitsandbytes), 2^(b - 1)
    where codes are integers of b bits (torchao).

    A scale of torchao's that moves by x moves its largest weights by 128 x in 8 bits, and by 8 x in 4. Divided by these numbers, as the ``scale`` of a
    parameter group, a direction moves the largest weight of a block by the same in each format, and eps and lr mean the same.
    """
    found = {}
    for name, p in model.named_parameters():
        if (kind := library(p)) and (what := _scale(p, model.get_submodule(name.rpartition(".")[0]))[0]):
            codes: Any = p
            bits = (
                re.search(r"int(\d+)", str(getattr(codes, "target_dtype", None) or codes.qdata.dtype))
                if kind == "torchao"
                else None
            )
            found[f"{name}.{what}"] = 2.0 ** (int(bits[1]) - 1) if bits else 1.0
    return found


def quantized_scales(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The floating-point scales of a model's packed weights, by name, made trainable: what QZO trains while the codes stay (Shang et al. 2025, "Fine-tuning
    Quantized Neural Networks with Zeroth-order Optimization", arXiv 2505.13430). They are changed in place: of bitsandbytes in 4 bits the scale of each
    block, in 8 bits that of each row, of torchao's weights with scales of their own each of them.

    ``MeZOStep(quantized_scales(model), lr, eps, model=model, perturbation="inplace", clip=100.0)`` is the method, its clipped gradient included.

    Raises:
        ValueError: there are none: nothing is packed, the scales are packed themselves (bitsandbytes' double quantisation), or a forward on a processor with
            AVX512-BF16 has already replaced them by others.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if not (found := [(name, scale.requires_grad_(True)) for name, scale in _scales(model)]):
        raise ValueError(
            f"model={type(model).__name__} has no quantisation scale in floating point: load it in 4 bits without double quantisation, or in 8 bits, and take "
            "its scales before its first forward"
        )
    return found
