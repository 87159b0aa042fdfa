"""What must weights, a method's state and gradients take, for shapes that do not fit here? Counted from the shapes; nothing is measured.

    python benchmarks/sizes.py    writes the table of docs/memory.md

Belongs here: bytes that follow from the number of weights and their shapes. Does not belong here: what only a run shows, activations and peaks (memory.py);
where that has a row of a shape, tests/test_benchmarks.py holds the bytes here to it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from zo_finetune import adapters, measure, shapes

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
LARGE = (
    *("opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-2-7b", "opt-13b", "llama-2-13b", "opt-30b", "opt-66b"),
    *("llama-2-70b", "opt-175b"),
)


@dataclass(frozen=True)
class Size:
    weights: int
    factors: int  # rows + columns, of all matrices
    linear: int  # weights of linear layers but the head, which --quantize packs
    linear_rows: int
    lora: int  # weights of an adapter of MeZO's size: rank 8 beside query and value

    @classmethod
    def of(cls, shape: str) -> Size:
        return cls.of_model(measure.bare_model(shapes.get(shape))[0])

    @classmethod
    def of_model(cls, model: Any) -> Size:
        sizes = [tuple(p.shape) for p in model.parameters()]
        linear = {
            n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
        }
        lora = sum(adapters.RANK * sum(w.shape) for n, w in linear.items() if n.endswith(("q_proj", "v_proj")))
        return cls(
            sum(p.numel() for p in model.parameters()),
            sum(sum(s) for s in sizes if len(s) == 2),
            sum(w.numel() for w in linear.values()),
            sum(w.shape[0] for w in linear.values()),
            lora,
        )


# Bytes of the base model in bfloat16, but for what is packed: int8 has an fp32 scale and an int8 zero point for each row, nf4 an fp32 number for
# each 64 weights.
BASES: dict[str, Callable[[Size], float]] = {
    "bf16": lambda size: 2 * size.weights,
    "int8": lambda size: 2 * (size.weights - size.linear) + size.linear + 5 * size.linear_rows,
    "nf4": lambda size: 2 * (size.weights - size.linear) + size.linear / 2 + size.linear / 64 * 4,
}


# what stays between steps and what a step's gradient takes, in bytes, by method; `bytes_`: of a weight. Those of zeroth order have no gradient
STATES: dict[str, Callable[[Size, int], tuple[int, int]]] = {
    "inference": lambda size, bytes_: (0, 0),
    "mezo": lambda size, bytes_: (0, 0),
    "lozo": lambda size, bytes_: (4 * 2 * size.factors, 0),  # rank 2
    "sparse": lambda size, bytes_: (size.weights // 8, 0),
    "momentum": lambda size, bytes_: (4 * size.weights, 0),
    "hizoo": lambda size, bytes_: (4 * size.weights, 0),
    "zo-adam": lambda size, bytes_: (8 * size.weights, 0),
    "sgd": lambda size, bytes_: (0, bytes_ * size.weights),
    "adam": lambda size, bytes_: (2 * bytes_ * size.weights, bytes_ * size.weights),
}
COLUMNS = (("mezo", 2), ("lozo", 2), ("sparse", 2), ("momentum", 2), ("zo-adam", 2), ("sgd", 2), ("adam", 2), ("adam", 4))


def table() -> str:
    head = ["shape", "10⁹ weights", *(f"{name}, {'bf16' if bytes_ == 2 else 'fp32'}" for name, bytes_ in COLUMNS)]
    lines = [head, ["---"] * len(head)]
    for shape in LARGE:
        size = Size.of(shape)
        totals = [bytes_ * size.weights + sum(STATES[name](size, bytes_)) for name, bytes_ in COLUMNS]
        lines.append([shape, f"{size.weights / 1e9:.2f}", *(f"{total / 2**30:,.1f}" for total in totals)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def packed_table() -> str:
    """The base in each form, and what LoRA adds: of MeZO its own fp32 weights, of Adam its gradient and two states too."""
    head = ["shape", *(f"base, {name}" for name in BASES), "mezo@lora adds", "adam@lora adds"]
    lines = [head, ["---"] * len(head)]
    for shape in LARGE:
        size = Size.of(shape)
        bases = [f"{of(size) / 2**30:,.1f}" for of in BASES.values()]
        lines.append([shape, *bases, f"{4 * size.lora / 2**30:.3f}", f"{16 * size.lora / 2**30:.3f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str) -> str:
    """The page with its tables as they are now."""
    for name, made in (("sizes", table()), ("packed", packed_table())):
        at = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text = re.sub(at, lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main() -> int:
    PAGE.write_text(page(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
