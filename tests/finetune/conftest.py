"""Tiny models, a tokenizer and data, made once for all tests of the application.

Belongs here: what several test files share. Does not belong here: assertions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import console, figures

from tests.finetune.children import Children

SHARED = Path(__file__).resolve().parents[3] / "shared"  # beside the repository, on development machines
SUBJECTS = ("film", "story", "cast", "script", "ending", "music")
WORDS = {1: ("fine", "warm", "clever", "moving"), 0: ("dull", "cold", "clumsy", "empty")}


def make_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Distinct sentences of 4 to 12 words whose adjectives give the label away."""
    draw = random.Random(seed)
    rows = []
    for k in range(n):
        label = k % 2
        clauses = [f"the {draw.choice(SUBJECTS)} is {draw.choice(WORDS[label])}" for _ in range(draw.randint(1, 3))]
        rows.append({"sentence": f"{k} {' '.join(clauses)}", "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reaches for a hub, and none leaves Arrow files in the user's cache."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says does not depend on how busy the machine is."""
    monkeypatch.setattr(console, "PATIENCE", 3600.0)


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's curve is half the time of a small run: it is drawn where a test asks for `drawn`, and has its first bytes elsewhere."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw_curve", lambda path, *_: path.write_bytes(b"\x89PNG"))


@pytest.fixture
def drawn() -> None:
    """Curves of runs are drawn."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE in which " great" and " terrible" are one token each; a start and an end token as RoBERTa's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = [row["sentence"] for row in make_rows(200, 0)] + [" It was great", " It was terrible"] * 100
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>")


@pytest.fixture(scope="session")
def causal_tokenizer(tokenizer: Any) -> Any:
    """The same without an end token, and without a padding token, as GPT-2's and Llama's."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


FAMILIES = ("llama", "gpt2", "opt", "roberta")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, causal_tokenizer: Any) -> Callable[[str], Path]:
    """Name of a family -> a folder with a random model of it, 16 or 32 wide, in transformers' format."""
    import transformers as tf

    vocabulary = len(tokenizer)
    common = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    builders: dict[str, Callable[[], Any]] = {
        "llama": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(
                **common, intermediate_size=64, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True
            )
        ),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
        "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**common, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)),
        "roberta": lambda: tf.RobertaForMaskedLM(
            tf.RobertaConfig(
                **common, intermediate_size=64, max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2
            )
        ),
    }
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            torch.manual_seed(list(builders).index(family))  # whatever was made before
            path = tmp_path_factory.mktemp(family)
            model = builders[family]()
            with torch.no_grad():  # wider than the usual 0.02, so that predictions depend on what is read
                for name, p in model.named_parameters():
                    if p.ndim == 2:
                        p.normal_(0, 0.3 if "embed" in name or "wte" in name else 0.2)
            model.save_pretrained(path)
            (tokenizer if family == "roberta" else causal_tokenizer).save_pretrained(path)
            made[family] = path
        return made[family]

    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with 60 rows and validation.jsonl with 30."""
    folder = tmp_path_factory.mktemp("data")
    rows = make_rows(90, 1)
    write_jsonl(folder / "train.jsonl", rows[:60])
    write_jsonl(folder / "validation.jsonl", rows[60:])
    return folder


@pytest.fixture(scope="session")
def train_command(model_folder: Callable[[str], Path], data_folder: Path) -> Callable[..., list[str]]:
    """The command line of a small run, or of several: `zo-finetune train` with these options, then `more` words. An option that is None is left
    out."""

    def build(output: Path | str, *more: str, command: str = "train", model: str = "llama", **options: Any) -> list[str]:
        source = model if "/" in model else str(model_folder(model))
        fixed = {"model": source, "task": "sst2", "data": data_folder, "output": output, "device": "cpu"}
        sizes = {"steps": 3, "batch_size": 4, "dev_examples": 8, "eval_examples": 12}
        given = {name: value for name, value in {**fixed, **sizes, **options}.items() if value is not None}
        return [command, *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))), *more]

    return build


@pytest.fixture(scope="session")
def children() -> Iterator[Children]:
    """Commands in processes of their own, which are killed for good."""
    with Children() as them:
        yield them
