"""Every benchmark script runs at a tiny size and writes the columns that docs/benchmarks.md lists. No timing is asserted."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from zo_finetune import shapes

import zo_kernels
from zo_kernels.optim.workers import cut

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
needs_extension = pytest.mark.skipif(
    zo_kernels.backends()["cpu"] is not None, reason=f"backend cpu: {zo_kernels.backends()['cpu']}"
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python benchmarks/SCRIPT.py ARGUMENTS`, in this process: another would first import torch for seconds."""
    said, complained = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()

    def warn(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        complained.write(warnings.formatwarning(message, category, filename, lineno))

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        warnings.simplefilter("default")
        patch.setattr(warnings, "showwarning", warn)
        patch.syspath_prepend(str(BENCHMARKS))
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [str(BENCHMARKS / f"{script}.py"), *arguments])
        # One thread, so that a busy machine does not leave torch's threads waiting for each other.
        torch.set_num_threads(1)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status: Any = 0
        except SystemExit as end:
            status = end.code
        finally:
            torch.set_num_threads(threads)
    if isinstance(status, str):
        complained.write(status)
    code = int(bool(status)) if isinstance(status, str) else status or 0
    return subprocess.CompletedProcess([script, *arguments], code, said.getvalue(), complained.getvalue())


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark measures nothing, and writes no report, where it is told of an xdist worker: this run is a process of its own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=ROOT)


def documented(name: str) -> list[str]:
    """The columns of one CSV file: machine columns first, then the file's own, as docs/benchmarks.md lists them."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    listed = {key: columns.split() for key, columns in re.findall(r"^- `([\w.]+)`: `([\w ]+)`", text, re.MULTILINE)}
    return listed["machine"] + listed[name]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        assert reader.fieldnames == documented(path.name)
    assert found
    return found


def test_drift(tmp_path: Path) -> None:
    path = tmp_path / "drift.csv"
    done = run("drift", "--out", str(path), "--steps", "2", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    last = {row["mode"]: row for row in rows(path) if row["step"] == "2"}
    assert set(last) == {"scratch", "inplace", "public"}
    assert float(last["scratch"]["changed_bits_fraction"]) == 0
    # A bf16 weight of 0.02 has a unit in the last place of 2^-13 to 2^-14; eps z = 1e-3 z is only a few of those.
    assert all(0.2 < float(last[mode]["changed_bits_fraction"]) < 0.95 for mode in ("inplace", "public"))

    before = path.read_text()
    more = run("drift", "--out", str(path), "--append", "--steps", "1", "--dtype", "float16", "--modes", "public")
    assert more.returncode == 0, more.stderr
    assert path.read_text().startswith(before)
    assert rows(path)[-1]["dtype"] == "float16"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model of two blocks with a tokenizer, and sentences in the form of SST-2."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("sentences")
    words = {0: ("dull", "cold", "empty"), 1: ("fine", "warm", "clever")}
    table = [{"sentence": f"{k} the film is {words[k % 2][k // 2 % 3]}", "label": k % 2} for k in range(60)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator([row["sentence"] for row in table] + [" It was great", " It was terrible"] * 50, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, part in (("train", table[:40]), ("validation", table[40:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder / "model", folder / "data"


def test_ranking(sentences: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = map(str, sentences)
    common = ["--model", model, "--shared", data, "--work", str(tmp_path / "work"), "--quick", "--methods", "mezo"]
    common += ["--cells", "stories15m-sst2", "smollm2-sst2", "--out", str(tmp_path / "ranking.csv")]
    planned = run("ranking", *common, "--plan")
    assert planned.returncode == 0 and "stories15m-sst2, 6, 0, -, not known before a run has ended" in planned.stdout
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table ranking -->\n<!-- end -->\nafter\n")
    done = run("ranking", *common, "--figures", str(tmp_path), "--page", str(page))
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "ranking.csv")
    first = [row for row in found if row["model"] == "stories15m" and row["lr"]]
    assert {(row["method"], row["objective"], row["budget"]) for row in first} == {("mezo", o, "20") for o in ("loss", "pairs")}
    half = {(row["method"], row["budget"]) for row in found if row["model"] == "smollm2" and row["lr"]}
    assert half == {("mezo", "20"), ("mezo-inputs:rank=16", "10"), ("fzoo-inputs:rank=16", "10"), ("fzoo", "10")}
    assert str(tmp_path) not in (tmp_path / "ranking.csv").read_text() and model not in (tmp_path / "ranking.csv").read_text()
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert "| zero-shot, line of these rows* |" in page.read_text() and page.read_text().endswith("<!-- end -->\nafter\n")
    left = run("ranking", *common, "--plan")
    assert re.search(r"stories15m-sst2, 6, 6, \d+, 0.0", left.stdout), left.stdout
    again = run("ranking", *common)  # finished runs are taken as they are
    assert again.returncode == 0 and "training: " not in again.stderr


def test_choices(sentences: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = map(str, sentences)
    texts, page = tmp_path / "texts.txt", tmp_path / "page.md"
    texts.write_text("the cat sat on the mat\n\nit rained all day\n")
    page.write_text("".join(f"<!-- table choices_{q} -->\n<!-- end -->\n" for q in ("inputs", "rates", "anchor")))
    common = ["--quick", "--model", model, "--shared", data, "--texts", str(texts), "--work", str(tmp_path / "work")]
    common += [
        "--places",
        "smollm2-film_reviews",
        "--questions",
        "inputs",
        "rates",
        "anchor",
        "--out",
        str(tmp_path / "choices.csv"),
    ]
    done = run("choices", *common, "--page", str(page))
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "choices.csv")
    made = {(row["question"], row["method"], row["anchor"], row["lr"], row["seed"]) for row in found}
    inputs = {
        ("inputs", name, "", lr, seed)
        for name, lr in (("fzoo", "2e-05"), ("fzoo-inputs:rank=4:power=-0.5", "0.00024"))
        for seed in "01"
    }
    rates = {
        ("rates", name, "", lr, s)
        for name, lrs in (("mezo", ("1.25e-05", "5e-05")), ("mezo:scale_free=true", ("2.5e-05", "0.0001")))
        for lr in lrs
        for s in "01"
    }
    pulls = {
        ("anchor", "fzoo", pull, lr, seed)
        for pull, lrs in (("", ("5e-06", "1e-05")), ("0.01", ("2e-05", "4e-05")))
        for lr in lrs
        for seed in "01"
    }
    assert made == inputs | rates | pulls
    assert all((row["language_after"] != "") == (row["question"] == "anchor") for row in found)
    said = page.read_text()
    assert (
        "| `mezo:scale_free=true` | 2.5e-05 | 0.0001 | at most lost by another's rate |" in said
        and "| `fzoo` | none | 5e-06 |" in said
    )
    assert "| `fzoo-inputs:rank=4:power=-0.5` | 0.00024 |" in said and model not in (tmp_path / "choices.csv").read_text()


def test_learn(sentences: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = map(str, sentences)
    path = tmp_path / "learn_gpu.csv"
    common = ["--quick", "--stories", model, "--smollm2", model, "--data", data, "--out", str(path)]
    done = run("learn_gpu", *common)
    assert done.returncode == 0, done.stderr
    found = rows(path)
    ends = {(row["model"], row["way"]): (row["step"], row["forwards"]) for row in found}
    assert ends == {
        (m, w): end for m in ("stories15m", "smollm2") for w, end in (("mezo", ("10", "20")), ("fzoo, pairs", ("2", "18")))
    }
    assert {row["ended"] for row in found} == {""} and all(float(row["seconds"]) > 0 for row in found if row["step"] != "0")
    late = run("learn_gpu", *common, "--limit", "0")
    assert late.returncode == 0, late.stderr
    found = rows(path)
    assert [row["ended"] for row in found if row["step"] != "0"] == ["time"] * 4
    assert len({(row["step"], row["model"], row["way"]) for row in found}) == 8
    absent = run(
        "learn_gpu",
        "--quick",
        "--stories",
        str(tmp_path / "no"),
        "--smollm2",
        str(tmp_path / "no"),
        "--data",
        data,
        "--out",
        str(path),
    )
    assert absent.returncode == 1 and "there is no model" in absent.stderr


def test_drift_never_names_a_path(tmp_path: Path) -> None:
    refused = run("drift", "--out", str(tmp_path / "drift.csv"), "--model", str(tmp_path))
    assert refused.returncode != 0
    assert "--model-name" in refused.stderr


def test_fidelity(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.csv"
    done = run("fidelity", "--quick", "--out", str(path))
    assert done.returncode == 0, done.stderr
    assert "model random-llama-0.5m, text synthetic" in done.stdout
    assert "UserWarning" not in done.stderr
    start, *table = rows(path)
    assert start["loop"] == "start"
    numbers = {(r["loop"], r["dtype"], r["mode"], r["rounding"], r["step"]): r for r in table}
    assert len(numbers) == len(table) == 2 * (16 + 16)  # two marks

    def get(*key: str, name: str) -> float:
        return float(numbers[key][name])

    for loop in ("closed", "open"):
        # The yardstick is replayed from its coefficients, bit for bit.
        assert get(loop, "float32", "scratch", "nearest", "3", name="distance") == 0
        assert get(loop, "float32", "scratch", "nearest", "3", name="own_distance") == 0
        # After one step a run in scratch mode, rounded to nearest, is the replay rounded once.
        of_one = [
            numbers[loop, "bfloat16", "scratch", "nearest", "1"][name] for name in ("own_distance", "replay_rounded_distance")
        ]
        assert of_one[0] == of_one[1]
        # Rounded once is closer than rounded at every step; and not rounded closer still.
        for dtype in ("float16", "bfloat16"):
            for mode, rounding in (("scratch", "stochastic"), ("inplace", "nearest"), ("public", "nearest")):
                key = (loop, dtype, mode, rounding, "3")
                assert (
                    get(*key, name="replay_distance") < get(*key, name="replay_rounded_distance") < get(*key, name="own_distance")
                )
    same = [numbers[loop, "float32", "scratch", "nearest", "3"] for loop in ("closed", "open")]
    assert same[0] == {**same[1], "loop": "closed"}
    for key, row in numbers.items():
        if key[0] == "open":
            assert row["distance"] == row["own_distance"]
            assert row["travelled"] == same[0]["travelled"] or row["step"] != "3"
    # Half of the updates or more are below half a unit of bf16; stochastic rounding keeps them on average, nearest does not.
    assert 0.9 < get("open", "bfloat16", "scratch", "stochastic", "3", name="realised") < 1.1
    assert get("open", "bfloat16", "scratch", "nearest", "3", name="realised") < 0.7
    assert get("open", "bfloat16", "scratch", "nearest", "3", name="vanished_fraction") > 0.5

    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    assert run("tables", "--results", str(tmp_path), "--page", str(page)).returncode == 0
    assert "| 2e-05 | bfloat16 | lazy | nearest |" in page.read_text()
    assert run("plot", "--results", str(tmp_path), "--figures", str(tmp_path)).returncode == 0
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_fidelity_never_names_a_path(tmp_path: Path) -> None:
    for option in ("--model", "--text"):
        refused = run("fidelity", "--out", str(tmp_path / "fidelity.csv"), option, str(tmp_path))
        assert refused.returncode != 0
        assert "go together" in refused.stderr


class TestFidelity:
    """What the figures of fidelity.py rest on."""

    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))

    @staticmethod
    def setting(lr: float) -> Any:
        import fidelity

        train, validation = (fidelity.synthetic_tokens(512, seed, 4, 8) for seed in (1, 2))
        return fidelity.Setting(None, "random", "synthetic", train, validation, lr, 1e-3, 2, 2, 0)

    def test_all_types_hold_the_start(self) -> None:

        for s in self.setting(0.0).start:
            assert torch.equal(s, s.half().float())
            assert torch.equal(s, s.bfloat16().float())

    def test_scratch_at_lr_0_stays(self) -> None:
        import fidelity

        setting = self.setting(0.0)
        validation, train = (setting.loss(setting.start, ids) for ids in (setting.validation, setting.train))
        for dtype in ("float32", "float16", "bfloat16"):
            found, differences = fidelity.measure(setting, dtype, "scratch", "nearest", "closed", [0.0, 0.0])
            assert len(differences) == 2
            assert any(differences)
            assert found[-1]["distance"] == found[-1]["travelled"] == 0
            assert (found[-1]["validation_loss"], found[-1]["train_loss"]) == (validation, train)
        assert fidelity.measure(setting, "bfloat16", "inplace", "nearest", "closed", [0.0, 0.0])[0][-1]["distance"] == ""

    def test_a_step_without_its_update(self) -> None:
        """At lr = 0 it is the step itself, whatever the mode: an update counts as vanished for no other reason."""
        import fidelity

        setting = self.setting(0.0)
        for dtype, mode, rounding in fidelity.RUNS:
            made = fidelity.Public(setting, dtype) if mode == "public" else fidelity.Ours(setting, dtype, mode, rounding)
            for tag in range(2):
                before, second, calls = made.clean(tag), [], []

                def closure(made: Any = made, second: Any = second, calls: Any = calls, mode: str = mode) -> torch.Tensor:
                    if calls and mode != "scratch":
                        second += [p.detach().clone() for p in made.params]
                    calls.append(1)
                    return torch.tensor(float(len(calls)))

                made.step(tag, closure)
                without = made.without_update(tag, before, second)
                assert all(torch.equal(p, w) for p, w in zip(made.params, without, strict=True)), (dtype, mode, rounding)

    def test_clean_weights_of_a_lazy_run_are_those_of_a_flush(self) -> None:
        import fidelity

        setting = self.setting(1e-4)
        lazy = fidelity.Ours(setting, "bfloat16", "lazy", "nearest")
        for tag in range(2):
            lazy.step(tag, lambda: fidelity.loss_of(lazy.model, setting.train))
        clean, ahead = lazy.clean(2), [p.detach().clone() for p in lazy.params]
        lazy.optimizer.flush()
        assert all(torch.equal(c, p) for c, p in zip(clean, lazy.params, strict=True))
        assert not all(torch.equal(c, a) for c, a in zip(clean, ahead, strict=True))

    def test_an_open_loop_takes_the_recorded_differences(self) -> None:
        import fidelity

        reference = [0.1, -1 / 3]
        for mode in ("scratch", "inplace", "public"):
            assert fidelity.measure(self.setting(1e-4), "bfloat16", mode, "nearest", "open", reference)[1] == reference


def test_step(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    done = run(
        "step",
        "--device=cpu",
        "--out",
        str(path),
        "--model-shape=llama-tiny",
        "--dtype=float32",
        "--tokens=2x4",
        "--rounds=1",
    )
    assert done.returncode == 0, done.stderr
    table = {row["mode"]: row for row in rows(path)}
    assert set(table) == {"forwards", "rewrite", "scratch", "scratch-leaf", "inplace", "lazy", "mezo"}
    assert "scratch-graph: cuda_graph=True: the weights are on cpu" in done.stderr
    # Bytes are counted, so they are exact: tied head, 8 tokens of 64 fp32 values each, two forwards.
    weights, gathered = 4 * 131_904, 8 * 64 * 4
    assert {int(row["forward_bytes"]) for row in table.values()} == {2 * (weights + gathered)}
    for mode, times in {"forwards": 0, "rewrite": 1, "scratch": 3, "inplace": 3, "lazy": 2, "mezo": 16}.items():
        assert int(table[mode]["weight_bytes_read"]) == int(table[mode]["weight_bytes_written"]) == times * weights, mode
    assert all(
        int(row["lower_bound_bytes"]) == int(row["forward_bytes"]) + 2 * weights for m, row in table.items() if m != "forwards"
    )

    refused = run("step", "--device=cpu", "--out", str(path), "--tokens=16")
    assert "'16' must be BATCHxSEQUENCE" in refused.stderr


def test_bytes_of_gathered_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that does not hold the whole model: an embedding is gathered, perturbed and handed out, in each forward."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    monkeypatch.setitem(step.OURS, "small", {"perturbation": "scratch", "scratch_bytes": 1 << 17})
    cpu = torch.device("cpu")
    passes = step.passes_of("small", step.Task(step.make_model("llama-tiny", cpu, torch.float32), 2, 4, cpu), cpu, None, rounds=1)
    weights, gathered, numbers = 4 * 131_904, 8 * 64 * 4, 8 * 8
    assert passes.written == 3 * weights + 2 * 3 * gathered
    assert passes.read == 3 * weights + 2 * (3 * gathered + numbers)


def test_the_shape_of_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    sizes = [p.numel() for p in step.make_model("gpt2", torch.device("meta"), torch.float32).parameters()]
    assert (len(sizes), sum(sizes)) == (148, 124_439_808)
    assert 3 * 4 * sum(sizes) < step.estimate("gpt2", torch.float32, (8, 32), 2) < 5 * 4 * sum(sizes)


def test_step_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    # 2^40 tokens of activations fit nowhere; nothing of that size may be allocated to find out.
    path = tmp_path / "step.csv"
    shape = ["--device=cpu", f"--out={path}", "--model-shape=llama-tiny", "--dtype=float32", "--rounds=1"]
    done = run("step", *shape, "--tokens", f"{1 << 20}x{1 << 20}", "1x2", "--modes", "inplace")
    assert done.returncode == 0, done.stderr
    assert "left out: llama-tiny 1048576x1048576 inplace needs about" in done.stderr
    assert [(row["batch"], row["mode"]) for row in rows(path)] == [("1", "forwards"), ("1", "inplace")]


@needs_extension
def test_scaling_tables_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "scaling.csv"
    done = run("scaling", "--device=cpu", "--quick", "--rounds=1", f"--out={path}")
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert {row["question"] for row in table} == {"size", "terms", "list", "host"}
    assert {row["contender"] for row in table if row["question"] == "size"} == {"copy", "rewrite", "cpu", "normal_add", "mezo"}
    assert {int(row["terms"]) for row in table if row["question"] == "terms"} == {0, *(1 << k for k in range(11))}
    assert {"step, scratch", "step, inplace", "step, mezo", "check of storages"} <= {row["contender"] for row in table}
    assert all(row["us_per_tensor"] and row["terms"] == "0" for row in table if row["contender"] == "copy")

    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    filled = run("tables", "--results", str(tmp_path), "--page", str(page))
    assert filled.returncode == 0, filled.stderr
    parts = dict(re.findall(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL))
    measured = {"size", "terms", "list", "host"}
    assert {name for name, text in parts.items() if text.strip() != "Not yet measured."} == measured
    assert all("| --- |" in parts[name] for name in measured)
    assert "| 1024 |" in parts["terms"]

    drawn = run("plot", "--results", str(tmp_path), "--figures", str(tmp_path))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "benchmarks.png").exists()


def test_told(tmp_path: Path) -> None:
    path = tmp_path / "told.csv"
    done = run("told", "--out", str(path), "--rounds=2", "--model-shape=llama-tiny", "--tokens=2x8")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # a sound run
    table = rows(path)
    assert [(r["dtype"], r["mode"], r["step"], r["contender"]) for r in table] == [
        (dtype, mode, step, contender)
        for dtype in ("float32", "bfloat16")
        for mode in ("scratch", "inplace")
        for step in ("1", "2", "3", "4", "later")
        for contender in ("silent", "told")
    ]
    assert all(bool(r["told_us"]) == bool(r["percent"]) == (r["contender"] == "told") for r in table)


def test_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    monkeypatch.setitem(cast(dict[str, Any], shapes.SHAPES), "tiny", tiny)
    path = tmp_path / "frozen.csv"
    done = run("frozen", "--out", str(path), "--rounds=2", "--shape=tiny", "--tokens=2x8")
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [(r["trained"], r["cache"], r["blocks_not_run"]) for r in table] == [
        *(
            (trained, cache, "1" if cache == "memory" else "0")
            for trained in ("last block", "last quarter", "lora in the last half")
            for cache in ("off", "memory")
        ),
        *(
            ("blocks in turn", cache, share) for cache, share in (("off", "0"), ("step", "0.333"))
        ),  # the embedding's turn, block 0's and block 1's
    ]
    assert all(float(r["loss_difference"]) <= float(r["bound"]) for r in table if r["cache"] == "memory")
    assert table[-1]["loss_difference"] == "0.0"
    assert {r["state_bytes"] for r in table} == {"", str(2 * 8 * 16 * 4)}


def test_batches(sentences: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zo_finetune.packed.ROW_NS", 0.0)  # a model so small would pad
    model, data = map(str, sentences)
    path = tmp_path / "batches.csv"
    done = run("batches", "--model", model, "--data", data, "--batch=8", "--rounds=1", "--steps=2", "--out", str(path))
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [(r["trained"], r["batches"]) for r in table] == [(t, b) for t in ("all", "last block") for b in ("padded", "auto")]
    assert all(float(r["loss_difference"]) <= float(r["bound"]) for r in table)
    assert [r["padding_percent"] == "0.0" for r in table] == [False, True] * 2


def test_against(tmp_path: Path) -> None:
    """This tree against itself; of one type, since every row has two new processes."""
    path = tmp_path / "against.csv"
    cases = ("hidden 64", "GPT-2 shapes", "one pass", "one mask")
    options = ["--out", str(path), "--rounds=1", "--steps=1", "--dtypes", "bfloat16", "--cases", *cases]
    done = run("against", "--before", str(BENCHMARKS.parent), *options)
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [(r["case"], r["dtype"], r["mode"]) for r in table] == [
        (case, "bfloat16", mode)
        for case in cases
        for mode in {"one pass": ("scratch", "inplace", "update", "two terms"), "one mask": ("",)}.get(case, ("scratch", "inplace"))
    ]
    assert all(float(r["ratio"]) > 0 and float(r["median_s"]) > 0 for r in table)
    assert all(bool(r["bare_median_s"]) == (r["case"] == "hidden 64") for r in table)
    assert all(float(r["beside_min_s"]) <= float(r["beside_median_s"]) <= float(r["beside_max_s"]) for r in table[:2])


def test_launches(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "launches.csv"
    done = run("launches", "--rounds=1", "--calls=2", "--out", str(path))
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [r["way"] for r in table] == ["search", "ready"] * 3
    assert all(int(search["calls"]) > 2 * int(ready["calls"]) for search, ready in zip(table[::2], table[1::2], strict=True))


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.csv"
    done = run(
        "journal",
        "--out",
        str(path),
        "--folder",
        str(tmp_path),
        "--records=40",
        "--rounds=2",
        "--model-shape=llama-tiny",
    )
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [(row["operation"], row["fsync_every"]) for row in table] == [
        ("append", "0"),
        ("append", "100"),
        ("append", "1"),
        ("read", ""),
        ("step", ""),
        ("step, recorded", ""),
    ]
    assert {row["record_bytes"] for row in table} == {"28"}
    assert table[3]["records"] == "120"  # a warm-up and two rounds
    assert str(tmp_path) not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


@needs_extension
def test_cpu_pass_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    report, path = tmp_path / "report.json", tmp_path / "cpu_pass.csv"
    options = ["--weights=4096", "--sweeps=1", "--no-compile", f"--benchmark-json={report}", "-q", "-p", "no:cacheprovider"]
    done = run_pytest(str(BENCHMARKS / "cpu_pass.py"), *options)
    assert done.returncode == 0, done.stdout
    assert run("cpu_pass", str(report), str(path)).returncode == 0
    table = rows(path)
    assert {row["dtype"] for row in table} == {"float32", "float16", "bfloat16"}
    assert {row["contender"] for row in table} >= {
        "copy",
        "rewrite",
        "zo_kernels portable",
        "zo_kernels K=64",
        "zo_kernels bit mask",
        "zo_kernels out of place",
        "normal_add",
        "mezo",
    }
    for dtype in ("float32", "float16", "bfloat16"):
        others = [
            row
            for row in table
            if (row["dtype"], row["threads"], row["terms"]) == (dtype, "1", "1") and "zo_" not in row["contender"]
        ]
        assert {"normal_add", "normal_reused", "foreach_add", "foreach_reused", "mezo"} <= {row["contender"] for row in others}
        assert max(float(row["ratio_to_strongest"]) for row in others) == 1.0
    assert all(float(row["gterms_per_s"]) == 0 for row in table if "copy" in row["contender"])

    drawn = run("plot", "--results", str(tmp_path), "--figures", str(tmp_path))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


@needs_extension
def test_gpu_check_on_a_cpu(tmp_path: Path) -> None:
    """The script itself: named stages, each with its limit and its files, and what is cut off is said and does not stop the next."""
    command = [str(BENCHMARKS / "gpu_check.sh"), str(tmp_path / "found")]
    env = {**os.environ, "TINY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LIMIT_STEPS": "1"}
    stages_here = ["smoke", "steps", "passes", "offload"]
    done = subprocess.run([*command, *stages_here], env=env | {"LIMIT_PASSES": "0"}, capture_output=True, text=True)
    stages = list(csv.DictReader((tmp_path / "found" / "stages.csv").open()))
    assert done.returncode == 1, done.stdout + done.stderr
    ended = [("smoke", "0"), ("steps", "124"), *[("passes", "124")] * 3, *[("offload", "0")] * 2]
    assert [(row["stage"], row["status"]) for row in stages] == ended
    parts = list(csv.DictReader((tmp_path / "found" / "smoke.csv").open()))
    assert {row["result"] for row in parts} == {"same bits"}
    assert "graphed inplace step, journal, replay" in {row["part"] for row in parts}
    steps = [
        row for shape in ("opt-13b", "opt-30b") for row in csv.DictReader((tmp_path / "found" / f"offload_{shape}.csv").open())
    ]
    assert [(row["shape"], row["step"]) for row in steps] == [
        (shape, str(k)) for shape in ("opt-13b", "opt-30b") for k in (1, 2, 3)
    ]
    assert all(int(row["read_bytes"]) and float(row["upload_gb_per_s"]) > 0 < float(row["copy_gb_per_s"]) for row in steps)
    assert all(row["commit"] for row in [*stages, *parts, *steps])
    assert subprocess.run([*command, "speed"], env=env, capture_output=True, text=True).returncode == 2


def test_gpu_linear(tmp_path: Path) -> None:
    """On a CPU, in two passes; and the table that the page would get from it."""
    path = tmp_path / "gpu_linear.csv"
    done = run("gpu_linear", "--device=cpu", "--out", str(path))
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert [row["contender"] for row in table] == 2 * ["perturbed_linear", "two_passes", "two_forwards"]
    assert [int(row["bytes"]) // (96 * 64 * 4) for row in table] == 2 * [1, 6, 2]
    assert all(row["ratio_to_two_forwards"] == "1.0" for row in table if row["contender"] == "two_forwards")
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    assert run("tables", "--results", str(tmp_path), "--page", str(page)).returncode == 0
    assert "| tiny | fc1 | float32 | 16 |" in page.read_text()


@needs_extension
def test_replay(tmp_path: Path) -> None:
    path = tmp_path / "replay.csv"
    done = run("replay", "--device=cpu", "--out", str(path), "--quick")
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert {row["contender"] for row in table} == {"sequence", "separate", "fused"}
    assert {row["dtype"] for row in table} == {"float32", "float16", "bfloat16"}
    assert {row["passes"] for row in table} == {"1", "8", "64"}
    assert all(row["ratio_to_separate"] == "1.0" for row in table if row["contender"] == "separate")


def test_offload(tmp_path: Path) -> None:
    """In the last step from a file each block comes once, and the file is gone when it was measured."""
    path = tmp_path / "offload.csv"
    done = run("offload", "--quick", "--work", str(tmp_path / "work"), "--out", str(path))
    assert done.returncode == 0, done.stderr
    table = rows(path)
    last = next(row for row in table if row["step"] == "3")
    assert last["visits"] == "2" and int(last["read_bytes"]) < int(last["weight_bytes"]) and int(last["peak_bytes"]) > 0
    assert {(row["source"], row["together"]) for row in table if not row["step"]} == {
        ("resident", "False"), ("cpu", "False"), ("cpu", "True"), ("file", "True"),
    }  # fmt: skip
    assert list((tmp_path / "work").iterdir()) == []


def test_ranks_and_cluster(tmp_path: Path) -> None:
    """Contenders of real processes end in one and the same bits; and what is computed from such rows says of each number what it is."""
    done = run("ranks", "--quick", "--out", str(tmp_path / "ranks.csv"))
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "ranks.csv")
    steps = [row for row in found if row["question"] == "step"]
    assert len(steps) == 5 and {row["same_bits"] for row in found if row["question"] in ("step", "replay")} == {"1"}
    exchanges = {(row["question"], row["contender"]) for row in found} - {(row["question"], row["contender"]) for row in steps}
    assert {("round", kind) for kind in ("losses", "a ring", "a tree")} < exchanges
    assert [row["sent_bytes"] for row in found if (row["question"], row["contender"]) == ("round", "losses")] == ["128", "256"]
    assert [row["sent_bytes"] for row in steps] == ["", "0", "128", "128", "256"]
    for name in ("gpu_step", "gpu_pass"):
        shutil.copy(BENCHMARKS / "results" / f"{name}.csv", tmp_path)
    page, names = tmp_path / "page.md", ("device", "offload", "llama_2_7b", "cuts", "far", "wire", "inputs", "restarts")
    page.write_text("".join(f"<!-- table plan_{name} -->\n<!-- end -->\n" for name in names))
    done = run("cluster", "--quick", "--results", str(tmp_path), "--out", str(tmp_path / "cluster.csv"), "--page", str(page))
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "cluster.csv")
    assert {row["kind"] for row in found} == {"measured", "counted", "published", "assumed", "computed", "simulated"}
    assert all(row["source"] for row in found if row["kind"] in ("measured", "published"))
    assert "| 10000 |" not in page.read_text() and "| 4 |" in page.read_text()


class TestCluster:
    """The model of cluster.py, against what can be written down."""

    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))

    def test_the_page_has_the_committed_numbers(self) -> None:
        import cluster

        page = (ROOT / "docs" / "scaling.md").read_text()
        for name, table in cluster.tables(rows(BENCHMARKS / "results" / "cluster.csv")).items():
            assert f"<!-- table {name} -->\n\n{table}\n" in page, "python benchmarks/cluster.py --page docs/scaling.md"

    def test_without_delays_the_largest_share_is_the_step(self) -> None:
        import cluster_model as model

        draw = np.random.default_rng(0)
        for parallel, workers, most in (("directions", 3, 8), ("data", 3, 12), ("both", 3, 8), ("auto", 5, 5), ("both", 100, 1)):
            shares = cut(parallel, 6, 4, workers)
            each = [0.5 * len(share) for share in shares]
            assert model.slowest(each, model.Delays(), 7, draw).tolist() == [0.5 * most] * 7

    def test_the_latest_of_n_exponentials(self) -> None:
        """Its mean is the sum of 1/k, its variance that of 1/k^2; those whose share is smaller are none of the latest."""
        import cluster_model as model

        for workers in (1, 7, 1000):
            found = model.slowest([1.0] * workers + [0.5], model.Delays(jitter=0.01), 20_000, np.random.default_rng(workers)) - 1
            k = np.arange(1, workers + 1)
            assert abs(found.mean() - 0.01 * np.sum(1 / k)) < 4 * 0.01 * np.sqrt(np.sum(1 / k**2) / 20_000)

    def test_pauses(self) -> None:
        import cluster_model as model

        found = model.slowest([1.0] * 50, model.Delays(pauses=0.01, pause=3.0), 20_000, np.random.default_rng(0))
        late = 1 - 0.99**50
        assert set(found.tolist()) == {1.0, 4.0}
        assert abs((found - 1).mean() / 3 - late) < 4 * np.sqrt(late * (1 - late) / 20_000)

    def test_what_a_visit_serves(self) -> None:
        import cluster_model as model

        for parallel, workers, visited, served in (
            ("directions", 3, False, (2, 2, 2, 2)),
            ("data", 4, False, (6,)),
            ("both", 3, False, (2, 2, 2, 2)),
            ("both", 3, True, (6, 2)),
            ("auto", 4, True, (6,)),
        ):
            shares = cut(parallel, 6, 4, workers, visited)
            assert model.forwards(shares[0], 4) == served and sum(served) == len(shares[0])

    def test_exchanges(self) -> None:
        import cluster_model as model

        for kind in model.EXCHANGES:
            assert model.exchange(kind, 1, 10.0, 0.5, 7.0) == 0
        assert model.exchange("losses", 5, 10.0, 0.5, 7.0) == 2 * 10 + 4 * 0.5 + 7
        assert model.exchange("a ring", 5, 10.0, 0.5, 7.0) == 8 * 10 + 4 * 0.5 + 7
        assert model.exchange("a tree", 5, 10.0, 0.5, 7.0) == 4 * 10 + 3 * 0.5 + 7
        assert [model.links(kind, 2) for kind in model.EXCHANGES] == [2, 2, 2]

    def test_the_links_of_a_round_are_those_that_were_measured(self) -> None:
        import cluster_model as model

        far = [row for row in rows(BENCHMARKS / "results" / "ranks.csv") if row["question"] == "far round"]
        assert {row["contender"] for row in far} == set(model.EXCHANGES)
        for row in far:
            crossed = float(row["min_s"]) / float(row["link_s"])
            least = model.links(row["contender"], int(row["ranks"]))
            assert least <= crossed < 1.25 * least + 0.5, row  # what hands the packets on shares the cores

    def test_visits(self) -> None:
        """The first upload, then whatever takes longer for each further block, then the last use."""
        import cluster_model as model

        for up, use in ((1.0, 3.0), (3.0, 1.0), (2.0, 2.0)):
            assert model.visits([up] * 6, [use] * 6) == up + 5 * max(up, use) + use
        # A block that is long in use keeps its slot: the second next one waits for it.
        assert model.visits([1.0, 1.0, 1.0], [10.0, 0.0, 0.0]) == 12.0

    def test_a_run_with_losses(self) -> None:
        """Each step takes (e^(loss x step) - 1) e^(loss x restart) / loss on average, where what is replayed takes no time."""
        import cluster_model as model

        losses, step, restart, steps = 0.05, 2.0, 5.0, 400
        found = [model.run(steps, step, losses, restart, 0.0, np.random.default_rng(k))[0] for k in range(200)]
        want = steps * math.exp(losses * restart) * math.expm1(losses * step) / losses
        assert abs(np.mean(found) - want) < 4 * np.std(found) / math.sqrt(len(found))
        assert model.run(steps, step, 0.0, restart, 0.0, np.random.default_rng(0)) == (steps * step, 0)
        # With a replay of all that was done, a run whose steps are lost about as fast as they are replayed does not end.
        assert model.run(steps, step, 0.5, restart, 2.0, np.random.default_rng(0), most=1e4)[0] == math.inf
        assert model.run(steps, step, 0.05, 0.0, 0.1, np.random.default_rng(0), kept=10)[0] < 2 * steps * step

    def test_the_frame_is_the_librarys(self) -> None:
        """As tests/test_distributed.py counts the bytes of a step."""
        import cluster_model as model

        assert [model.frame(n) for n in (1, 12, 16)] == [128, 128, 160]
        assert [model.rounds(n, journal) for n in (12, 13) for journal in (False, True)] == [1, 2, 2, 3]


@needs_extension
def test_rule_pass(tmp_path: Path) -> None:
    path = tmp_path / "rule_pass.csv"
    done = run("rule_pass", "--device=cpu", "--out", str(path), "--quick")
    assert done.returncode == 0, done.stderr
    table = rows(path)
    assert {row["contender"] for row in table} == {"rule pass", "perturb", "torch", "rewrite"}
    assert {row["dtype"] for row in table} == {"float32", "float16", "bfloat16"}
    assert {row["bytes_per_weight"] for row in table if row["rule"] == "adam" and row["contender"] == "rule pass"} == {"24", "20"}
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    assert run("tables", "--results", str(tmp_path), "--page", str(page)).returncode == 0
    assert "| cpu | bfloat16 | hizoo |" in page.read_text()


def test_sass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written of counted rows, and the page's table of it; counting itself is tested in tests/kernels."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sass

    counted = [("cuda", "gaussian", 1, 13.5, 5.12), ("cuda", "adam_history", "K", 39.0, 14.0), ("triton", "plain", "1", 15.06, "")]
    counted += [
        ("triton", "low-rank", "1", 9.0, 2.25),
        ("triton", "adam_history", "K", 33.9, 14.9),
        ("triton", "scale", "1", 22.25, ""),
    ]

    def some(backend: str) -> Callable[..., Any]:
        def of(archs: tuple[int, ...] = (90,), dtypes: tuple[str, ...] = ()) -> Any:
            for mine, kernel, terms, one, further in counted:
                if mine == backend:
                    found = {"backend": mine, "kernel": kernel, "arch": "sm_90", "dtype": dtypes[0], "terms": terms}
                    found |= {"instructions_per_element": one, "instructions_per_element_term": further}
                    yield found | {"registers": 64, "spill_bytes": 0, "access_bits": 128}

        return of

    path = tmp_path / "sass.csv"
    arguments = ["--dtypes", "float16", "--out", str(path)]
    monkeypatch.setattr(sass, "unavailable", lambda: "no nvcc")
    assert sass.main(arguments) == 0
    assert not path.exists()
    monkeypatch.setattr(sass, "left_out", lambda: [])
    for name, backend in (("rows_cuda", "cuda"), ("rows_triton", "triton"), ("rows_rules", ""), ("rows_linear", "")):
        monkeypatch.setattr(sass, name, some(backend))
    assert sass.main(arguments) == 0
    assert [(r["backend"], r["kernel"]) for r in rows(path)] == [c[:2] for c in counted]
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text())
    assert run("tables", "--results", str(tmp_path), "--page", str(page)).returncode == 0
    table = page.read_text()
    assert "| plain pass |  | 13.5 (5.1) |  | 15.1 |" in table
    assert "| recomputed Adam |  | 53.0 (14.0) |  | 48.8 (14.9) |" in table  # a history's first term is made in the loop
    assert "| low rank, of rank 1 |  |  |  | 11.2 (2.2) |" in table


def test_either_name_by_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two names each is right in half of the cases, whichever stands first; an answer that is always the same is right as often as its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import objectives
    from zo_finetune.tasks import TASKS

    monkeypatch.setitem(TASKS, "first-name", objectives.FirstName())
    people = [("Ann", "Bob"), ("Bob", "Ann"), ("Ann", "Cid"), ("Dan", "Eve"), ("Eve", "Fay")]
    sentences = [f"{first} met {second} because _ was late." for first, second in people] + ["She met Ann because _ was late."]
    options = [*((second, first) for first, second in people), ("She", "Mary")]  # the last one's second name is not there
    given = tmp_path / "winogrande.jsonl"
    lines = [{"sentence": s, "option1": one, "option2": two} for s, (one, two) in zip(sentences, options, strict=True)]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(objectives.names(given))
    assert [(row["first"], row["other"]) for row in found] == people
    made = tmp_path / "names.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in found))
    config = objectives.Config(model="m", task="first-name", data=str(made), output="", eval_examples=4, dev_examples=0)
    constant, chance = objectives.without_learning(config)
    assert constant in (0.25, 0.5) and chance == 0.5


def test_the_readmes_figure_is_of_committed_results(tmp_path: Path) -> None:
    for name in ("ranking", "memory", "step"):
        shutil.copy(BENCHMARKS / "results" / f"{name}.csv", tmp_path)
    drawn = run("plot", "--results", str(tmp_path), "--figures", str(tmp_path))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shapes that fit here; and docs/memory.md has the table of the others as it is counted."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sizes

    few = 1024  # bytes: the batch, counters of an optimizer, handles of factors
    for shape in ("opt-125m", "gpt2"):
        size = sizes.Size.of(shape)
        for method, state in sizes.STATES.items():
            measured = next(r for r in rows(BENCHMARKS / "results" / "memory.csv") if (r["shape"], r["method"]) == (shape, method))
            there = [float(measured[f"{name}_bytes"]) for name in ("model", "state", "gradient")]
            assert all(abs(a - b) < few for a, b in zip(there, [4 * size.weights, *state(size, 4)], strict=True)), (shape, method)
    assert sizes.PAGE.read_text() == sizes.page(sizes.PAGE.read_text()), "python benchmarks/sizes.py"


def test_sizes_of_packed_bases_and_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peft
    import sizes
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from zo_finetune import adapters, quantize

    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    plain = LlamaForCausalLM(config).to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    size = sizes.Size.of_model(plain)
    assert sizes.BASES["bf16"](size) == sum(p.nbytes for p in plain.parameters())
    for how in ("nf4", "int8"):
        packing = quantize.arguments(how, torch.device("cpu"), torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **packing)
        found = 0
        for p in model.parameters():
            state = getattr(p, "quant_state", None)
            parts = [getattr(p, n) for n in ("qdata", "scale", "zero_point") if hasattr(p, n)] or [p]
            found += sum(t.nbytes for t in parts) + (state.absmax.nbytes if state is not None else 0)
        assert found == sizes.BASES[how](size), how
    adapted = peft.get_peft_model(plain, adapters.lora_config(adapters.Adapter("lora"), "causal"))
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == size.lora


def test_figures_need_results(tmp_path: Path) -> None:
    done = run("plot", "--results", str(tmp_path), "--figures", str(tmp_path))
    assert done.returncode == 1
    assert "benchmarks/run.py" in done.stderr


def test_quick_never_overwrites_the_committed_results() -> None:
    before = {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}
    done = run("run", "--quick", "--out", "benchmarks/results")
    assert done.returncode != 0
    assert "another --out" in done.stderr
    assert before == {path: path.read_bytes() for path in (BENCHMARKS / "results").glob("*")}


def test_committed_results_have_the_documented_columns() -> None:
    results = sorted((BENCHMARKS / "results").glob("*.csv"))
    assert results
    for path in results:
        rows(path)


class TestClaims:
    """Every figure of README and docs has a row, a test or a line of code, and is what that says."""

    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))

    def test_all_of_them(self) -> None:
        import claims

        assert claims.check(write=False) == []

    @pytest.fixture
    def page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A project with one page, one file of results and one claim."""
        import claims
        import harness

        (tmp_path / "page.md").write_text(
            "It takes\n2.9 ms, or `4.5 s` of code, as arXiv 2305.17333 has it.\n\n    5.5 ms of an example\n"
        )
        (tmp_path / "x.csv").write_text("commit,mode,ms\nabc,ours,2.91\nabc,theirs,7.0\n")
        (tmp_path / "code.py").write_text("LIMIT = 3\n\ndef test_it():\n    pass\n")
        monkeypatch.setattr(claims, "ROOT", tmp_path)
        monkeypatch.setattr(claims, "PAGES", ("page.md",))
        monkeypatch.setattr(harness, "RESULTS", tmp_path)
        monkeypatch.setattr(claims, "CLAIMS", [])
        claims.claim("page.md", "It takes {:.1f} ms", "x.csv: ours", lambda: [claims.number("x", "ms", mode="ours")])
        return tmp_path / "page.md"

    def test_a_true_figure(self, page: Path) -> None:
        import claims

        assert claims.check(write=False) == []

    def test_a_figure_without_a_source(self, page: Path) -> None:
        import claims

        for more in ("It is 30 times faster.", "Accuracy 0.542.", "It lost 11 % of it.", "It took 64 ms.", "At 3.5·10⁹ weights/s."):
            page.write_text("It takes\n2.9 ms.\n" + more)
            (wrong,) = claims.check(write=False)
            assert "page.md:3" in wrong and "has no source" in wrong

    def test_a_figure_that_its_row_does_not_have(self, page: Path) -> None:
        import claims

        page.write_text("It takes 2.8 ms.")
        (wrong,) = claims.check(write=False)
        assert "its rows say 2.9" in wrong
        assert claims.check(write=True) == []
        assert page.read_text() == "It takes 2.9 ms."

    def test_a_sentence_that_is_gone(self, page: Path) -> None:
        import claims

        page.write_text("Nothing is said.")
        (wrong,) = claims.check(write=False)
        assert "no longer says" in wrong

    def test_sources_that_are_not_there(self, page: Path) -> None:
        import claims

        for source, fault in (
            ("y.csv: a row", "there is no y.csv"),
            ("code.py::test_other", "has no test"),
            ("code.py: LIMIT = 4", "does not hold"),
            ("paper: ", "names nothing"),
        ):
            claims.CLAIMS[:] = [claims.Claim("page.md", "It takes 2.9 ms", source)]
            assert any(fault in line for line in claims.check(write=False)), source
        for source in ("code.py::test_it", "code.py: LIMIT = 3", "paper: arXiv 2305.17333"):
            claims.CLAIMS[:] = [claims.Claim("page.md", "It takes 2.9 ms", source)]
            assert claims.check(write=False) == []


class TestHarness:
    """The pieces that a wrong figure could come from."""

    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(BENCHMARKS))

    def test_interleaved(self) -> None:
        import harness

        calls: list[str] = []
        timings = harness.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=2, warmup=1, calls={"a": 2, "b": 1})
        assert "".join(calls) == "ab" + "aab" + "baa"
        assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 2, "b": 2}
        calls.clear()
        around = {"a": (lambda: calls.append("<"), lambda: calls.append(">"))}
        harness.interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=1, warmup=0, around=around)
        assert "".join(calls) == "<a>b"

    def test_csv_refuses_other_columns(self, tmp_path: Path) -> None:
        import harness

        path = tmp_path / "x.csv"
        with pytest.raises(ValueError, match=r"x.csv: a row differs from the columns in \['b'\]"):
            harness.write_csv(path, ["a"], [{"a": 1, "b": 2}])
        assert not path.exists()
        harness.write_csv(path, ["a"], [{"a": 1}])
        with pytest.raises(ValueError, match="write to another file"):
            harness.write_csv(path, ["b"], [{"b": 1}], append=True)
        assert [row["a"] for row in harness.read_csv(path)] == ["1"]

    def test_every_row_names_its_commit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And is in the file as soon as it is measured."""
        import harness

        table = harness.Table(tmp_path / "x.csv", ["a"])
        table.add({"a": 1})
        assert [bool(row["commit"]) for row in harness.read_csv(tmp_path / "x.csv")] == [True]
        monkeypatch.setattr(harness, "commit", lambda: "")
        with pytest.raises(ValueError, match=r"y.csv: a row names its commit.*set COMMIT"):
            harness.write_csv(tmp_path / "y.csv", ["a"], [{"a": 1}])
        assert not (tmp_path / "y.csv").exists()

    def test_traffic(self) -> None:
        import harness

        def count(function: Callable[[], object], **options: Any) -> tuple[int, int]:
            with harness.Traffic(**options) as traffic:
                function()
            return traffic.read, traffic.written

        a, b, table = torch.zeros(10), torch.zeros(10), torch.zeros(100, 5)
        numbers = torch.tensor([1, 2, 3])
        assert count(lambda: a.add_(b)) == (80, 40)
        assert count(lambda: a.copy_(b)) == (40, 40)
        assert count(lambda: torch.normal(0.0, 1.0, size=(10,))) == (0, 40)
        assert count(lambda: torch.zeros(10)) == (0, 40)
        assert count(lambda: a + 2 * b) == (120, 80)
        assert count(lambda: a.view(2, 5).t()) == (0, 0)
        assert count(lambda: table[numbers[0]].sum()) == (20, 0)  # numbers do not count, nor do results without dimensions
        assert count(lambda: torch.index_select(table, 0, numbers)) == (60, 60)
        assert count(lambda: torch.index_select(table, 0, numbers, out=torch.empty(3, 5))) == (60, 60)
        assert count(lambda: torch._foreach_add_([a], [b])) == (80, 40)
        mine = {a.untyped_storage().data_ptr()}
        assert count(lambda: a + b, storages=mine) == (40, 0)
        assert count(lambda: a + b, counting=lambda: False) == (0, 0)

    def test_calls_lasting(self) -> None:
        import harness

        assert harness.calls_lasting(lambda: time.sleep(0.02), 0.001, "cpu") == 1
        assert harness.calls_lasting(lambda: None, 10.0, "cpu", most=7) == 7

    def test_out_of_memory(self) -> None:
        import harness

        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 50)
        assert harness.out_of_memory(caught.value)
        assert not harness.out_of_memory(RuntimeError("a bug"))
        assert 0 < harness.free_bytes("cpu") < 1 << 50

    def test_peak_sees_a_large_tensor(self) -> None:
        import harness

        harness.reset_peak("cpu")
        before = harness.peak_bytes("cpu")
        if before is None:
            pytest.skip("this system does not tell the peak")
        torch.ones(1 << 26)
        assert harness.peak_bytes("cpu") - before > 0.9 * 4 * (1 << 26)  # type: ignore[operator]
