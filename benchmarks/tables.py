"""Writes the tables of docs/benchmarks.md from the CSV files: no number in them is typed in by hand.

    python benchmarks/tables.py --results benchmarks/results --page docs/benchmarks.md

Belongs here: which rows and columns of a result make a table. Does not belong here: measuring, figures (plot.py). The page holds
`<!-- table NAME -->` and `<!-- end -->`; what lies between is replaced. A table without a CSV file says "not yet measured".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import harness

Row = dict[str, str]


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def caption(rows: list[Row]) -> str:
    """Processor or GPU, versions and commit; one line for each machine and commit in the file."""
    seen = []
    for row in rows:
        device = row["gpu"] or f"{row['cpu']}, {row['cores']} cores"
        versions = [
            f"{name} {row[name]}" for name in ("torch", "triton" if row["gpu"] else "", "cuda", "commit") if name and row[name]
        ]
        if (line := f"{device}; {', '.join(versions)}.") not in seen:
            seen.append(line)
    return "\n".join(seen)


def drift(rows: list[Row]) -> str:
    steps = [1, 10, 100, 500, 1000, 2000]
    body = []
    for key in dict.fromkeys((row["model"], row["dtype"], row["mode"]) for row in rows):
        mine = {int(row["step"]): row for row in rows if (row["model"], row["dtype"], row["mode"]) == key}
        changed = f"{100 * float(mine[1]['changed_bits_fraction']):.3g} %"
        body.append([*key, changed, *(f"{float(mine[s]['relative_drift']):.2g}" if s in mine else "" for s in steps)])
    header = ["model", "dtype", "mode", "changed after 1 step", *(f"drift after {s}" for s in steps)]
    return "`drift` is ‖θ − θ₀‖ / ‖θ₀‖.\n\n" + markdown(header, body)


def fidelity(rows: list[Row], loop: str) -> str:
    """The last step of every run."""
    start = next(row for row in rows if row["loop"] == "start")
    rows = [row for row in rows if row["loop"] == loop]
    if not rows:
        return "Not yet measured."
    body = []
    for key in dict.fromkeys((row["lr"], row["dtype"], row["mode"], row["rounding"]) for row in rows):
        row = [row for row in rows if (row["lr"], row["dtype"], row["mode"], row["rounding"]) == key][-1]
        numbers = [f"{float(row['distance']):.3g}"]
        if loop == "closed":
            numbers.append(f"{float(row['own_distance']):.3g}")
        numbers += [f"{float(row[name]):.2g}" for name in ("replay_distance", "replay_rounded_distance")]
        if loop == "open":
            numbers += [f"{100 * float(row['vanished_fraction']):.3g} %", f"{float(row['realised']):.3f}"]
            numbers.append(f"{float(row['step_error']):.2g}")
        numbers += [f"{float(row[name]):.4f}" for name in ("validation_loss", "train_loss")]
        if loop == "closed":
            numbers += [f"{float(row[name]):.4f}" for name in ("replay_validation_loss", "replay_rounded_validation_loss")]
        body.append([*key, *numbers])
    header = ["lr", "dtype", "mode", "rounding", "distance", *(["of own trajectory"] if loop == "closed" else [])]
    header += ["fused replay", "rounded once"]
    header += ["vanished", "realised", "error of a step"] if loop == "open" else []
    header += ["validation loss", "train loss"]
    header += ["validation, replay", "validation, rounded once"] if loop == "closed" else []
    row = rows[-1]
    note = (
        f"{row['model']} ({int(row['weights']) / 1e6:.1f} M) on {row['text']}, ε {row['eps']}, {row['step']} steps of "
        f"{row['batch']}×{row['sequence']} tokens; at the start the losses are {float(start['validation_loss']):.4f} (validation) and "
        f"{float(start['train_loss']):.4f} (train)."
    )
    return f"{note}\n\n" + markdown(header, body)


def cpu_pass(rows: list[Row]) -> str:
    """10^9 weights a second and the ratio to torch.normal + add_, by type and thread count."""
    columns = list(dict.fromkeys((row["threads"], row["dtype"]) for row in rows))
    body = []
    for key in dict.fromkeys((row["contender"], row["fused"]) for row in rows):
        mine = {(row["threads"], row["dtype"]): row for row in rows if (row["contender"], row["fused"]) == key}
        cells = []
        for column in columns:
            row = mine.get(column)
            if row is None:
                cells.append("")
            elif int(row["terms"]) > 1:
                cells.append(f"{float(row['gterms_per_s']):.3g} terms")
            else:
                ratio = f" ({float(row['ratio_to_strongest']):.3g}×)" if row["terms"] == "1" else ""
                cells.append(f"{float(row['gweights_per_s']):.2g}{ratio}")
        body.append([key[0] + (f" (fused: {key[1]})" if key[1] else ""), *cells])
    header = ["contender", *(f"{dtype}, {threads} thread{'s' if threads != '1' else ''}" for threads, dtype in columns)]
    note = (
        "10⁹ weights (or terms) a second; in parentheses over the strongest of torch's ways with this type and number of threads."
    )
    return f"{note} {cpu_ratios(rows)}\n\n" + markdown(header, body)


def cpu_ratios(rows: list[Row]) -> str:
    """The plain pass by the best instruction set beside the strongest of torch's ways, for all types of one run."""
    last: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["contender"].removeprefix("zo_kernels ") == row["isa"]:  # from portable to the best
            last[row["threads"], row["dtype"]] = row
    parts = []
    for threads in dict.fromkeys(t for t, _ in last):
        mine = {dtype: row for (t, dtype), row in last.items() if t == threads}
        others = {dtype: strongest(rows, threads, dtype) for dtype in mine}
        ratios = ", ".join(
            f"{float(row['ratio_to_strongest']):.3g}× ({dtype}, `{others[dtype]['contender']}`)" for dtype, row in mine.items()
        )
        parts.append(f"{threads} thread{'s' if threads != '1' else ''}: {ratios}")
    return f"The best instruction set is ahead of that by, with {'; with '.join(parts)}." if parts else ""


def strongest(rows: list[Row], threads: str, dtype: str) -> Row:
    """The fastest of torch's ways."""
    mine = [r for r in rows if (r["threads"], r["dtype"]) == (threads, dtype) and float(r["ratio_to_strongest"]) == 1.0]
    return next(r for r in mine if not r["contender"].startswith("zo_kernels"))


def step(rows: list[Row]) -> str:
    def mib(text: str) -> str:
        return f"{int(text) / 2**20:.0f}" if text else "not measured"

    def moved(row: Row) -> str:
        """All bytes over weights of a step in units of the lower bound, which is the same for every mode that updates."""
        if not row["lower_bound_bytes"]:
            return "not measured"
        total = sum(int(row[name]) for name in ("forward_bytes", "weight_bytes_read", "weight_bytes_written"))
        return f"{total / int(row['lower_bound_bytes']):.2f}×" if row["mode"] != "forwards" else ""

    body = []
    for row in rows:
        spread = f"{float(row['min_s']):.3g} to {float(row['max_s']):.3g}"
        tokens = f"{row['batch']}×{row['sequence']}"
        cells = [f"{int(row['weights']) / 1e6:.0f} M", row["dtype"], row["threads"], tokens, row["mode"]]
        cells += [
            f"{float(row['median_s']):.3g} ({spread})",
            f"{float(row['overhead_percent']):.3g} %",
            f"{float(row['passes_s']):.2g}" if row["passes_s"] else "not measured",
        ]
        body.append([row["model"], *cells, mib(row["peak_over_inference_bytes"]), moved(row)])
    return markdown(
        [
            *("model", "weights", "dtype", "threads", "tokens", "mode", "seconds (spread)", "overhead", "passes, s"),
            *("memory over inference, MiB", "bytes over weights"),
        ],
        body,
    )


def gpu_pass(rows: list[Row]) -> str:
    """GB/s and percent of the copy by type, at the size that every contender has; many terms are bound by arithmetic: terms a second."""
    sizes = [{row["weights"] for row in rows if row["contender"] == c} for c in {row["contender"] for row in rows}]
    size = max(set.intersection(*sizes), key=int)
    rows = [row for row in rows if row["weights"] == size]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    body = []
    for key in dict.fromkeys((row["contender"], row["feature"]) for row in rows):
        mine = {row["dtype"]: row for row in rows if (row["contender"], row["feature"]) == key}
        cells = []
        for dtype in dtypes:
            row = mine.get(dtype)
            if row is None:
                cells.append("")
            elif int(row["terms"]) >= 8:
                cells.append(f"{float(row['gterms_per_s']):.0f}·10⁹ terms/s")
            else:
                cells.append(f"{float(row['gb_per_s']):.0f} ({float(row['percent_of_copy']):.0f} %)")
        body.append([*key, *cells])
    note = f"{int(size):,} weights; other sizes are in the CSV. GB/s, in parentheses percent of `copy_`."
    return f"{note}\n\n" + markdown(["contender", "feature", *dtypes], body)


def journal(rows: list[Row]) -> str:
    """Microseconds a record, by policy."""
    body = []
    for row in rows:
        n = int(row["records"])
        what = f"append, fsync every {row['fsync_every']}" if row["fsync_every"] not in ("", "0") else row["operation"]
        spread = f"{1e6 * float(row['min_s']) / n:.3g} to {1e6 * float(row['max_s']) / n:.3g}"
        body.append([what, row["record_bytes"], row["file_system"], f"{float(row['us_per_record']):.3g} ({spread})"])
    return markdown(["operation", "bytes a record", "file system", "µs a record (spread)"], body)


def gpu_linear(rows: list[Row]) -> str:
    """Microseconds by contender; one line for each matrix and number of rows."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    body = []
    for key in dict.fromkeys((row["model"], row["layer"], row["dtype"], row["m"]) for row in rows):
        mine = {row["contender"]: row for row in rows if (row["model"], row["layer"], row["dtype"], row["m"]) == key}
        cells = [f"{1e6 * float(mine[n]['median_s']):.3g} ({float(mine[n]['ratio_to_two_forwards']):.2f})" for n in names]
        body.append([*key, *cells])
    note = "Microseconds for both forwards of a layer; in parentheses over `two_forwards`. `m` is the number of rows of a half."
    return f"{note}\n\n" + markdown(["model", "layer", "dtype", "m", *names], body)


def replay(rows: list[Row]) -> str:
    """Element-terms a second, by type and rounding; one line for each number of passes."""
    body = []
    for key in dict.fromkeys((row["backend"], row["dtype"], row["kind"], row["rounding"], row["passes"]) for row in rows):
        mine = {r["contender"]: r for r in rows if (r["backend"], r["dtype"], r["kind"], r["rounding"], r["passes"]) == key}
        cells = [
            f"{float(mine[n]['gterms_per_s']):.3g} ({float(mine[n]['ratio_to_separate']):.2f})"
            for n in ("sequence", "separate", "fused")
        ]
        body.append([*key, *cells])
    note = "10⁹ weights times passes a second; in parentheses over `separate`."
    return f"{note}\n\n" + markdown(["backend", "dtype", "kind", "rounding", "passes", "sequence", "separate", "fused"], body)


def rule_pass(rows: list[Row]) -> str:
    """Weights a second of each rule's pass, beside torch's and beside a pass that only perturbs."""
    body = []
    for key in dict.fromkeys((row["backend"], row["dtype"], row["rule"]) for row in rows):
        mine = {r["contender"]: r for r in rows if (r["backend"], r["dtype"], r["rule"]) == key}
        ours = mine["rule pass"]
        cells = [f"{float(mine[n]['gweights_per_s']):.3g}" for n in ("rule pass", "torch", "perturb")]
        body.append([*key, *cells, f"{float(ours['ratio_to_torch']):.1f}", ours["bytes_per_weight"], ours["percent_of_rewrite"]])
    header = ["backend", "dtype", "rule", "rule pass", "torch", "perturb", "over torch", "bytes a weight", "% of a rewrite"]
    return "10⁹ weights a second.\n\n" + markdown(header, body)


# what a pass does -> its kernel with CUDA and with Triton
SASS = {
    "plain pass": ("gaussian", "plain"),
    "the same, terms in a loop": ("gaussian", "many-terms"),
    "rademacher": ("rademacher", "rademacher"),
    "stochastic rounding": ("gaussian-stochastic", "stochastic"),
    "bit mask": ("gaussian-general-bit-mask", "bit-mask"),
    "random mask": ("gaussian-general-random-mask", "random-mask"),
    "scale by blocks": ("gaussian-general-scale", "scale"),
    "low rank, of rank 1": ("gaussian-extended-low-rank", "low-rank"),
    "a pass of a sequence": ("gaussian-sequence", "sequence"),
    "the same, stochastic": ("gaussian-sequence-stochastic", "sequence-stochastic"),
    "momentum": ("momentum", "momentum"),
    "Adam": ("adam", "adam"),
    "HiZOO": ("hizoo", "hizoo"),
    "recomputed Adam": ("adam_history", "adam_history"),
    "perturbed linear": ("", "perturbed-linear"),
    "the same, 64 rows in each half": ("", "perturbed-linear-many-rows"),
}


def sass(rows: list[Row]) -> str:
    """Instructions per element of one term, and of each further one."""
    found = {(r["backend"], r["kernel"], r["arch"]): r for r in rows if r["dtype"] == "float16"}

    def cell(backend: str, kernel: str, arch: str) -> str:
        row = found.get((backend, kernel, arch))
        if row is None:
            return ""
        one, further = float(row["instructions_per_element"]), row["instructions_per_element_term"]
        # Where terms, or Triton's ranks, are a loop, none of them is in the first number.
        if row["terms"] == "K" or (backend, kernel) == ("triton", "low-rank"):
            one += float(further)
        return f"{one:.1f} ({float(further):.1f})" if further else f"{one:.1f}"

    columns = [(backend, arch) for backend in ("cuda", "triton") for arch in ("sm_80", "sm_90")]
    body = [[what, *(cell(b, names[b == "triton"], arch) for b, arch in columns)] for what, names in SASS.items()]
    note = "Instructions per element, fp16, with one Gaussian term where nothing else is said; in parentheses those of each further term or rank."
    return f"{note}\n\n" + markdown(["pass", *(f"{b}, {arch}" for b, arch in columns)], body)


# ---- scaling.py: one table a question ---------------------------------------------------------------------------------


def grid(
    rows: list[Row], question: str, labels: Callable[[Row], tuple[str, ...]], header: Sequence[str], cell: Callable[[Row], str]
) -> str:
    """One line for each label, one column for each contender."""
    rows = [row for row in rows if row["question"] == question]
    if not rows:
        return "Not yet measured."
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells = {(labels(row), row["contender"]): cell(row) for row in rows}
    body = [[*label, *(cells.get((label, name), "") for name in names)] for label in dict.fromkeys(map(labels, rows))]
    return markdown([*header, *names], body)


def crossovers(rows: list[Row]) -> str:
    """For each of our backends and types, the size from which a pass stays at 80 % of a rewrite."""
    found = []
    for name in ("cpu", "cuda", "triton"):
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            mine = [row for row in rows if (row["question"], row["contender"], row["dtype"]) == ("size", name, dtype)]
            start = None
            for row in sorted(mine, key=lambda row: -int(row["weights"])):
                if not row["percent_of_rewrite"] or float(row["percent_of_rewrite"]) < 80:
                    break
                start = int(row["weights"])
            if mine:
                found.append(f"{name}, {dtype}: {f'2^{start.bit_length() - 1}' if start else 'no size'}")
    return "; ".join(found)


def short(x: float) -> str:
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def size(rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        share = f" ({float(row['percent_of_rewrite']):.0f} %)" if row["percent_of_rewrite"] else ""
        return f"{short(float(row['gb_per_s']))}{share}"

    note = "GB/s, in parentheses percent of a rewrite (every byte read and written back, nothing computed) at the same size."
    if found := crossovers(rows):
        note += f" At 80 % of that or more from there on: {found}."
    return f"{note}\n\n" + grid(
        rows, "size", lambda row: (row["dtype"], f"2^{int(row['weights']).bit_length() - 1}"), ["dtype", "weights"], cell
    )


def terms(rows: list[Row]) -> str:
    rows = [{**row, "contender": f"{row['contender']}, {row['dtype']}"} for row in rows if row["terms"] != "0"]
    note = "10⁹ element-terms a second of one pass with K noises."
    return f"{note}\n\n" + grid(rows, "terms", lambda row: (row["terms"],), ["K"], lambda row: short(float(row["gterms_per_s"])))


def many(rows: list[Row]) -> str:
    def label(row: Row) -> tuple[str, ...]:
        return row["dtype"], f"{row['tensors']} of {int(row['weights']) // int(row['tensors']):,}"

    note = "Milliseconds for the whole list."
    return f"{note}\n\n" + grid(rows, "list", label, ["dtype", "tensors"], lambda row: short(1e3 * float(row["median_s"])))


def host(rows: list[Row]) -> str:
    body = [
        [row["contender"], short(1e6 * float(row["median_s"])), f"{float(row['us_per_tensor']):.2g}"]
        for row in rows
        if row["question"] == "host"
    ]
    tensors = next((row["tensors"] for row in rows if row["question"] == "host"), "")
    header = ["work", f"µs, {tensors} tensors", "µs a tensor"]
    return markdown(header, body) if body else "Not yet measured."


def told(rows: list[Row]) -> str:
    body = [
        [row["dtype"], row["mode"], row["step"], short(1e3 * float(row["median_s"])), row["told_us"], row["percent"]]
        for row in rows
        if row["contender"] == "told"
    ]
    one = rows[0]
    note = f"{one['model']}, {one['batch']}x{one['sequence']} tokens, {one['threads']} threads, CPU time."
    return f"{note}\n\n" + markdown(["dtype", "mode", "step", "ms a step", "µs of telling", "percent"], body)


def against(rows: list[Row]) -> str:
    """Steps of both trees; then what they take beside their forwards, where there are any."""
    body = [
        [
            *(row[what] for what in ("case", "dtype", "mode")),
            *(
                short(1e6 * float(row[what])) if row[what] else ""
                for what in ("before_median_s", "median_s", "before_wall_median_s", "wall_median_s")
            ),
            f"{float(row['ratio']):.3f} ({float(row['ratio_min']):.2f} to {float(row['ratio_max']):.2f})",
        ]
        for row in rows
    ]
    beside = [
        [
            *(row[what] for what in ("case", "dtype", "mode")),
            *(short(1e6 * float(row[what])) for what in ("bare_median_s", "before_beside_median_s", "beside_median_s")),
            f"{short(1e6 * float(row['beside_min_s']))} to {short(1e6 * float(row['beside_max_s']))}",
            *(short(1e6 * float(row[what])) for what in ("before_wall_beside_median_s", "wall_beside_median_s")),
            *(f"{float(row[what]):+.1f} %" for what in ("before_over_bare_percent", "over_bare_percent")),
        ]
        for row in rows
        if row["bare_median_s"]
    ]
    note = f"CPU time, one thread; before: commit {rows[0]['before']}; ratio: median of {rows[0]['rounds']} rounds of {rows[0]['steps']} steps in turn."
    times = ["µs a step before", "µs now", "wall before", "wall now", "ratio (all rounds)"]
    more = [
        "bare, µs",
        "beside, before",
        "beside, now",
        "all rounds",
        "wall beside, before",
        "now",
        "over bare, before",
        "over bare, now",
    ]
    parts = [note, markdown(["case", "dtype", "mode", *times], body)]
    if beside:
        parts += ['What a step takes beside its forwards ("bare": they alone):', markdown(["case", "dtype", "mode", *more], beside)]
    return "\n\n".join(parts)


def launches(rows: list[Row]) -> str:
    body = [
        [
            *(row[what] for what in ("pass", "way", "calls")),
            f"{1e6 * float(row['median_s']):.1f} ({1e6 * float(row['min_s']):.1f} to {1e6 * float(row['max_s']):.1f})",
            f"{float(row['ratio']):.2f}",
        ]
        for row in rows
    ]
    return markdown(["pass", "way", "calls", "µs a launch, CPU (spread)", "of a search"], body)


def ranks(rows: list[Row]) -> str:
    """A step that processes share, and its replay; then the rounds of losses."""
    body = [
        [
            *(row[name] for name in ("dtype", "contender", "ranks")),
            *(short(1e3 * float(row[name])) for name in ("median_s", "min_s", "max_s", "cpu_median_s", "busiest_median_s")),
            *(f"{float(row[name]):.3f}" if row[name] else "" for name in ("ratio", "cpu_ratio", "busiest_ratio")),
            row["sent_bytes"],
            "yes" if row["same_bits"] == "1" else "no",
        ]
        for row in rows
        if row["question"] in ("step", "replay")
    ]
    one = next(row for row in rows if row["question"] == "step")
    sizes = f"{one['points']} points, {one['batches']} micro-batches of {one['batch']}x{one['sequence']} tokens"
    note = f"{one['model']}, {sizes}, one thread a process; {one['rounds']} rounds."
    times = ["wall, ms", "least", "most", "CPU of all, ms", "CPU of the busiest, ms"]
    header = [
        "dtype",
        "contender",
        "processes",
        *times,
        "wall over one",
        "CPU over one",
        "busiest over one",
        "bytes sent",
        "same bits",
    ]
    exchanges = [
        [
            row["contender"],
            row["ranks"],
            f"{1e3 * float(row['link_s']):g}" if row["link_s"] else "",
            *(short(1e3 * float(row[name])) for name in ("median_s", "min_s")),
            short(1e3 * float(row["cpu_median_s"]) / int(row["ranks"])),
        ]
        for row in rows
        if row["question"] in ("round", "far round")
    ]
    second = markdown(["exchange", "processes", "a link, ms", "a round, wall, ms", "least", "CPU of each, ms"], exchanges)
    return f"{note}\n\n{markdown(header, body)}\n\n{second}"


def memory(rows: list[Row]) -> str:
    """MiB, and the peak as a multiple of inference's of the same shape."""
    inference = {row["shape"]: float(row["peak_bytes"]) for row in rows if row["method"] == "inference"}
    names = ("model_bytes", "state_bytes", "gradient_bytes", "buffer_bytes", "peak_bytes", "peak_rss_bytes")
    body = []
    for row in rows:
        start = [row["shape"], row["method"]]
        if row["reason"]:
            body.append([*start, *[""] * (len(names) + 2), row["reason"]])
            continue
        sizes = [f"{float(row[name]) / 2**20:,.1f}" if row[name] else "" for name in names]
        body.append(
            [*start, *sizes, f"{float(row['peak_bytes']) / inference[row['shape']]:.2f}", f"{float(row['forwards']):g}", ""]
        )
    one = rows[0]
    note = (
        f"{one['dtype']}, {one['batch']}x{one['sequence']} tokens, {one['threads']} thread. MiB; times: the peak over inference's."
    )
    header = ["shape", "method", "model", "state", "gradient", "buffer", "peak", "resident", "times", "forwards", ""]
    return f"{note}\n\n" + markdown(header, body)


def objectives(rows: list[Row]) -> str:
    body = []
    for row in rows:
        after = f"{float(row['after']):.3f} ± {float(row['after_stderr']):.3f}"
        what = (row[name] for name in ("model", "task", "metric", "objective", "method", "steps", "batch", "lr", "eps"))
        seed = row["seed"] + ("" if row["chosen"] == "1" else " (rate not chosen)")
        baselines = ("constant", "chance", "threshold", "before")
        pairs = ("other_after", "auc_before", "auc_after", "loss_before", "loss_after")
        known, more = ([f"{float(row[name]):.3f}" if row[name] else "" for name in group] for group in (baselines, pairs))
        gain = f"{float(row['gain']):+.3f} [{float(row['gain_low']):+.3f}, {float(row['gain_high']):+.3f}]" if row["gain"] else ""
        body.append([*what, seed, *known, after, gain, row["rows"], *more, row["zero_gradient_steps"]])
    header = [
        "model",
        "task",
        "metric",
        "objective",
        "method",
        "steps",
        "batch",
        "lr",
        "ε",
        "seed",
        "best constant answer",
        "either name by chance",
        "best zero-shot threshold",
        "before",
        "after",
        "gain, all seeds",
        "rows",
        "as the other name",
        "AUC before",
        "AUC after",
        "loss before",
        "loss after",
        "steps of g = 0",
    ]
    return markdown(header, body)


def noise(rows: list[Row]) -> str:
    body = [
        [
            *(row[name] for name in ("model", "task", "objective")),
            "yes" if row["balanced"] == "1" else "no",
            *(row[name] for name in ("batch", "trained", "batches", "seed")),
            f"{float(row['ratio']):.2f} ± {float(row['ratio_stderr']):.2f}",
            f"{float(row['gradient_norm']):.1f}",
        ]
        for row in rows
    ]
    return markdown(
        [
            "model",
            "task",
            "objective",
            "balanced",
            "batch",
            "weights",
            "batches",
            "seed",
            "variance over squared mean",
            "norm of the mean",
        ],
        body,
    )


# table -> (CSV file, function of its rows, figure that shows them too)
TABLES: dict[str, tuple[str, Callable[[list[Row]], str], str]] = {
    "drift": ("drift", drift, ""),
    "fidelity_open": ("fidelity", lambda rows: fidelity(rows, "open"), "fidelity.png"),
    "fidelity_closed": ("fidelity", lambda rows: fidelity(rows, "closed"), ""),
    "cpu_pass": ("cpu_pass", cpu_pass, ""),
    "step": ("step", step, "step.png"),
    "told": ("told", told, ""),
    "against": ("against", against, ""),
    "against_pass": ("against_pass", against, ""),
    "against_mask": ("against_mask", against, ""),
    "launches": ("launches", launches, ""),
    "ranks": ("ranks", ranks, ""),
    "memory": ("memory", memory, ""),
    "objectives": ("objectives", objectives, ""),
    "noise": ("noise", noise, ""),
    "journal": ("journal", journal, ""),
    "gpu_pass": ("gpu_pass", gpu_pass, ""),
    "gpu_linear": ("gpu_linear", gpu_linear, ""),
    "gpu_step": ("gpu_step", step, ""),
    "replay": ("replay", replay, ""),
    "gpu_replay": ("gpu_replay", replay, ""),
    "rule_pass": ("rule_pass", rule_pass, ""),
    "sass": ("sass", sass, ""),
    "gpu_rule_pass": ("gpu_rule_pass", rule_pass, ""),
    "size": ("scaling", size, "scaling.png"),
    "terms": ("scaling", terms, ""),
    "list": ("scaling", many, ""),
    "host": ("scaling", host, ""),
    "gpu_size": ("gpu_scaling", size, ""),
    "gpu_terms": ("gpu_scaling", terms, ""),
    "gpu_list": ("gpu_scaling", many, ""),
    "gpu_host": ("gpu_scaling", host, ""),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks.md")
    args = parser.parse_args(arguments)
    text = args.page.read_text()
    for name, (results, table, figure) in TABLES.items():
        path = args.results / f"{results}.csv"
        if path.exists():
            rows = harness.read_csv(path)
            filled = f"{caption(rows)}\n\n{table(rows)}"
            if figure and (args.page.parent / "figures" / figure).exists():
                filled = f"![{name}](figures/{figure})\n\n{filled}"
        else:
            filled = "Not yet measured."
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            print(f"{args.page.name} has no '<!-- table {name} -->' ... '<!-- end -->'", file=sys.stderr)
            return 1
        text = pattern.sub(lambda found: f"{found[1]}\n{filled}\n\n{found[2]}", text)  # noqa: B023
    args.page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
