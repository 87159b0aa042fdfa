"""Reads the vector files beside it, and writes them from the reference: run once per contract version, never to make a failing test pass.

`noise_v1.json` came with the contract's specification and is not written here. `features_v1.json` freezes what the specification left
open: Rademacher directions, masks, scales, decay, stochastic rounding, shards. Weights follow noise_v1's formula.

    python -m tests.vectors.make
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zo_kernels as zk
from zo_kernels import ops, reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HERE = Path(__file__).parent

# name, arguments of perturb_ in JSON form
FEATURES: list[dict[str, Any]] = [
    {"name": "rademacher", "kind": "rademacher", "terms": [[7, 1e-3]], "n": 161},
    {"name": "rademacher two terms", "kind": "rademacher", "terms": [[7, 1e-3], [8, -3e-4]], "n": 67},
    {"name": "stochastic", "rounding": "stochastic", "terms": [[7, 1e-4]], "n": 67},
    {"name": "stochastic rademacher", "rounding": "stochastic", "kind": "rademacher", "terms": [[9, 1e-6]], "n": 67},
    {"name": "decay", "decay": 0.99, "terms": [[7, 1e-3]], "n": 35},
    {"name": "decay alone", "decay": 0.9, "terms": [], "n": 35},
    {"name": "bit mask", "mask_bytes": [0b10110101, 0x0F, 0xA5, 0, 255, 1], "terms": [[7, 1e-3]], "decay": 0.5, "n": 43},
    {"name": "random mask", "random_mask": {"keep": 0.3, "tag": 11}, "terms": [[7, 1e-3]], "n": 67},
    {"name": "random mask rare", "random_mask": {"keep": 2.0**-9, "tag": 3}, "terms": [[7, 1e-3]], "n": 4099, "only": ["fp32"]},
    {"name": "scale blocks of 5", "scale": [0.5, -1.25, 3.0, 0.1, 7.0, 1e-3, 2.0], "block": 5, "terms": [[7, 1e-3], [9, 2e-3]], "n": 35},
    {"name": "shard", "offset": (1 << 36) - 19, "terms": [[7, 1e-3]], "n": 51},
    {"name": "shard rademacher stochastic", "offset": (1 << 39) - 19, "kind": "rademacher", "rounding": "stochastic", "terms": [[7, 1e-3]], "n": 51},
    {"name": "everything", "offset": 37, "scale": [0.5, 2.0, 0.25, 1.5], "block": 24, "random_mask": {"keep": 0.5, "tag": 1}, "decay": 0.999,
     "rounding": "stochastic", "terms": [[4294967295, -1e-3], [0, 5e-4], [3, 0.0]], "n": 59},
]  # fmt: skip


def theta(n: int, dtype: torch.dtype) -> Tensor:
    i = torch.arange(n)
    return (((i * 2654435761) % 4096 - 2048).float() / 32768).to(dtype)


def to_hex(t: Tensor) -> list[str]:
    width = 2 * t.element_size()
    integers = t.view(torch.int32 if t.dtype == torch.float32 else torch.int16).tolist()
    return [format(b & ((1 << 4 * width) - 1), f"0{width}x") for b in integers]


def arguments(v: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The keyword arguments of perturb_ for a vector."""
    args: dict[str, Any] = {"seed": int(v["seed"], 16), "streams": [v["stream"]]}
    args["terms"] = [(tag, float.fromhex(c) if isinstance(c, str) else c) for tag, c in v["terms"]]
    for key in ("kind", "rounding", "decay"):
        if key in v:
            args[key] = v[key]
    if "offset" in v:
        args["offsets"] = [v["offset"]]
    if "scale" in v:
        args["scales"] = [(torch.tensor(v["scale"], device=device), v["block"])]
    if "mask_bytes" in v:
        args["masks"] = [torch.tensor(v["mask_bytes"], dtype=torch.uint8, device=device)]
    if "random_mask" in v:
        args["masks"] = [zk.RandomMask(**v["random_mask"])]
    return args


def result(v: dict[str, Any], dtype: str, perturb: Callable[[ops.Plan, ops.Pass], None], device: str = "cpu") -> list[str]:
    """The vector's weights after a backend's `perturb`, in hexadecimal."""
    x = theta(v["n"], DTYPES[dtype]).to(device)
    args = arguments(v, device)
    terms, fields = args.pop("terms"), {k: args.pop(k) for k in ("seed", "decay", "kind", "rounding") if k in args}
    (plan,) = ops.make_plans([x], **args)
    perturb(plan, ops.Pass(tags=[t for t, _ in terms], coefs=[c for _, c in terms], **fields))
    return to_hex(x.cpu())


def vectors() -> list[Any]:
    """Every vector of every file, as pytest parameters."""
    found = [(f.stem, v) for f in sorted(HERE.glob("*.json")) for v in json.loads(f.read_text())["vectors"]]
    return [pytest.param(v, id=f"{file}-{v.get('name', k)}") for k, (file, v) in enumerate(found)]


def check(v: dict[str, Any], perturb: Callable[[ops.Plan, ops.Pass], None], device: str = "cpu") -> None:
    for dtype, expected in v["out"].items():
        assert result(v, dtype, perturb, device) == expected, dtype


def main() -> None:
    vectors = []
    for feature in FEATURES:
        v = {"seed": "0123456789abcdef", "stream": 5, **feature}
        v["out"] = {name: result(v, name, reference.perturb) for name in feature.get("only", DTYPES)}
        vectors.append(v)
    (HERE / "features_v1.json").write_text(
        json.dumps({"contract": "noise v1", "theta": "as noise_v1.json", "vectors": vectors}) + "\n"
    )


if __name__ == "__main__":
    main()
