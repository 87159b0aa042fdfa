"""Batches as one sequence: its numbers are those of padded rows, of every family and objective; which batches and models have one; runs.

Belongs here: packed.py, packing.py and their part in scores, steps and runs. Does not belong here: scores of padded batches (test_scoring.py), kept states by
themselves (test_frozen.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zo_finetune import cached, packed, packing
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.errors import UserError
from zo_finetune.frozen import Lower
from zo_finetune.load import Loaded, load
from zo_finetune.objectives.classification import Classification
from zo_finetune.packed import CannotPack, Packer
from zo_finetune.scoring import Encoded, Encoder, Scorer
from zo_finetune.train import make_optimizer

from tests.finetune.calls import Calls
from tests.finetune.conftest import SHARED
from tests.finetune.test_resume import assert_same
from tests.finetune.test_scoring import examples, several_tokens
from tests.kernels.cases import same_bits
from zo_kernels import journal

FAMILIES = ("llama", "gpt2", "opt", "roberta", "bert", "qwen2")
Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def family_folder(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """More families than the others' tests have. `qwen2`: two queries to a key, and a window of six tokens in the second block."""
    import transformers as tf

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in ("bert", "qwen2"):
            return model_folder(family)
        if family not in made:
            source = model_folder("roberta" if family == "bert" else "llama")
            vocabulary = tf.AutoConfig.from_pretrained(source).vocab_size
            common: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
            common |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 512}
            torch.manual_seed(7)
            window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
            model = (
                tf.BertForMaskedLM(tf.BertConfig(**common))
                if family == "bert"
                else tf.Qwen2ForCausalLM(tf.Qwen2Config(**common, num_key_value_heads=2, **window))
            )
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.ndim == 2:
                        p.normal_(0, 0.3 if "embed" in name else 0.2)
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            tf.AutoTokenizer.from_pretrained(source).save_pretrained(path)
            made[family] = path
        return made[family]

    return folder


@pytest.fixture(scope="session")
def of_run(family_folder: Folder, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Loaded]:
    """A run of tiny rows with different lengths."""

    def build(family: str = "llama", **options: Any) -> Loaded:
        given: dict[str, Any] = {"model": str(family_folder(family)), "task": "sst2", "data": str(data_folder), "device": "cpu"}
        sizes = {"train_examples": 20, "dev_examples": 4, "eval_examples": 4, "batch_size": 8, "steps": 40, "cache": "off"}
        output = str(tmp_path_factory.mktemp("packed") / "run")
        return load(Config(**{**given, **sizes, "output": output, "batches": "packed", **options}))

    return build


def both(scorer: Scorer, batch: Any, rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each answer token of a padded batch, and of the same packed."""
    line = scorer.packed(batch, rows)
    assert line.input_ids.shape == (1, sum(len(tokens) for e in rows for tokens in e.inputs)) and line.attention_mask is None
    return scorer.token_log_probs(batch), scorer.token_log_probs(line)


# ---- the same numbers ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_padded_rows(family: str, dtype: str, family_folder: Folder) -> None:
    """Within what sums in another order explain, of candidates with rows of their own too; the model is as it was behind it."""
    lm = models.load(str(family_folder(family)), device="cpu", dtype=dtype)
    encoder = Encoder(lm.tokenizer, lm.form, lm.max_length)
    rows = [encoder.encode(e) for e in [*examples(lm.form), *several_tokens(lm.form)]]
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer:
        batch = scorer.collate(rows)
        assert scorer.packed(batch, rows) is batch
        scorer.packer = Packer(lm.model, 2, 1, always=True)
        plain, line = both(scorer, batch, rows)
        most = cached.bound(lm.model, plain)
        assert (plain - line).abs().max() <= most < (1e-3 if dtype == "float32" else 1.0)
        assert lm.model.config._attn_implementation == "sdpa"
        assert same_bits(scorer.token_log_probs(batch), plain)
        one = rows[:1]
        assert torch.allclose(*both(scorer, scorer.collate(one), one), rtol=0, atol=most)  # a sequence of one row


@torch.no_grad()
def test_of_a_trained_model() -> None:
    """stories15m in fp32: within the bound, which is 5e-4 there, where the rounding errors themselves are 1e-5."""
    if not (SHARED / "models" / "stories15m").exists():
        pytest.skip("no stories15m beside the repository")
    lm = models.load(str(SHARED / "models" / "stories15m"), device="cpu", dtype="float32")
    encoder = Encoder(lm.tokenizer, lm.form, lm.max_length)
    rows = [encoder.encode(e) for e in [*examples(lm.form, 8), *several_tokens(lm.form)]]
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer:
        scorer.packer = Packer(lm.model, 6, 1, always=True)
        plain, line = both(scorer, scorer.collate(rows), rows)
        assert (plain - line).abs().max() <= 5e-5 < cached.bound(lm.model, plain) < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["classification", "language-model", "pairs", "accuracy"])
def test_losses_are_those_of_padded_rows(name: str, of_run: Callable[..., Loaded]) -> None:
    """Those that couple rows too: the loss is formed once, of the scores of all, so no row needs a weight."""
    one = of_run(objective=name, balanced=name == "pairs")
    with one.scorer() as scorer:
        assert packing.pack(one, scorer) == "packed"
        batch = one.objective.batch(scorer, one.train_set)
        line = scorer.packed(batch, one.train_set)
        loss, other = one.objective.loss(scorer, batch), one.objective.loss(scorer, line)
        most = 4 * cached.bound(one.language_model.model, scorer.token_log_probs(batch))  # it moves by at most four scores
        assert line is not batch and abs(loss - other) <= (0 if name == "accuracy" else most)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mezo", {"perturbation": "scratch"}),
        ("mezo", {"perturbation": "inplace"}),
        ("mezo", {"peft": "lora"}),
        ("forward-grad", {}),
        ("adam", {}),
    ],
)
def test_a_step_is_that_of_padded_rows(method: str, options: dict[str, Any], of_run: Callable[..., Loaded]) -> None:
    found, most = [], 0.0
    for batches in ("padded", "packed"):
        one = of_run(method=method, lr=1e-3, batches=batches, **options)
        optimizer = make_optimizer(one.language_model, one.config)
        with one.scorer() as scorer:
            assert packing.pack(one, scorer) == batches
            batch = scorer.packed(one.objective.batch(scorer, one.train_set), one.train_set)
            with torch.no_grad():
                most = 4 * cached.bound(one.language_model.model, scorer.token_log_probs(batch))
            loss = optimizer.step(functools.partial(one.objective.loss, scorer), [batch])
        found.append((loss, optimizer.projected_gradient.clone()))
    (loss, g), (other, h) = found
    eps = one.config.recipe().eps if method == "mezo" else None
    assert abs(loss - other) <= most
    assert abs(g - h) <= (most / eps if eps else 0.05 * abs(g) + most)  # (loss+ - loss-) / (2 eps)


@torch.no_grad()
def test_kept_states_are_packed_too(of_run: Callable[..., Loaded]) -> None:
    """With the last block at the scored tokens alone, which are found in the sequence."""
    one = of_run(train_blocks="last:1", cache="memory")
    with one.scorer() as scorer:
        assert cached.keep(one, scorer, 6) is not None and scorer.states is not None and scorer.states.narrow is not None
        assert packing.pack(one, scorer) == "packed" and scorer.packer is not None
        few = sum(map(cached.weights, scorer.states.narrow.modules))
        assert 0 < scorer.packer.weights == cached.weights(scorer.states.lower.blocks[0]) - few
        batch = scorer.collate(one.train_set)
        line = scorer.packed(batch, one.train_set)
        assert line.states is not None and line.states.shape[:2] == line.input_ids.shape
        plain, other = scorer.token_log_probs(replace(batch, states=None)), scorer.token_log_probs(line)
        assert (plain - other).abs().max() <= cached.bound(one.language_model.model, plain)


@torch.no_grad()
def test_what_lies_below_a_steps_block_runs_once_for_a_sequence(of_run: Callable[..., Loaded]) -> None:
    one, ran = of_run(), list[int]()
    with one.scorer() as scorer:
        assert packing.pack(one, scorer) == "packed"
        line = scorer.packed(scorer.collate(one.train_set), one.train_set)
        plain = scorer.token_log_probs(line)
        one.language_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
        with scorer.once(Lower(one.language_model.model, 1)):
            assert torch.equal(scorer.token_log_probs(line), plain) and torch.equal(scorer.token_log_probs(line), plain)
        assert len(ran) == 1


# ---- which batches, and of which models ------------------------------------------------------------------------------------------------


def test_which_lengths_pay(family_folder: Folder) -> None:
    model = models.load(str(family_folder("llama")), device="cpu").model
    million = 1_000_000  # weights: 30 us a token, against 40 us a row and block
    assert not Packer(model, 1, million).pays([8] * 16)
    assert Packer(model, 1, million).pays([8, 8, 8, 16]) and not Packer(model, 6, million).pays([8, 8, 8, 16])
    assert not Packer(model, 1, million).pays([15, 16]) and Packer(model, 1, million, always=True).pays([16])
    assert Packer(model, 12, 85 * million).pays([15, 16])


def test_what_there_is_none_of_is_said(of_run: Callable[..., Loaded], capsys: Any) -> None:
    """By itself such a run pads; with --batches packed it is refused."""
    eager = of_run(batches="auto")
    eager.language_model.model.config._attn_implementation = "eager"
    prefix = of_run(batches="auto", peft="prefix", prefix_length=3)
    for one, reason in ((eager, "the attention of .* is eager, and not sdpa"), (prefix, "--peft prefix puts something before")):
        with one.scorer() as scorer, pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "ROW_NS", 0.0)
            assert packing.pack(one, scorer) == "padded" and scorer.packer is None
            assert "batches are padded: " in capsys.readouterr().err
            with pytest.raises(UserError, match=f"--batches packed: {reason}.*; leave it out"):
                packing.pack(replace(one, config=replace(one.config, batches="packed")), scorer)
    with pytest.raises(UserError, match="--batches packed: a CUDA graph has batches of a few shapes"):
        replace(eager.config, batches="packed", cuda_graph=True).check_use()


class Mixing(nn.Module):
    """An MLP that looks at the token before."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inside(x + 1e-6 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
        return out


def test_a_model_whose_rows_are_not_by_themselves_is_noticed(
    of_run: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the numbers are within the bound; and so are positions that are wrong."""
    one = of_run(batches="auto")
    monkeypatch.setattr(packed, "ROW_NS", 0.0)
    layer = one.language_model.model.model.layers[0]
    with one.scorer() as scorer:
        assert packing.pack(one, scorer) == "packed"
        layer.mlp = Mixing(layer.mlp)
        assert "are not by themselves" in str(packing.wrong(one, scorer, Packer(one.language_model.model, 2, 1)))
        assert packing.pack(one, scorer) == "padded" and scorer.packer is None
    for family in ("gpt2", "opt", "roberta"):
        one = of_run(family)
        with one.scorer() as scorer, pytest.MonkeyPatch.context() as patch:
            packer = Packer(one.language_model.model, 2, 1)
            assert packing.wrong(one, scorer, packer) is None
            patch.setattr(Packer, "_positions", lambda self, ids: torch.arange(ids.shape[1]).expand_as(ids) + 1)
            assert "log-probabilities are up to" in str(packing.wrong(one, scorer, packer))


def test_the_model_is_as_it_was_where_a_forward_fails(family_folder: Folder) -> None:
    model = models.load(str(family_folder("llama")), device="cpu").model
    packer = Packer(model, 2, 1)
    line, places = packer.of(torch.ones(2, 3, dtype=torch.long), [3, 2])
    assert line.lengths == (3, 2) and places.tolist() == [0, 1, 2, 3, 4] and line.positions.tolist() == [[0, 1, 2, 0, 1]]
    kinds: list[str] = []

    def fails(*args: Any) -> None:
        kinds.append(model.config._attn_implementation)
        raise ValueError("no forward")

    handle = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="no forward"), packer.apart(line):
        model(torch.ones(1, 5, dtype=torch.long), position_ids=line.positions)
    handle.remove()
    assert (*kinds, model.config._attn_implementation) == (packed.NAME, "sdpa")
    attend, q, k = ALL_ATTENTION_FUNCTIONS[packed.NAME], torch.ones(1, 1, 5, 2), torch.ones(1, 1, 4, 2)
    with pytest.raises(CannotPack, match="more than a mask"):
        attend(nn.Module(), q, k, k, None)


# ---- runs -----------------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_as_it_began(train_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run, again, plain = tmp_path / "run", tmp_path / "again", tmp_path / "plain"
    options = {"steps": 6, "lr": "1e-2", "eval_every": 2, "batch_size": 8, "train_examples": 20}
    assert main(train_command(plain, **options)) == 0  # of a model so small, that padding is cheaper
    monkeypatch.setattr(packed, "ROW_NS", 0.0)
    assert main(train_command(run, **options)) == 0
    found = [json.loads((at / "result.json").read_text())["hyperparameters"]["batches"] for at in (run, plain)]
    losses = [[line.split(",")[1] for line in (at / "log.csv").read_text().splitlines()] for at in (run, plain)]
    assert found == ["packed", "padded"] and losses[0] != losses[1]
    monkeypatch.setattr(Classification, "loss", Calls(7).of(Classification.loss))
    assert main(train_command(again, **options)) == 130
    with monkeypatch.context() as patch:
        patch.setattr(packed, "ROW_NS", 1e9)
        assert main(["resume", str(again)]) == 2
        assert "the run began with packed batches, and here they are padded" in capsys.readouterr().err
    assert main(["resume", str(again)]) == 0
    assert journal.read(again / "run.zoj").header.hyperparameters["batches"] == "packed"
    content = json.loads((again / "result.json").read_text())
    (again / "result.json").write_text(json.dumps(content).replace(str(again), str(run)))
    assert_same(again, run)


def test_a_run_of_before_goes_on_with_padded_batches(family_folder: Folder, data_folder: Path, tmp_path: Path) -> None:
    config = Config(model=str(family_folder("llama")), task="sst2", data=str(data_folder), output=str(tmp_path / "run"))
    content = {**config.__dict__}
    del content["batches"]
    assert Config.of_json(content, "config.json") == replace(config, batches="padded")
