"""Draws the figures from the CSV files: no figure shows a number that is not in one.

    python benchmarks/plot.py --results benchmarks/results --figures docs/figures

Belongs here: drawing. Does not belong here: measuring, and numbers typed in by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import harness

COLOURS = {"scratch": "#1b7f5c", "inplace": "#d98c1f", "public": "#b03a48"}
LABELS = {"scratch": "zo_kernels, scratch", "inplace": "zo_kernels, in place", "public": "public implementations"}
LINES = {"float16": "--", "bfloat16": "-"}
WIDTHS = {"scratch": 1.8, "inplace": 4.5, "public": 1.2}  # the last two nearly coincide: one is drawn inside the other
# The bars of the CPU figure: (contender, instruction set or "") -> label. Contenders of other machines are left out if absent.
BARS = (
    (("mezo", ""), "MeZO's expression"),
    (("normal_add", ""), "torch.normal + add_"),
    (("compiled mezo", ""), "torch.compile of MeZO's"),
    (("compiled normal_add", ""), "torch.compile of normal + add_"),
    (("compiled randn_add", ""), "torch.compile, noise fused"),
    (("foreach_add", ""), "torch._foreach_add_"),
    (("zo_kernels portable", "portable"), "zo_kernels, portable C++"),
    (("zo_kernels avx2", "avx2"), "zo_kernels, AVX2"),
    (("zo_kernels avx512", "avx512"), "zo_kernels, AVX-512"),
    (("inplace_copy", ""), "read and write back, no arithmetic"),
)


def draw_drift(axes: Any, rows: list[dict[str, str]]) -> None:
    """Relative drift over steps. Zero has no place on a logarithmic axis: a symlog axis keeps scratch mode's line on it."""
    model = rows[0]["model"]
    rows = [row for row in rows if row["model"] == model]
    positive = [float(row["relative_drift"]) for row in rows if float(row["relative_drift"]) > 0]
    for mode in LABELS:
        for dtype, line in LINES.items():
            of_line = [row for row in rows if row["mode"] == mode and row["dtype"] == dtype]
            if of_line:
                unchanged = all(float(row["changed_bits_fraction"]) == 0 for row in of_line)
                label = f"{LABELS[mode]}, {dtype}{': no bit changed' if unchanged else ''}"
                points = zip(*((int(row["step"]), float(row["relative_drift"])) for row in of_line), strict=True)
                axes.plot(*points, line, color=COLOURS[mode], label=label, linewidth=WIDTHS[mode])
    axes.set_xscale("log")
    if positive:
        axes.set_yscale("symlog", linthresh=10 ** int(f"{min(positive):e}".split("e")[1]))
        axes.set_ylim(bottom=-(10 ** int(f"{min(positive):e}".split("e")[1])) / 6)
    axes.set_xlabel("steps at lr = 0")
    axes.set_ylabel("‖θ − θ₀‖ / ‖θ₀‖")
    axes.set_title(f"Drift of 16-bit weights ({int(rows[0]['weights']) / 1e6:.1f} M, ε = {rows[0]['eps']})", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.12))


def draw_cpu(axes: Any, rows: list[dict[str, str]], dtype: str) -> None:
    threads = max(int(row["threads"]) for row in rows)
    rate = {
        (row["contender"], row["isa"]): float(row["gweights_per_s"])
        for row in rows
        if row["dtype"] == dtype and int(row["threads"]) == threads
    }
    bars = [(label, rate[key], key[0]) for key, label in BARS if key in rate]
    colours = [
        "#1b7f5c" if name.startswith("zo_kernels") else "#9aa3ab" if name == "inplace_copy" else "#b03a48" for _, _, name in bars
    ]
    drawn = axes.barh([label for label, _, _ in bars], [value for _, value, _ in bars], color=colours)
    axes.bar_label(drawn, [f"{value:.2g}" for _, value, _ in bars], fontsize=7, padding=2)
    axes.set_xscale("log")
    axes.set_xlim(right=max(value for _, value, _ in bars) * 3)
    axes.set_xlabel("10⁹ weights / s")
    axes.set_title(f"One pass, {dtype}, {threads} CPU threads, {int(rows[0]['weights']) / 2**20:.0f} Mi weights", fontsize=10)
    axes.tick_params(axis="y", labelsize=7)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--figures", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    args = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    if (args.results / "drift.csv").exists():
        panels.append((draw_drift, (harness.read_csv(args.results / "drift.csv"),)))
    if (args.results / "cpu_pass.csv").exists():
        panels.append((draw_cpu, (harness.read_csv(args.results / "cpu_pass.csv"), "bfloat16")))
    if not panels:
        print(f"{args.results} has neither drift.csv nor cpu_pass.csv: run benchmarks/run.py first", file=sys.stderr)
        return 1
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False, layout="constrained")
    for (draw, inputs), axis in zip(panels, axes[0], strict=True):
        draw(axis, *inputs)
        axis.spines[["top", "right"]].set_visible(False)
    args.figures.mkdir(parents=True, exist_ok=True)
    # Metadata is left out: a figure drawn twice from one CSV is the same file.
    figure.savefig(args.figures / "benchmarks.png", dpi=110, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
