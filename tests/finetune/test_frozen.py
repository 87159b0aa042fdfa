"""What is frozen runs once: which part is trained, where the cut is, and that forwards which begin with kept states are the forwards without.

Belongs here: blocks.py, frozen.py, cached.py, and whole runs with them. Does not belong here: adapters (test_adapters.py), scores (test_scoring.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zo_finetune import blocks, cached, files, frozen, narrow
from zo_finetune import model as models
from zo_finetune.cli import main
from zo_finetune.config import Config
from zo_finetune.dominant import dominant
from zo_finetune.errors import UserError
from zo_finetune.load import Loaded, load
from zo_finetune.objectives.classification import Classification
from zo_finetune.objectives.pairs import Pairs
from zo_finetune.scoring import Encoded, Scorer
from zo_finetune.train import Progress, Stopwatch, make_optimizer, train

from tests.finetune.calls import Calls
from tests.finetune.test_parts import Memory
from tests.finetune.test_resume import assert_same
from tests.kernels.cases import same_bits

FAMILIES = ("llama", "gpt2", "opt", "roberta", "bert")
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def deep(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Name of a family -> a folder with a random model of it with four blocks; `tied`: input and output embedding are one."""
    import transformers as tf

    made: dict[tuple[str, bool], Path] = {}

    def folder(family: str, tied: bool = True) -> Path:
        if (family, tied) not in made:
            source = model_folder("roberta" if family == "bert" else family)
            config = tf.AutoConfig.from_pretrained(source)
            if family == "bert":
                config = tf.BertConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=32,
                    num_attention_heads=4,
                    intermediate_size=64,
                    max_position_embeddings=64,
                )
            config.num_hidden_layers, config.tie_word_embeddings = 4, tied
            kind = tf.AutoModelForMaskedLM if family in ("roberta", "bert") else tf.AutoModelForCausalLM
            torch.manual_seed(5)
            model = kind.from_config(config)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.ndim == 2:
                        p.normal_(0, 0.3 if "embed" in name or "wte" in name else 0.2)
            path = tmp_path_factory.mktemp(f"deep_{family}")
            model.save_pretrained(path)
            tf.AutoTokenizer.from_pretrained(source).save_pretrained(path)
            made[family, tied] = path
        return made[family, tied]

    return folder


@pytest.fixture(scope="session")
def loaded(deep: Folder, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Loaded]:
    def build(family: str = "llama", tied: bool = True, **options: Any) -> Loaded:
        sizes: dict[str, Any] = {"train_examples": 20, "dev_examples": 8, "eval_examples": 4, "batch_size": 4, "steps": 40}
        given = {
            "task": "sst2",
            "data": str(data_folder),
            "device": "cpu",
            "output": str(tmp_path_factory.mktemp("frozen") / "run"),
        }
        return load(Config(model=str(deep(family, tied)), **given, **{**sizes, "cache": "memory", **options}))

    return build


@contextlib.contextmanager
def kept(loaded: Loaded) -> Iterator[tuple[Scorer, Any]]:
    with loaded.scorer() as scorer:
        yield scorer, cached.keep(loaded, scorer, 6)


def longer(example: Encoded) -> Encoded:
    """One whose input no split has."""
    return replace(example, inputs=tuple((*tokens, 5) for tokens in example.inputs))


def trained(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


# ---- which part is trained -----------------------------------------------------------------------------------------------------------


BLOCKS = {"2-": {2, 3}, "1-2": {1, 2}, "3": {3}, "last:1": {3}, "last:4": {0, 1, 2, 3}, "0": {0}}


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers"), ("gpt2", "transformer.h"), ("opt", "model.decoder.layers"), ("roberta", "roberta.encoder.layer")],
)
def test_blocks_by_number_or_from_the_end(family: str, name: str, deep: Folder) -> None:
    model = models.load(str(deep(family)), device="cpu").model
    for text, numbers in BLOCKS.items():
        model.requires_grad_(True)
        blocks.train_part(model, text, None)
        prefixes = tuple(f"{name}.{k}." for k in numbers)
        assert trained(model) == [n for n, _ in model.named_parameters() if n.startswith(prefixes)] != []


def standing_out(layers: Any, behind: int, factor: float) -> None:
    """A number of the first token is large from behind this block on."""

    def large(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 0, 3] = factor * output.abs().median()
        return output

    for layer in layers[behind:]:
        layer.register_forward_hook(large)


@pytest.mark.parametrize("behind", [0, 2, 3])
def test_the_block_behind_which_activations_stand_out(behind: int, deep: Folder) -> None:
    lm = models.load(str(deep("llama")), device="cpu")
    standing_out(lm.model.model.layers, behind, 400.0)
    found = dominant(lm.model, lm.tokenizer)
    assert (found.block, found.of_blocks) == (behind, 4) and found.before < 100 and found.behind == pytest.approx(400, rel=0.02)
    assert f"block {behind} of 4, counted from 0" in str(found) and f"{found.behind:.0f} times behind it" in str(found)
    lm.model.model.layers[1].register_forward_hook(lambda module, args, output: torch.nan * output)
    with pytest.raises(UserError, match="--train-blocks dominant: the hidden states of LlamaForCausalLM show no such block"):
        dominant(lm.model, lm.tokenizer)


def test_a_run_trains_the_dominant_block(command: Any, tmp_path: Path, deep: Folder, capsys: Any) -> None:
    """Which is told, recorded, and the same in a run that names it and in a replay."""
    assert main(command(tmp_path / "run", "scratch", train_blocks="dominant", cache="auto")) == 0
    result = files.read_json(tmp_path / "run" / "result.json")
    block = result["dominant_block"]["block"]
    assert f"block {block} of 4, counted from 0, is the dominant one" in capsys.readouterr().err
    assert main(command(tmp_path / "named", "scratch", train_blocks=block, cache="auto")) == 0
    named = files.read_json(tmp_path / "named" / "result.json")
    assert named["dominant_block"] is None and named["weights"] == result["weights"]
    base = ["--model", str(deep("llama")), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["replay", str(tmp_path / "run"), *base]) == 0
    one, other, again = (load_file(tmp_path / at / "model" / "model.safetensors") for at in ("run", "named", "out"))
    assert all(same_bits(one[n], other[n]) and same_bits(one[n], again[n]) for n in one)


def test_names_by_patterns(deep: Folder) -> None:
    def names(**options: Any) -> list[str]:
        return trained(models.load(str(deep("llama")), device="cpu", **options).model)

    assert names(train_only=[r"norm\.weight$"], train_blocks="3") == [
        f"model.layers.3.{n}_layernorm.weight" for n in ("input", "post_attention")
    ]
    assert names(train_only=["q_proj", "^model.norm"]) == [
        *(f"model.layers.{k}.self_attn.q_proj.weight" for k in range(4)),
        "model.norm.weight",
    ]
    assert names(train_only=["lm_head"]) == ["model.embed_tokens.weight"]  # tied: one parameter, by either name
    lora = names(peft="lora", train_only=[r"layers\.2\..*lora_B"])
    assert len(lora) == 2 and all("layers.2" in n and "lora_B" in n for n in lora)


def test_adapters_lie_in_the_chosen_blocks_alone(deep: Folder, tmp_path: Path) -> None:
    for peft, more in (("lora", {}), ("lora", {"targets": ["all-linear"]}), ("lora", {"targets": ["k_proj"]}), ("ln", {})):
        model = models.load(str(deep("llama")), device="cpu", peft=peft, train_blocks="2-3", **more)
        names = trained(model.model)
        assert names and all("layers.2." in n or "layers.3." in n for n in names)
        folder = model.save(tmp_path / f"{peft}{len(more)}")
        again = models.load(str(deep("llama")), device="cpu", peft=peft, adapter=str(folder), train_blocks="3")
        assert trained(again.model) == [n for n in names if "layers.3." in n]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train-blocks", "4"], "--train-blocks 4: LlamaForCausalLM has 4 blocks, model.layers.0 to model.layers.3"),
        (["--train-blocks", "last:5"], "has 4 blocks"),
        (["--train-blocks", "1-4"], "has 4 blocks"),
        (["--train-blocks", "3-1"], "--train-blocks '3-1': give numbers of blocks"),
        (["--train-blocks", "last:0"], "'last:0': give numbers"),
        (
            ["--train-only", "nothing"],
            "--train-only 'nothing' occurs in no name of what could be trained: model.embed_tokens.weight, lm_head.weight, model.layers.N.",
        ),
        (["--train-only", "("], "--train-only: '(' is no regular expression"),
        (["--train-blocks", "3", "--peft", "ln", "--peft-target", "model.norm"], "--train-blocks 3: no normalisation module"),
        (["--train-blocks", "3", "--peft", "prompt"], "--train-blocks 3: --peft prompt puts something before"),
        (["--train-only", "norm", "--cache", "disk"], "--cache disk: the first of model.layers"),
        (["--cache", "memory"], "--cache memory: the input embedding is trained"),
        (["--peft", "prefix", "--cache", "memory"], "--peft prefix puts something before"),
    ],
)
def test_what_is_refused(options: list[str], said: str, train_command: Any, deep: Folder, tmp_path: Path, capsys: Any) -> None:
    assert main(train_command(tmp_path / "run", *options, model=str(deep("llama")))) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.zoj").exists()


# ---- where the cut is ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({"train_blocks": "last:1"}, 3),
        ({"train_blocks": "2-"}, 2),
        ({"train_blocks": "1-2"}, 1),
        ({"train_only": ["^model.norm"]}, 4),
        ({"train_only": ["lm_head"]}, 4),
        ({"train_only": ["lm_head", r"layers\.2\."]}, 2),
        ({"train_only": ["lm_head"], "tied": True}, 0),
        ({"train_only": ["embed"]}, 0),
        ({"train_only": ["q_proj"]}, 0),
        ({"peft": "lora", "train_blocks": "2-"}, 2),
        ({"peft": "ln", "train_blocks": "3"}, 3),
    ],
)
def test_the_cut_is_before_what_reads_trained_weights(options: dict[str, Any], cut: int, loaded: Callable[..., Loaded]) -> None:
    one = loaded(**{"tied": False, **options})
    ids = torch.arange(8).reshape(2, 4)
    assert frozen.cut_of(one.language_model.model, lambda: one.language_model.model(input_ids=ids)) == cut


# ---- the same numbers --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_those_without(family: str, dtype: str, loaded: Callable[..., Loaded]) -> None:
    """In batches as the states were computed in, to the bit; in others within the bound. Rounding is there to be seen, and no more than that."""
    one = loaded(family, train_blocks="last:2", dtype=dtype, eval_batch_size=8)
    with kept(one) as (scorer, said):
        assert said["blocks"] == 2 and said["examples"] == 28 and said["evaluation_examples"] == 4 and said["where"] == "memory"
        inputs = cached.inputs_of(one.train_set + one.dev_set)
        owner = {e.inputs[0]: e for e in one.train_set + one.dev_set}
        same = [owner[tokens] for tokens in inputs[8:16]]
        other = (one.train_set[:4], one.dev_set, one.eval_set, one.train_set[3:4])
        for part, exact in ((same, True), *((part, False) for part in other)):
            batch = scorer.collate(part, 1 if exact else 4)
            assert batch.states is not None and batch.states.shape[:2] == batch.input_ids.shape
            with_, without = scorer.token_log_probs(batch), scorer.token_log_probs(replace(batch, states=None))
            if exact:
                scorer.states.narrow, own = None, scorer.states.narrow
                assert same_bits(scorer.token_log_probs(batch), without)
                scorer.states.narrow = own
            most = cached.bound(one.language_model.model, without)
            assert (with_ - without).abs().max() <= most
            assert most < (1e-3 if dtype == "float32" else 1.0)
        assert scorer.collate([longer(one.eval_set[0]), *one.eval_set[1:]]).states is None  # one is not kept: the whole model runs


NARROW = {  # of the last block and what follows: what no other position reads
    "llama": {"self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp", "model.norm"},
    "gpt2": {"attn.c_proj", "ln_2", "mlp", "transformer.ln_f"},
    "opt": {"self_attn.q_proj", "self_attn.out_proj", "final_layer_norm", "fc1", "activation_fn", "fc2", "model.decoder.final_layer_norm"},
    "roberta": {"attention.self.query", "attention.output.dense", "attention.output.LayerNorm", "intermediate", "output.dense", "output.LayerNorm",
                "lm_head.dense", "lm_head.layer_norm"},
    "bert": {"attention.self.query", "attention.output.dense", "attention.output.LayerNorm", "intermediate", "output.dense", "output.LayerNorm",
             "cls.predictions.transform"},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_block_runs_for_the_scored_tokens_alone(family: str, dtype: str, loaded: Callable[..., Loaded]) -> None:
    """Keys and values are made of all tokens; queries and what follows attention of the scored ones, with the same numbers within the bound."""
    one = loaded(family, train_blocks="last:1", dtype=dtype)
    model = one.language_model.model
    name, layers = blocks.blocks_of(model)
    names = {
        m: n.removeprefix(f"{name}.{len(layers) - 1}.").removeprefix("roberta.").removeprefix("bert.")
        for n, m in model.named_modules()
    }
    with kept(one) as (scorer, _):
        assert (
            scorer.states.narrow is not None
            and {names[m] for m in scorer.states.narrow.modules} - {"dropout", "output.dropout"} >= NARROW[family]
        )
        assert not {
            n
            for m in scorer.states.narrow.modules
            if "k_proj" in (n := names[m]) or "v_proj" in n or "key" in n or "value" in n or "c_attn" in n
        }
        rows: list[int] = []
        inner = next((m for outer in scorer.states.narrow.modules for m in outer.modules() if m is not outer), None)  # opt has none
        if inner is not None:
            inner.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
        for part in (one.train_set[:4], one.train_set[5:6], one.dev_set):
            batch = scorer.collate(part, 4)
            rows.clear()
            with_ = scorer.token_log_probs(batch)
            assert rows == ([] if inner is None else [len(batch.point_rows)]) and (inner is None) == (family == "opt")
            without = scorer.token_log_probs(replace(batch, states=None))
            assert not torch.equal(with_, torch.zeros_like(with_)) and (with_ - without).abs().max() <= cached.bound(model, without)
    assert not [n for m, n in names.items() if "forward" in m.__dict__]  # nothing of it stays


@torch.no_grad()
def test_what_other_positions_read_is_found(loaded: Callable[..., Loaded]) -> None:
    """A block whose MLP mixes tokens a little, as convolutions do, runs it for all of them; a forward that fails leaves every module as it was."""
    one = loaded(train_blocks="last:1")
    model = one.language_model.model
    last = model.model.layers[3]
    own = last.mlp.forward
    last.mlp.forward = lambda x: own(x + 1e-30 * x.mean(-2, keepdim=True))
    with kept(one) as (scorer, _):
        assert scorer.states.narrow is not None and not {last.mlp, last.self_attn.q_proj, last.self_attn.o_proj} & set(
            scorer.states.narrow.modules
        )
        assert {last.mlp.gate_proj, last.mlp.down_proj} <= set(scorer.states.narrow.modules)  # behind the mixing
        handle = last.mlp.register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            scorer.token_log_probs(scorer.collate(one.train_set[:4]))
        handle.remove()
        assert [m for m in model.modules() if "forward" in m.__dict__] == [last.mlp]
        batch = scorer.collate(one.train_set[:4])
        rows, width = batch.input_ids.shape
        everywhere = (torch.arange(rows).repeat_interleave(width), torch.arange(width).repeat(rows) - width)
        found = narrow.narrow(model, last, lambda: scorer.token_log_probs(batch), everywhere, (rows, width), lambda _: 1.0)
        assert found.modules == []  # where all is scored nothing can be told


@torch.no_grad()
def test_states_of_others_are_noticed(loaded: Callable[..., Loaded]) -> None:
    one = loaded(train_blocks="last:1")
    with kept(one) as (scorer, _):
        assert cached.wrong(one, scorer, one.train_set) is None
        scorer.states.stores[0] += 1e-3
        assert "rounding explains" in str(cached.wrong(one, scorer, one.train_set))
        scorer.states.stores[0].fill_(torch.nan)
        assert cached.wrong(one, scorer, one.train_set) is not None


def earlier(layers: torch.nn.ModuleList) -> str:
    """The last block's output has a part of the first one's own."""
    seen: list[torch.Tensor] = []
    layers[0].register_forward_hook(lambda m, a, out: seen.append(out))
    layers[3].register_forward_hook(lambda m, a, out: out + 0.1 * seen[-1])
    return "later blocks of LlamaForCausalLM read more"


def pair(layers: torch.nn.ModuleList) -> str:
    """A block hands two tensors on."""
    layers[1].register_forward_hook(lambda m, a, out: (out, out))
    layers[2].register_forward_pre_hook(lambda m, a: (a[0][0], *a[1:]))
    return "its blocks pass on more than the hidden states"


@pytest.mark.parametrize("spoil", [earlier, pair])
def test_blocks_that_read_more_than_states_are_noticed(spoil: Any, loaded: Callable[..., Loaded], capsys: Any) -> None:
    """As cross-layer keys and values, or sums over all layers, are: the run goes on without, and says so."""
    one = loaded(train_blocks="last:1", cache="auto")
    why = spoil(one.language_model.model.model.layers)
    with kept(one) as (scorer, said):
        assert said is None and scorer.states is None
    assert f"no hidden states are kept: {why}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--cache memory: "), kept(replace(one, config=replace(one.config, cache="memory"))):
        pass


def test_automatic_where_it_pays(loaded: Callable[..., Loaded], capsys: Any) -> None:
    for options, yes in (
        ({"steps": 40}, True),
        ({"steps": 1, "dev_examples": 0}, False),
        ({"train_only": ["lm_head"]}, False),
        ({"train_blocks": "0-"}, False),
    ):
        one = loaded(**{"train_blocks": None if "train_only" in options else "last:1", "cache": "auto", **options})
        with kept(one) as (_, said):
            assert (said is not None) == yes
    assert "no hidden states are kept: the input embedding is trained" in capsys.readouterr().err
    one = loaded(cache="auto")
    with kept(one) as (_, said):
        assert said is None
    assert "no hidden states" not in capsys.readouterr().err  # nobody asked for a part


def test_a_forward_runs_the_upper_blocks_alone(loaded: Callable[..., Loaded]) -> None:
    one = loaded(train_blocks="last:1")
    ran: list[int] = []
    for k, block in enumerate(one.language_model.model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda m, a, k=k: ran.append(k))
    names = [n for n, _ in one.language_model.model.named_parameters()]
    with kept(one) as (scorer, _):
        ran.clear()
        scorer.scores(scorer.collate(one.train_set[:4]))
        assert ran == [3]
        ran.clear()
        scorer.scores(scorer.collate([longer(e) for e in one.eval_set[:2]]))
        assert ran == [0, 1, 2, 3]
    ran.clear()
    with one.scorer() as later:  # of the evaluation after the training
        later.scores(later.collate(one.eval_set))
        assert ran == [3]
    assert [n for n, _ in one.language_model.model.named_parameters()] == names
    assert all("forward" not in vars(m) for m in one.language_model.model.modules())


# ---- blocks in turn -----------------------------------------------------------------------------------------------------------------------------

TURNS: dict[str, dict[str, Any]] = {
    "scratch": {"cache": "auto"},
    "inplace": {"perturbation": "inplace", "dtype": "bfloat16", "family": "gpt2", "cache": "auto"},
    "random": {"options": {"order": "random", "every": "2"}, "family": "opt", "accumulate": 2, "cache": "auto"},
    "masked": {"family": "roberta", "tied": False, "cache": "auto"},
    "patterns": {"options": {"by": "layers.(1|2),layers.3"}, "train_only": ["proj"], "train_blocks": "1-"},
    "kept": {"train_blocks": "last:2"},
    "lora": {"peft": "lora", "train_blocks": "1-2"},
    "pairs": {"objective": "pairs", "cache": "auto"},
}


class Turns(Progress):
    """Of each step: the lowest of the model's blocks that it moves, and how often each of them ran."""

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        super().__init__(Memory(), 8, optimizer, torch.device("cpu"))
        self.seen: list[tuple[int, dict[int, int]]] = []
        self.ran: dict[int, int] = {}
        for k, block in enumerate(blocks.blocks_of(model)[1]):
            inner = next(m for m in block.modules() if "Norm" in type(m).__name__)
            inner.register_forward_pre_hook(lambda m, a, k=k: self.ran.update({k: self.ran.get(k, 0) + 1}))
        self.lowest = self.next()

    def next(self) -> int:
        numbers = [re.search(r"\.(\d+)\.", name) for name in self.optimizer.block()]
        self.ran.clear()
        return min(int(n[1]) if n else 0 for n in numbers)

    def add(self, *row: Any) -> None:
        self.seen.append((self.lowest, dict(self.ran)))
        super().add(*row)
        self.lowest = self.next()


@pytest.mark.parametrize("name", TURNS)
def test_what_lies_below_a_steps_block_runs_once_a_step(
    name: str, loaded: Callable[..., Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And losses and weights are the same to the bit as with both forwards whole."""
    runs = []
    for whole in (False, True):
        one = loaded(**{"method": "blockwise", "steps": 8, "lr": 1e-2, "dev_examples": 0, "batch_size": 3, **TURNS[name]})
        model = one.language_model.model
        with kept(one) as (scorer, said), monkeypatch.context() as patch:
            assert (said is not None) == ("cache" not in TURNS[name])
            if whole:
                patch.setattr(cached.Below, "of", lambda *_: None)
            optimizer = make_optimizer(one.language_model, one.config)
            progress = Turns(model, optimizer)
            made = cached.Below.of(one, scorer, optimizer.block())  # its own look is not counted
            patch.setattr(cached.Below, "of", lambda *_, made=made: made)
            progress.next()
            train(one, optimizer, scorer, progress, Stopwatch(), lambda step: None)
        least = 0 if scorer.states is None else scorer.states.lower.cut
        for lowest, ran in progress.seen:
            assert ran == {k: one.config.accumulate * (1 if k < lowest and not whole else 2) for k in range(least, 4)}
        assert len({lowest for lowest, _ in progress.seen}) > 1
        runs.append((progress.log.losses, [p.detach().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(same_bits(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("spoil", [earlier, pair])
def test_no_forward_begins_above_blocks_that_are_read_twice(spoil: Any, loaded: Callable[..., Loaded], capsys: Any) -> None:
    one = loaded(method="blockwise", cache="auto")
    why = spoil(one.language_model.model.model.layers)
    with one.scorer() as scorer:
        optimizer = make_optimizer(one.language_model, one.config)
        assert cached.Below.of(one, scorer, optimizer.block()) is None
    assert f"in each forward of a step all blocks run: {why}" in capsys.readouterr().err
    off = replace(one, config=replace(one.config, cache="off"))
    assert cached.Below.of(off, scorer, optimizer.block()) is None and cached.Below.of(one, scorer, None) is None
    assert capsys.readouterr().err == ""


# ---- whole runs ------------------------------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "scratch": {"train_blocks": "last:1"},
    "inplace": {"train_blocks": "last:2", "perturbation": "inplace", "dtype": "bfloat16", "model": "gpt2"},
    "fzoo": {"train_blocks": "last:1", "method": "fzoo", "model": "opt"},
    "pairs": {"train_blocks": "last:1", "objective": "pairs"},
    "lora": {"peft": "lora", "train_blocks": "2-", "accumulate": 2},
    "masked": {"train_blocks": "last:1", "model": "roberta", "keep": "best"},
    "inputs": {"train_blocks": "last:1", "method": "fzoo-inputs", "option": "rank=16", "keep": "best"},
}


@pytest.fixture
def command(train_command: Any, deep: Folder) -> Callable[..., list[str]]:
    def build(output: Path, name: str, **more: Any) -> list[str]:
        options = {
            "steps": 6,
            "lr": "1e-2",
            "eval_every": 2,
            "seed": 4,
            "train_examples": 12,
            "cache": "memory",
            **RUNS[name],
            **more,
        }
        return train_command(output, **{**options, "model": str(deep(options.pop("model", "llama")))})

    return build


def losses(folder: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (folder / "log.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_and_replayed(
    name: str, command: Any, deep: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run computes the states again, to the bit; a replay needs none."""
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(command(run, name)) == 0
    result = files.read_json(run / "result.json")
    assert result["cache"]["examples"] == 20 and result["cache"]["evaluation_examples"] > 0 and result["cache"]["bytes"] > 0
    kind: Any = Pairs if name == "pairs" else Classification
    monkeypatch.setattr(kind, "loss", Calls(9).of(kind.loss))
    assert main(command(again, name)) == 130
    assert main(["resume", str(again)]) == 0
    mine, other = (json.loads((at / "result.json").read_text()) for at in (again, run))
    assert all(content["cache"].pop(f"{what}seconds") for content in (mine, other) for what in ("", "evaluation_"))
    for at, content in ((again, mine), (run, other)):
        (at / "result.json").write_text(json.dumps(content).replace(str(again), str(run)))
    assert_same(again, run)
    out = tmp_path / "out"
    base = ["--model", str(deep(RUNS[name].get("model", "llama"))), "--device", "cpu"]
    more = ["--upto", str(result["kept"]["step"])] if result["kept"]["step"] != 6 else []
    assert main(["replay", str(run), *base, *more, "--output", str(out)]) == 0
    kind = "adapter/adapter_model" if name == "lora" else "model/model"
    saved, replayed = (load_file(at / f"{kind}.safetensors") for at in (run, out))
    assert saved.keys() == replayed.keys() and all(same_bits(saved[n], replayed[n]) for n in saved)


def test_memory_disk_and_without(command: Any, tmp_path: Path, capsys: Any) -> None:
    """On disk the same bits, and nothing is left of it; without, the same losses within rounding, and no word of it."""
    for cache in ("memory", "disk", "off"):
        assert main(command(tmp_path / cache, "scratch", cache=cache)) == 0
    said = capsys.readouterr().err
    assert (
        "hidden states of 20 inputs and " in said
        and " for the evaluations behind 3 of 4 blocks: " in said
        and "bytes on disk" in said
        and "forward runs the other 1 alone" in said
    )
    one, other, without = (files.read_json(tmp_path / cache / "result.json") for cache in ("memory", "disk", "off"))
    times = {name: other["cache"][name] for name in ("seconds", "evaluation_seconds")}
    assert other["cache"] == {**one["cache"], "where": "disk", **times} and without["cache"] is None
    for when in ("before", "after"):
        assert one[when] == other[when] and one[when]["loss"] == pytest.approx(without[when]["loss"], rel=1e-4)
    assert losses(tmp_path / "memory") == losses(tmp_path / "disk")
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)
    assert one["weights"] == without["weights"] and one["forwards"] == without["forwards"]
    assert sorted(os.listdir(tmp_path / "disk")) == sorted(os.listdir(tmp_path / "memory")) == sorted(os.listdir(tmp_path / "off"))


def test_first_order_methods_too(command: Any, tmp_path: Path) -> None:
    for cache in ("memory", "off"):
        assert main(command(tmp_path / cache, "scratch", cache=cache, method="adam", lr="1e-3")) == 0
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "off"), rel=1e-4)


def test_the_blocks_are_found(deep: Folder) -> None:
    model = models.load(str(deep("gpt2")), device="cpu", peft="lora").model
    name, found = blocks.blocks_of(model)
    assert name == "base_model.model.transformer.h" and len(found) == 4
    with pytest.raises(UserError, match="has no list of blocks"):
        blocks.blocks_of(torch.nn.Linear(2, 2))
