"""README and the pages of docs: what they show runs, and what they point at is there.

Belongs here: every page as text, its blocks of Python and its commands. Does not belong here: figures (benchmarks/claims.py), and pages that are written by
a program (tests/finetune: options.md, tasks.md).

A block of Python stands alone: what it names and does not define is one of `stand_ins`, a tiny model in the place of a real one.
"""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import json
import re
import shlex
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import methods, options
from zo_finetune.cli import build_parser
from zo_finetune.config import COMMANDS

import zo_kernels as zk

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORTER = {
    "max_steps=2000": "max_steps=2",
    "max_steps=500": "max_steps=1",
    "eval_steps=500": "eval_steps=1",
    "20_000": "4",
    "5_000": "2",
}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, found in enumerate(FENCE.finditer(page.read_text())):
            if found[1] == language:
                yield pytest.param(found[2], id=f"{page.stem}-{number}")


def shown(page: Path) -> Iterator[str]:
    """The lines that are no prose: of fences without a language, or indented by four."""
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if not language:
            yield from block.splitlines()
    yield from (line.strip() for line in FENCE.sub("", text).splitlines() if line.startswith("    "))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What blocks name and do not define. Models from a hub are the tiny one too, a GPU is the CPU, and workers are this one."""
    import datasets
    import transformers as tf

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in place.items():  # as torchrun sets them
        monkeypatch.setenv(name, value)
    import tiny

    model, tokenizer = tiny.causal()

    def pretrained(*_: Any, dtype: torch.dtype = torch.float32, **__: Any) -> Any:
        return tiny.causal()[0].to(dtype)

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", pretrained)
    for auto in (tf.AutoTokenizer, tf.AutoProcessor):
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model.generation_config.max_new_tokens = 2
    rows = tokenizer(tiny.TEXTS[:4], padding=True, return_token_type_ids=False)
    texts = [{**{name: values[k] for name, values in rows.items()}, "labels": rows["input_ids"][k]} for k in range(4)]
    batch = tokenizer.pad(texts, return_tensors="pt")
    labels = torch.tensor([0, 1, 0, 1])
    Path("texts.txt").write_text("\n".join(tiny.TEXTS * 4))

    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    tf.OPTForCausalLM(tf.OPTConfig(**sizes, vocab_size=len(tokenizer))).to(torch.bfloat16).save_pretrained("folder")

    def closure(batch: Any = batch) -> torch.Tensor:
        return model(**batch).loss

    yield {
        "torch": torch, "zk": zk, "model": model, "tokenizer": tokenizer, "base_model": copy.deepcopy(model), "base_again": copy.deepcopy(model),
        "batch": batch, "batches": [batch, batch], "batch_of": lambda k: [batch], "loader": [batch, batch], "labels": labels, "closure": closure,
        "step": zk.MeZOStep(model, lr=1e-4), "score": lambda model, batch: model(**batch).logits[:, -1, :2], "train_set": texts, "eval_set": texts,
        "input_ids": [batch["input_ids"]] * 2, "inputs": {name: batch[name] for name in ("input_ids", "attention_mask")},
        "reward": lambda ids: (ids == 2).float().mean(-1), "my_function": lambda completions, **_: [float(len(text)) for text in completions],
        "folder": "folder", "loss_of": lambda output: output.loss.float(), "prompts": datasets.Dataset.from_dict({"prompt": tiny.TEXTS * 4}),
    }  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(code: str, names: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        exec(compile(code, "the page", "exec"), names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [*blocks("python")])
def test_a_block_runs(block: str, stand_ins: dict[str, Any]) -> None:
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    run(block, stand_ins)


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 110


def test_what_is_made_shorter_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert [long for long in SHORTER if long not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_that_are_shown_are_read(page: Path) -> None:
    """Their options are there, with what they need; what stands in brackets is left out."""
    for line in shown(page):
        if not line.startswith("zo-finetune "):
            continue
        read = build_parser().parse_args(shlex.split(re.sub(r"\[.*?\]", "", line), comments=True)[1:])
        assert set(options.given(kind := COMMANDS[read.command], read)) <= {f.name for f in fields(kind)}


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name: its headings', as GitHub spells them."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_scripts_that_are_shown_are_there(page: Path) -> None:
    targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    for line in shown(page):
        words = line.split()
        if words[:1] == ["make"]:
            assert next(w for w in words[1:] if not re.match(r"-|\w+=", w)) in targets, line
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), line


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its losses fall, and its replay has the run's bits."""
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    cells = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text())["cells"]
    run("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), {})
    said = capsys.readouterr().out
    falls = re.findall(r"loss ([\d.]+) -> ([\d.]+)", said)
    assert len(falls) == 2 and all(float(after) < float(before) - 0.2 for before, after in falls), said
    assert "replayed on every bit: True" in said


# ---- what pages name --------------------------------------------------------------------------------------------------


def codes(text: str) -> list[str]:
    """What stands in code within a line."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def templates(path: Path) -> Iterator[str]:
    """The texts in a file of code; a formatted one has \\0 for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_quoted_messages_are_in_the_source() -> None:
    sources = [*(ROOT / "zo_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    said = [text for path in sources for text in templates(path)]
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        parts = [part for part in row.split("…") if part]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert len("".join(parts)) > 20 and any(pattern.search(text) for text in said), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_library_are_there(page: Path) -> None:
    for name in re.findall(r"\bzk\.(\w+)", page.read_text()):
        assert hasattr(zk, name), name


def test_names_of_other_codes_lead_to_ours() -> None:
    """In each row's last column: options of the command line, and methods."""
    ours = {o.spelling for kind in COMMANDS.values() for o in options.options_of(kind)}
    rows = [line.split(" | ") for line in (ROOT / "docs" / "coming-from.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        for words in codes(row[-1]):
            for option in re.findall(r"--[a-z][\w-]*", words):
                assert option in ours or option.replace("--no-", "--") in ours, option
        for method in re.findall(r"--method ([\w-]+)", row[-1]):
            assert method in methods.METHODS, method


@pytest.mark.parametrize(
    "path", [p for p in sorted((ROOT / "zo_kernels").rglob("*.py")) if ">>> " in p.read_text()], ids=lambda p: p.name
)
def test_examples_of_docstrings(path: Path) -> None:
    module = importlib.import_module(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---- the site -----------------------------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name() -> None:
    shown = {
        name.rsplit(".", 1)[1] for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    }
    assert set(zk.__all__) <= shown


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_of_a_page_stay_in_docs(page: Path) -> None:
    """A site has nothing else: what lies outside is named as a path, in code."""
    assert re.findall(r"\]\((?:\.\./|/)[^)]*\)", page.read_text()) == []


def test_every_page_has_its_place() -> None:
    """In mkdocs.yml, once: a page that is in no menu is found by nobody."""
    named = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1], re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
