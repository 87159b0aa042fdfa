"""Draws the figures from the CSV files: no figure shows a number that is not in one.

    python benchmarks/plot.py --results benchmarks/results --figures docs/figures

Belongs here: drawing. Does not belong here: measuring, and numbers typed in by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import zip_longest
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
    (("normal_reused", ""), "normal_ into a kept buffer + add_"),
    (("foreach_reused", ""), "the same, tensor by tensor"),
    (("zo_kernels portable", "portable"), "zo_kernels, portable C++"),
    (("zo_kernels avx2", "avx2"), "zo_kernels, AVX2"),
    (("zo_kernels avx512", "avx512"), "zo_kernels, AVX-512"),
    (("rewrite", ""), "read and write back, no arithmetic"),
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


def caption(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, frameon=False)


FIDELITY = {  # (mode, rounding) -> colour, width, label
    ("scratch", "stochastic"): ("#1b7f5c", 1.8, "scratch, stochastic"),
    ("scratch", "nearest"): ("#2f6fb0", 1.8, "scratch, nearest"),
    ("inplace", "nearest"): ("#d98c1f", 4.5, "in place"),
    ("inplace", "stochastic"): ("#c9a227", 1.2, "in place, stochastic"),
    ("lazy", "nearest"): ("#7a5ba6", 1.2, "lazy"),
    ("public", "nearest"): ("#b03a48", 1.2, "public implementations"),
}


def draw_fidelity_distance(axes: Any, rows: list[dict[str, str]], lr: str) -> None:
    """Distance from the fp32 trajectory over the distance travelled, driven with the same losses; the fused replay beside it."""
    rows = [row for row in rows if (row["loop"], row["dtype"], row["lr"]) == ("open", "bfloat16", lr)]
    for (mode, rounding), (colour, width, label) in FIDELITY.items():
        mine = [row for row in rows if (row["mode"], row["rounding"]) == (mode, rounding)]
        if mine:
            axes.plot(*columns(mine, "distance"), color=colour, linewidth=width, label=label)
    mine = [row for row in rows if (row["mode"], row["rounding"]) == (rows[0]["mode"], rows[0]["rounding"])]
    axes.plot(*columns(mine, "replay_rounded_distance"), ":", color="black", label="fused replay, rounded once")
    axes.axhline(1, color="#9aa3ab", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    caption(
        axes,
        "steps",
        "distance from fp32 / distance travelled",
        f"Rounding alone, bfloat16, {rows[0]['model']}, lr {lr}, ε {rows[0]['eps']}",
    )


def draw_fidelity_loss(axes: Any, rows: list[dict[str, str]], dtype: str) -> None:
    """Validation loss of runs that compute their own g, evaluated in fp32."""
    start = [row for row in rows if row["loop"] == "start"][:1]
    closed = [row for row in rows if row["loop"] == "closed" and row["validation_loss"]]
    styles = {("scratch", "nearest", "float32"): ("black", 1.2, "fp32, scratch")}
    styles |= {(*key, dtype): style for key, style in FIDELITY.items()}
    for key, (colour, width, label) in styles.items():
        mine = [row for row in closed if (row["mode"], row["rounding"], row["dtype"]) == key]
        if mine:
            axes.plot(*columns(start + mine, "validation_loss"), color=colour, linewidth=width, label=label)
    caption(
        axes, "steps", "validation loss (evaluated in fp32)", f"Whole runs, {dtype}, {closed[0]['model']} on {closed[0]['text']}"
    )


def columns(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Steps, and the values of a column."""
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def draw_cpu(axes: Any, rows: list[dict[str, str]], dtype: str) -> None:
    threads = max(int(row["threads"]) for row in rows)
    rate = {
        (row["contender"], row["isa"]): float(row["gweights_per_s"])
        for row in rows
        if row["dtype"] == dtype and int(row["threads"]) == threads
    }
    bars = [(label, rate[key], key[0]) for key, label in BARS if key in rate]
    colours = ["#1b7f5c" if name.startswith("zo_kernels") else "#9aa3ab" if name == "rewrite" else "#b03a48" for _, _, name in bars]
    drawn = axes.barh([label for label, _, _ in bars], [value for _, value, _ in bars], color=colours)
    axes.bar_label(drawn, [f"{value:.2g}" for _, value, _ in bars], fontsize=7, padding=2)
    axes.set_xscale("log")
    axes.set_xlim(right=max(value for _, value, _ in bars) * 3)
    axes.set_xlabel("10⁹ weights / s")
    axes.set_title(f"One pass, {dtype}, {threads} CPU threads, {int(rows[0]['weights']) / 2**20:.0f} Mi weights", fontsize=10)
    axes.tick_params(axis="y", labelsize=7)


def draw_size(axes: Any, rows: list[dict[str, str]]) -> None:
    """GB/s of one pass against size, one line a contender; bf16, where memory is bound least and arithmetic most."""
    rows = [row for row in rows if row["question"] == "size" and row["dtype"] == "bfloat16"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = [(int(row["weights"]), float(row["gb_per_s"])) for row in rows if row["contender"] == name]
        style = {"copy": ("#9aa3ab", "--"), "mezo": ("#b03a48", "-"), "normal_add": ("#b03a48", ":")}
        colour, line = style.get(name, ("#1b7f5c" if name in ("cpu", "cuda") else "#2f6fb0", "-"))
        label = (
            f"zo_kernels, {name}"
            if name not in style
            else {"mezo": "MeZO's expression", "normal_add": "torch.normal + add_"}.get(name, name)
        )
        axes.plot(*zip(*points, strict=True), line, color=colour, label=label, marker=".")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    caption(axes, "weights", "GB/s", f"One pass, bfloat16, {rows[0]['gpu'] or rows[0]['threads'] + ' CPU threads'}")


def draw_terms(axes: Any, rows: list[dict[str, str]]) -> None:
    """Element-terms a second of one pass against K."""
    rows = [row for row in rows if row["question"] == "terms" and row["terms"] != "0"]
    for name in dict.fromkeys(row["contender"] for row in rows):
        for dtype, line in (("float32", ":"), *LINES.items()):
            points = [
                (int(row["terms"]), float(row["gterms_per_s"])) for row in rows if (row["contender"], row["dtype"]) == (name, dtype)
            ]
            if points:
                colour = "#1b7f5c" if name in ("cpu", "cuda") else "#2f6fb0"
                axes.plot(*zip(*points, strict=True), line, color=colour, label=f"{name}, {dtype}", marker=".")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    caption(
        axes, "terms K of one pass", "10⁹ element-terms / s", f"Many terms, {rows[0]['gpu'] or rows[0]['threads'] + ' CPU threads'}"
    )


def draw_step(axes: Any, rows: list[dict[str, str]]) -> None:
    """Seconds of a step over those of two bare forwards, by mode, one group a model, dtype, number of tokens and of threads."""

    def group_of(row: dict[str, str]) -> tuple[str, ...]:
        threads = () if row["gpu"] else (f"({row['threads']})",)
        return (row["model"], row["dtype"], f"{row['batch']}×{row['sequence']}", *threads)

    groups = list(dict.fromkeys(map(group_of, rows)))
    modes = [mode for mode in dict.fromkeys(row["mode"] for row in rows) if mode != "forwards"]
    ours = ["#1b7f5c", "#d98c1f", "#2f6fb0", "#7a5ba6", "#4d4d4d"]
    colours = {mode: "#b03a48" if mode == "mezo" else ours[k % len(ours)] for k, mode in enumerate(modes)}
    height = 0.8 / len(modes)
    for k, mode in enumerate(modes):
        at, values = [], []
        for g, group in enumerate(groups):
            mine = {row["mode"]: float(row["median_s"]) for row in rows if group_of(row) == group}
            if mode in mine:
                at.append(g + (k - (len(modes) - 1) / 2) * height)
                values.append(mine[mode] / mine["forwards"])
        drawn = axes.barh(at, values, height, color=colours[mode], label=mode)
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], fontsize=6, padding=2)
    axes.axvline(1, color="#9aa3ab", linewidth=1)
    axes.set_yticks(range(len(groups)), [" ".join(group) for group in groups], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds of a step / seconds of two bare forwards")
    axes.set_title(f"A whole step, {rows[0]['gpu'] or rows[0]['cpu'] + ' (threads)'}", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def draw_learned(axes: Any, rows: list[dict[str, str]], method: str, objective: str) -> None:
    """AUC less MeZO's with its interval, a line a task."""
    mine = [row for row in rows if (row["method"], row["objective"], row["verdict"] != "") == (method, objective, True)][::-1]
    for k, row in enumerate(mine):
        difference, low, high = (float(row[f"auc_{name}"]) for name in ("difference", "low", "high"))
        axes.errorbar(difference, k, xerr=[[difference - low], [high - difference]], fmt="o", capsize=3, color="#1b7f5c")
    axes.axvline(0, color="#b03a48", linewidth=1.2)
    axes.set_yticks(range(len(mine)), [row["data"].replace("_", " ") for row in mine], fontsize=8)
    axes.margins(y=0.4)
    axes.set_xlabel("AUC less that of MeZO, 95 %")
    row, baseline = mine[0], next(row for row in rows if row["method"] == row["baseline"] and row["objective"] == "loss")
    axes.set_title(f"Learning: {method} on {objective}, {row['forwards']} forwards; MeZO {baseline['budget']}", fontsize=9)


def draw_memory(axes: Any, rows: list[dict[str, str]], shape: str) -> None:
    """Peak of a step over inference's."""
    peaks = {row["method"]: float(row["peak_bytes"]) for row in rows if row["shape"] == shape and row["peak_bytes"]}
    shown = [name for name in ("inference", "mezo", "fzoo", "momentum", "zo-adam", "adam@lora", "sgd", "adam") if name in peaks]
    first_order = ("adam@lora", "sgd", "adam")
    colours = ["#4d4d4d" if name == "inference" else "#b03a48" if name in first_order else "#1b7f5c" for name in shown]
    drawn = axes.barh(shown, [peaks[name] / peaks["inference"] for name in shown], color=colours)
    axes.bar_label(drawn, [f"{peaks[name] / peaks['inference']:.2f}" for name in shown], fontsize=7, padding=2)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    one = next(row for row in rows if row["shape"] == shape)
    axes.set_xlabel("peak of a step / peak of inference")
    axes.set_title(f"Memory: {shape}'s shape, {one['dtype']}, {one['batch']}×{one['sequence']} tokens", fontsize=9)


def draw_overhead(axes: Any, rows: list[dict[str, str]], model: str, dtype: str) -> None:
    """What a step costs over two bare forwards."""
    found = {row["mode"]: float(row["overhead_percent"]) for row in rows if (row["model"], row["dtype"]) == (model, dtype)}
    labels = {"mezo": "MeZO's loop", "scratch": "scratch", "inplace": "in place", "lazy": "lazy"}
    shown = [mode for mode in labels if mode in found]
    drawn = axes.barh(
        [labels[m] for m in shown], [found[m] for m in shown], color=["#b03a48" if m == "mezo" else "#1b7f5c" for m in shown]
    )
    axes.bar_label(drawn, [f"+{found[m]:.3g} %" for m in shown], fontsize=7, padding=2)
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    one = next(row for row in rows if (row["model"], row["dtype"]) == (model, dtype))
    axes.set_xlabel("time over two bare forwards, %")
    axes.set_title(f"Speed: {model}, {dtype}, {one['batch']}×{one['sequence']} tokens, {one['threads']} threads", fontsize=9)


def draw_cluster(axes: Any, rows: list[dict[str, str]], shape: str) -> None:
    """Simulated seconds of a step against workers, a line for each way in which they are apart."""
    rows = [row for row in rows if (row["question"], row["shape"], row["parallel"]) == ("workers", shape, "auto")]
    for where in dict.fromkeys(row["where"] for row in rows):
        mine = [row for row in rows if row["where"] == where]
        axes.plot([int(row["workers"]) for row in mine], [float(row["value"]) for row in mine], marker=".", label=where)
    axes.set_xscale("log")
    axes.set_yscale("log")
    caption(axes, "workers", "seconds of a step", f"{shape}, computed and simulated")


Panel = tuple[Callable[..., None], tuple[Any, ...]]


def figures(results: Path) -> dict[str, list[Panel]]:
    """File name -> its panels, as far as there are results for them."""

    def read(name: str) -> list[dict[str, str]]:
        path = results / f"{name}.csv"
        return harness.read_csv(path) if path.exists() else []

    panels: dict[str, list[Panel]] = {"benchmarks.png": [], "fidelity.png": [], "scaling.png": [], "step.png": []}
    if rows := read("drift"):
        panels["benchmarks.png"].append((draw_drift, (rows,)))
    if rows := read("cpu_pass"):
        panels["benchmarks.png"].append((draw_cpu, (rows, "bfloat16")))
    if rows := read("fidelity"):
        of_bf16 = [row for row in rows if row["dtype"] == "bfloat16"]
        for lr in dict.fromkeys(row["lr"] for row in of_bf16 if row["loop"] == "open"):
            panels["fidelity.png"].append((draw_fidelity_distance, (rows, lr)))
        for dtype in ("bfloat16", "float16"):
            if any((row["loop"], row["dtype"]) == ("closed", dtype) for row in rows):
                panels["fidelity.png"].append((draw_fidelity_loss, (rows, dtype)))
    for name in ("scaling", "gpu_scaling"):
        rows = read(name)
        for question, draw in (("size", draw_size), ("terms", draw_terms)):
            if any(row["question"] == question for row in rows):
                panels["scaling.png"].append((draw, (rows,)))
    for name in ("step", "gpu_step"):
        if rows := read(name):
            panels["step.png"].append((draw_step, (rows,)))
    if rows := read("cluster"):
        shapes = list(dict.fromkeys(row["shape"] for row in rows if row["question"] == "workers"))
        panels["cluster.png"] = [(draw_cluster, (rows, shape)) for shape in (shapes[0], shapes[-1])]
    ranking = [row for row in read("ranking") if row["model"] == "smollm2"]
    memory, steps = read("memory"), ("llama-110m", "float32", "32")
    speed = [row for row in read("step") if (row["model"], row["dtype"], row["sequence"]) == steps]
    if ranking and memory and speed:
        panels["overview.png"] = [
            (draw_learned, (ranking, "fzoo", "pairs")),
            (draw_memory, (memory, "opt-125m")),
            (draw_overhead, (speed, "llama-110m", "float32")),
        ]
    return {name: drawn for name, drawn in panels.items() if drawn}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--figures", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    args = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = figures(args.results)
    if not drawn:
        print(f"{args.results} has no results that a figure shows: run benchmarks/run.py first", file=sys.stderr)
        return 1
    args.figures.mkdir(parents=True, exist_ok=True)
    for name, panels in drawn.items():
        wide = 3 if name == "overview.png" else min(2, len(panels))
        lines, size = -(-len(panels) // wide), (4.2, 2.6) if name == "overview.png" else (5.2, 3.6)
        figure, axes = pyplot.subplots(lines, wide, figsize=(size[0] * wide, size[1] * lines), squeeze=False, layout="constrained")
        for axis, panel in zip_longest(axes.flat, panels):
            if panel is None:
                axis.set_visible(False)
                continue
            draw, inputs = panel
            draw(axis, *inputs)
            axis.spines[["top", "right"]].set_visible(False)
        # Metadata is left out: a figure drawn twice from one CSV is the same file.
        figure.savefig(args.figures / name, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
