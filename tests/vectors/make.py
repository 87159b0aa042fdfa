"""Reads the vector files beside it, and writes them from the reference: run once per contract version, never to make a failing test pass.

`noise_v1.json` came with the contract's specification and is not written here. `features_v1.json` freezes what the specification left
open: Rademacher directions, masks, scales, decay, stochastic rounding, shards. `sequences_v1.json` freezes passes one after another,
`rules_v1.json` update rules.
Weights follow noise_v1's formula.

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
from zo_kernels import reference, update
from zo_kernels.plan import Pass, Passes, Plan, make_passes, make_plans

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HERE = Path(__file__).parent
Perturb = Callable[[Plan, Pass], None]
Sequence = Callable[[Plan, Passes], None]
Update = Callable[[Plan, update.States, update.RulePass], None]

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

# The same with `passes` in the place of terms, decay and rounding.
ALL_SORTS: list[dict[str, Any]] = [
    {"terms": [[7, 1e-3]]},
    {"terms": [[8, -1e-3], [9, 2e-4]], "decay": 0.99},
    {"terms": [], "decay": 0.9, "rounding": "stochastic"},
    {"terms": [[10, 1e-4]], "rounding": "stochastic"},
    {"terms": [[11, 0.0]]},
    {"terms": [[12, 0.0], [13, 3e-4], [14, 1e-5]], "decay": 1.001, "rounding": "stochastic"},
    {"terms": [[15, 0.0]], "decay": 0.7, "rounding": "stochastic"},
]
SEQUENCES: list[dict[str, Any]] = [
    {"name": "sequence of single terms", "passes": [{"terms": [[k, 1e-3 * (-1) ** k]]} for k in range(40)], "n": 67},
    {"name": "sequence of all sorts", "passes": ALL_SORTS, "n": 67},
    {"name": "sequence of all sorts rademacher", "kind": "rademacher", "passes": ALL_SORTS, "n": 67},
    {"name": "sequence with everything", "offset": 37, "scale": [0.5, 2.0, 0.25, 1.5], "block": 24,
     "random_mask": {"keep": 0.5, "tag": 1}, "passes": ALL_SORTS, "n": 59},
]  # fmt: skip

# Of update rules; the states are made of the weights' formula: itself, then its absolute value plus 1/8.
RULES: list[dict[str, Any]] = [
    {"name": "momentum", "rule": "momentum", "numbers": [1, 0.999, 0.01, 0.9], "terms": [[7, 0.1], [8, -0.2]], "n": 67},
    {"name": "momentum in bf16", "rule": "momentum", "numbers": [1, 1, 0.01, 0.9], "state": "bf16", "rounding": "stochastic",
     "terms": [[7, 0.1]], "random_mask": {"keep": 0.5, "tag": 2}, "n": 67},
    {"name": "adam", "rule": "adam", "numbers": [1, 0.999, 0.01, 0.9, 0.1, 0.99, 0.01, 1.5, 1e-8], "rounding": "stochastic",
     "terms": [[7, 0.1], [8, 0.0]], "scale": [0.5, 2.0, 0.25, 1.5], "block": 24, "offset": 37, "n": 51},
    {"name": "adam in bf16", "rule": "adam", "numbers": [1, 1, 0.01, 0.9, 0.1, 0.99, 0.01, 1.5, 1e-8], "state": "bf16", "kind": "rademacher",
     "terms": [[7, 0.1], [8, 0.3]], "mask_bytes": [181, 15, 165, 0, 255, 1], "n": 43},
    {"name": "hizoo", "rule": "hizoo", "numbers": [1, 0.999, 0.01, 0.3, 0.7, 0.13, 0.2], "terms": [[7, 1.0]], "n": 67},
    {"name": "adam_history", "rule": "adam_history", "numbers": [1, 0.999, 0.01, 1e-8], "terms": [[7, 0.1], [8, 0.0], [9, -0.2]],
     "squares": [0.01, 0.002, 0.3], "n": 67},
    {"name": "go is 0", "rule": "momentum", "numbers": [0, 0.999, 0.01, 0.9], "terms": [[7, 0.1]], "n": 5},
]  # fmt: skip


def theta(n: int, dtype: torch.dtype) -> Tensor:
    i = torch.arange(n)
    return (((i * 2654435761) % 4096 - 2048).float() / 32768).to(dtype)


def to_hex(t: Tensor) -> list[str]:
    width = 2 * t.element_size()
    integers = t.view(torch.int32 if t.dtype == torch.float32 else torch.int16).tolist()
    return [format(b & ((1 << 4 * width) - 1), f"0{width}x") for b in integers]


def terms(given: list[list[Any]]) -> list[tuple[int, float]]:
    return [(tag, float.fromhex(c) if isinstance(c, str) else c) for tag, c in given]


def arguments(v: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The keyword arguments of perturb_ for a vector, or of perturb_sequence_."""
    args: dict[str, Any] = {"seed": int(v["seed"], 16), "streams": [v["stream"]]}
    if "passes" in v:
        args["passes"] = [{**p, "terms": terms(p["terms"])} for p in v["passes"]]
    else:
        args["terms"] = terms(v["terms"])
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


def result(v: dict[str, Any], dtype: str, perturb: Perturb, sequence: Sequence, device: str = "cpu") -> list[str]:
    """The vector's weights after a backend's `perturb` or `sequence`, in hexadecimal."""
    x = theta(v["n"], DTYPES[dtype]).to(device)
    args = arguments(v, device)
    fields = {k: args.pop(k) for k in ("seed", "decay", "kind", "rounding") if k in args}
    given, passes = args.pop("terms", None), args.pop("passes", None)
    (plan,) = make_plans([x], **args)
    if passes is None:
        perturb(plan, Pass(tags=[t for t, _ in given], coefs=[c for _, c in given], **fields))
    else:
        seed = fields.pop("seed")
        sequence(plan, Passes(seed, *make_passes(passes), **fields).on(plan.device))
    return to_hex(x.cpu())


def vectors() -> list[Any]:
    """Every vector of passes and sequences, as pytest parameters."""
    files = [f for f in sorted(HERE.glob("*.json")) if f.stem not in ("net_v1", "rules_v1")]
    found = [(f.stem, v) for f in files for v in json.loads(f.read_text())["vectors"]]
    return [pytest.param(v, id=f"{file}-{v.get('name', k)}") for k, (file, v) in enumerate(found)]


def check(v: dict[str, Any], perturb: Perturb, sequence: Sequence, device: str = "cpu") -> None:
    for dtype, expected in v["out"].items():
        assert result(v, dtype, perturb, sequence, device) == expected, dtype


def rule_result(v: dict[str, Any], dtype: str, run: Update) -> list[list[str]]:
    """The vector's weights and states after a backend's `update`, in hexadecimal."""
    x = theta(v["n"], DTYPES[dtype])
    kinds = [DTYPES[v["state"]] if "state" in v and len(held) > 1 else torch.float32 for _, held in update.RULES[v["rule"]].states]
    values = [theta(v["n"], torch.float32), theta(v["n"], torch.float32).abs() + 0.125]
    states = [(values[1] if v["rule"] == "hizoo" else values[k]).to(kind) for k, kind in enumerate(kinds)]
    args = arguments(v)
    given = args.pop("terms")
    fields = {"seed": args.pop("seed"), "kind": args.pop("kind", "gaussian"), "rounding": args.pop("rounding", "nearest")}
    (plan,) = make_plans([x], **args)
    coefs = [float(c) for _, c in given]
    p = update.RulePass(
        tags=[t for t, _ in given], coefs=coefs, rule=v["rule"], numbers=v["numbers"], squares=v.get("squares"), **fields
    )
    run(plan, [states], p)
    return [to_hex(t) for t in (x, *states)]


def rule_vectors() -> list[Any]:
    found = json.loads((HERE / "rules_v1.json").read_text())["vectors"]
    return [pytest.param(v, id=v["name"]) for v in found]


def check_rule(v: dict[str, Any], run: Update) -> None:
    for dtype, expected in v["out"].items():
        assert rule_result(v, dtype, run) == expected, dtype


def main() -> None:
    rules = []
    for described_rule in RULES:
        v = {"seed": "0123456789abcdef", "stream": 5, **described_rule}
        rules.append(v | {"out": {dtype: rule_result(v, dtype, reference.update) for dtype in DTYPES}})
    text = json.dumps({"contract": "noise v1", "theta": "as noise_v1.json; states: make.py", "vectors": rules})
    (HERE / "rules_v1.json").write_text(text + "\n")
    for name, described in (("features_v1", FEATURES), ("sequences_v1", SEQUENCES)):
        vectors = []
        for feature in described:
            v = {"seed": "0123456789abcdef", "stream": 5, **feature}
            v["out"] = {dtype: result(v, dtype, reference.perturb, reference.sequence) for dtype in feature.get("only", DTYPES)}
            vectors.append(v)
        (HERE / f"{name}.json").write_text(
            json.dumps({"contract": "noise v1", "theta": "as noise_v1.json", "vectors": vectors}) + "\n"
        )


if __name__ == "__main__":
    main()
