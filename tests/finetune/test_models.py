"""Models as people have them: incomplete, damaged, hostile, of another kind; and tokenizers that do not fit theirs."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zo_finetune import folders
from zo_finetune import model as models
from zo_finetune.errors import UserError
from zo_finetune.scoring import Encoder, Scorer
from zo_finetune.tasks import get_task
from zo_finetune.tasks.base import Candidate, Example

from tests.finetune.conftest import FAMILIES, make_rows

Tensors = dict[str, torch.Tensor]
Copy = Callable[..., Path]


@pytest.fixture
def copy(model_folder: Callable[[str], Path], tmp_path: Path) -> Copy:
    """A copy of a tiny model, to be damaged; `change` maps its tensors to others, `config` its configuration."""

    def make(family: str = "llama", change: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Path:
        path = tmp_path / f"{family}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model_folder(family), path)
        if change:
            save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})
        if config:
            content = json.loads((path / "config.json").read_text()) | config
            (path / "config.json").write_text(json.dumps(content))
        return path

    return make


def load(path: Path, **more: Any) -> models.LanguageModel:
    return models.load(str(path), device="cpu", **more)


def refused(path: Path, message: str, **more: Any) -> str:
    with pytest.raises(UserError, match=message) as caught:
        load(path, **more)
    text = str(caught.value)
    assert path.name in text and text.isprintable() and len(text) < 900
    return text


def test_whole_models_are_loaded_without_a_word(model_folder: Callable[[str], Path]) -> None:
    for family in FAMILIES:
        assert load(model_folder(family)).notes == []


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", lambda t: {f"foo.{k}": v for k, v in t.items()}, r"lacks 21 tensors of LlamaForCausalLM.*foo\."),
        ("llama", lambda t: {k: v for k, v in t.items() if "layers.1." not in k}, r"lacks 9 tensors"),
        ("llama", lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj" not in k}, r"lacks 1 tensors.*layers\.0\.self_attn\.q_proj\.weight"),
        ("llama", lambda t: {k: v for k, v in t.items() if "embed_tokens" not in k}, r"lacks \d tensors.*embed_tokens"),
        ("llama", lambda t: {k.replace("q_proj", "query"): v for k, v in t.items()}, r"lacks 2 tensors.*it has .*query"),
        ("roberta", lambda t: {k: v for k, v in t.items() if "lm_head.dense" not in k}, r"lacks 2 tensors.*lm_head\.dense"),
        ("gpt2", lambda t: {k: v for k, v in t.items() if "ln_f" not in k}, r"lacks 2 tensors.*ln_f"),
        ("llama", lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}, r"no place for.*layers\.2\.mlp"),
        ("llama", lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, r"no place for.*q_proj\.bias"),
        ("llama", lambda t: t | {"model.norm.weight": torch.full((32,), torch.nan)}, r"model\.norm\.weight holds NaN"),
        ("opt", lambda t: t | {"model.decoder.layers.0.fc1.bias": torch.full((48,), -torch.inf)}, r"fc1\.bias holds NaN or an inf"),
    ],
)  # fmt: skip
def test_what_is_missing_or_left_over_is_named(copy: Copy, family: str, change: Any, message: str) -> None:
    """transformers fills what is missing with random numbers and leaves out what is left over, and both train."""
    refused(copy(family, change), message)


def test_a_head_that_is_not_tied_must_be_there(copy: Copy) -> None:
    refused(copy(tie_word_embeddings=False), r"lacks 1 tensors.*lm_head\.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(copy: Copy, dtype: torch.dtype) -> None:
    """transformers would take a quantised file's integers for the weights."""
    message = r"2 of its weights are no floating-point numbers, model\.layers\.0\.self_attn\.q_proj\.weight is [IBC]"
    refused(copy(change=lambda t: {k: v.to(dtype) if "q_proj" in k else v for k, v in t.items()}), message)
    refused(
        copy("gpt2", lambda t: {k.removeprefix("transformer."): v.to(dtype) if "c_fc.weight" in k else v for k, v in t.items()}),
        "2 of its weights are no",
    )


def test_other_heads_and_old_buffers_are_left_out_and_told(copy: Copy) -> None:
    lm = load(
        copy("roberta", lambda t: t | {"roberta.pooler.dense.weight": torch.zeros(32, 32), "classifier.x\x1b[2J": torch.zeros(1)})
    )
    assert len(lm.notes) == 1
    assert "pooler.dense.weight" in lm.notes[0] and lm.notes[0].isprintable()
    old = {"roberta.embeddings.position_ids": torch.arange(66)[None]}
    assert load(copy("roberta", lambda t: t | old)).notes == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 48}, r"(tensors have other shapes|could not be loaded)"),
        ({"intermediate_size": 80}, r"6 tensors have other shapes .*\[32, 64\] and not \[32, 80\]"),
        ({"num_attention_heads": 0}, r"config\.json: 'num_attention_heads' is 0; it must be at least 1"),
        ({"num_hidden_layers": 1}, r"9 tensors that its config\.json leaves no place for"),
        ({"num_hidden_layers": 10**9}, r"'num_hidden_layers' is 1000000000; at most 4,096"),
        ({"vocab_size": 10**15}, r"'vocab_size' is 1000000000000000; at most 16,777,216"),
        ({"vocab_size": 10**7}, r"describes \d{3},\d{3},\d{3} weights .*its files hold"),
        ({"max_position_embeddings": 1e30}, r"'max_position_embeddings' is 1e\+30"),
        ({"text_config": {"hidden_size": 1e300}}, r"'hidden_size' is 1e\+300"),
        ({"hidden_size": "thirty"}, r"could not be loaded"),
        ({"hidden_size": [32]}, r"could not be loaded"),
        ({"rope_scaling": {"rope_type": "no such"}}, r"could not be loaded"),
        ({"num_attention_heads": 5, "head_dim": 3}, r"could not be loaded: .*validate_architecture.*: .*(5|multiple)"),
        ({"hidden_act": "no such"}, r"could not be loaded: KeyError"),
        ({"model_type": "no such"}, r"could not be loaded"),
        ({"a": [[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]}, r"nested too deeply"),
    ],
)  # fmt: skip
def test_odd_configurations(copy: Copy, config: dict[str, Any], message: str) -> None:
    refused(copy(**config), message)


def test_a_context_that_takes_a_buffer_of_its_square(copy: Copy) -> None:
    """GPT-2's mask is positions times positions, whatever the weights."""
    refused(copy("gpt2", n_positions=100_000), r"(bytes of buffers|could not be loaded|other shapes)")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 60772936\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_and_empty_files_are_called_that(copy: Copy, name: str) -> None:
    path = copy()
    (path / name).write_text(POINTER)
    assert name in refused(path, "is a pointer of Git LFS")
    (path / name).write_text("")
    assert name in refused(path, "is empty")
    (path / name).unlink()
    (path / name).mkdir()
    assert name in refused(path, "no regular file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json could not be read"),
        ("config.json", b"[]", r"config\.json could not be read: it is \[\], and not an object"),
        ("config.json", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"config\.json is nested too deeply"),
        ("config.json", b"\xff\xfe{", r"config\.json could not be read"),
        ("config.json", b'{"a": ' + b"1" * 5000 + b"}", r"config\.json could not be read"),
        ("tokenizer.json", b"{", r"could not be loaded"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": ["x y"]}}', r"could not be loaded"),
        ("tokenizer_config.json", b"[1]", r"could not be loaded"),
        ("model.safetensors", b"\xff" * 64, r"model\.safetensors is damaged"),
        ("model.safetensors", (2**60).to_bytes(8, "little") + b"{}", r"model\.safetensors is damaged"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", r"describes 34,080 weights .*, its files hold 10 bytes"),
    ],
)  # fmt: skip
def test_files_with_other_bytes(copy: Copy, name: str, content: bytes, message: str) -> None:
    path = copy()
    (path / name).write_bytes(content)
    refused(path, message)


def test_weights_cut_short(copy: Copy) -> None:
    path = copy()
    whole = (path / "model.safetensors").read_bytes()
    for cut in (4, 100, len(whole) // 2, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:cut])
        refused(path, r"model\.safetensors is damaged or was not written to its end")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_runs_no_code(copy: Copy, tmp_path: Path) -> None:
    """And one of tensors alone is read."""
    path, mark = copy(), tmp_path / "ran"
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    assert load(path).counts()[1] == sum(t.numel() for t in tensors.values())
    torch.save(tensors | {"x": Evil(mark)}, path / "pytorch_model.bin")
    refused(path, "could not be loaded")
    assert not mark.exists()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04garbage" * 1000)
    refused(path, "could not be loaded")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", ""])
def test_an_index_stays_in_its_folder(copy: Copy, name: str) -> None:
    path = copy()
    shutil.copy(path / "model.safetensors", path.parent / "outside.safetensors")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))
    refused(path, "which is not in the folder")


def test_shards(copy: Copy) -> None:
    path = copy()
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    half = sorted(tensors)[::2]
    save_file({k: tensors[k] for k in half}, path / "a.safetensors", metadata={"format": "pt"})
    save_file({k: v for k, v in tensors.items() if k not in half}, path / "b.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {k: "a.safetensors" if k in half else "b.safetensors" for k in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(path).counts()[1] == sum(t.numel() for t in tensors.values())
    (path / "b.safetensors").unlink()
    refused(path, r"b\.safetensors is not there")
    for bad in ([], {}, {"weight_map": []}, {"weight_map": {"a": 3}}):
        (path / "model.safetensors.index.json").write_text(json.dumps(bad))
        refused(path, r"index\.json")


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_folder_never_runs(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, known: bool
) -> None:
    """Nor is there a question: its answer would be read from a terminal, or from whatever is there instead."""

    def ask(*_: Any) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    path, mark = copy(), tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\n")
    content = json.loads((path / where).read_text())
    content["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"]}
    if not known:
        content |= {"model_type": "evil"} if where == "config.json" else {"tokenizer_class": "Evil"}
    (path / where).write_text(json.dumps(content))
    if known:
        load(path)  # by transformers' own classes
    else:
        with contextlib.suppress(UserError):  # a tokenizer of an unknown class may be read from tokenizer.json alone
            load(path)
    assert not mark.exists()


def test_folders_of_other_kinds(copy: Copy, tmp_path: Path) -> None:
    path = copy()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "far/away\\u001b[2J"}')
    refused(path, r"is an adapter of peft.*far/away")
    run = tmp_path / "run"
    shutil.copytree(copy(), run / "model")
    (run / "run.zoj").write_bytes(b"x")
    (run / "config.json").write_text('{"directory": "/", "config": {}}')
    refused(run, r"is a run of zo-finetune, and not a model: its weights are in .*run/model")
    bare = copy()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    refused(bare, r"lacks a tokenizer \(tokenizer\.json")
    empty = copy()
    (empty / "model.safetensors").unlink()
    refused(empty, r"holds no weights \(model\.safetensors")
    others = {
        "a.gguf": r"has no config\.json, but GGUF files: give one, as .*a\.gguf",
        "params.json": "makers' own format",
        "x": r"no config\.json.*it holds x",
    }
    for name, message in others.items():
        other = tmp_path / f"other{name}"
        other.mkdir()
        (other / name).write_bytes(b"x")
        refused(other, message)


def test_a_tokenizer_config_alone_is_no_tokenizer(copy: Copy) -> None:
    path = copy()
    (path / "tokenizer.json").unlink()
    refused(path, r"(knows no English word|could not be loaded)")


def test_a_masked_model_is_not_scored_as_a_causal_one(copy: Copy) -> None:
    refused(copy("roberta"), r"looks ahead, so it is no causal model: give --form masked", form="causal")
    for family in ("llama", "gpt2", "opt"):
        for dtype in ("float32", "bfloat16", "float16"):
            load(copy(family), dtype=dtype)


def test_weights_beyond_a_dtype(copy: Copy) -> None:
    path = copy(change=lambda t: t | {"model.norm.weight": torch.full((32,), 1e6)})
    load(path)
    refused(path, r"model\.norm\.weight holds NaN or an infinity in torch\.float16: choose another --dtype", dtype="float16")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "cpu:1", "cuda:", "mps", "cuda:9999", "\x1b[2J", "cuda", "cuda:9"])
def test_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name == "cuda:9")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^--device '.*' is not a device|sees no GPU|there are 2 GPUs, cuda:0 to cuda:1") as caught:
        models.pick_device(name)
    assert str(caught.value).isprintable()


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"GGUF" + b"\xff" * 100, POINTER.encode()):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.gguf"):
            load(tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"did you mean 'a\.gguf'"):
        load(tmp_path, gguf_file="aa.gguf")


# Tokenizers


def padded(copy: Copy, causal_tokenizer: Any) -> Path:
    """A model whose tokenizer has a padding token that was added, and no row for it."""
    import copy as copies

    path = copy()
    grown = copies.deepcopy(causal_tokenizer)
    grown.add_special_tokens({"pad_token": "<new pad>"})
    assert grown.pad_token_id == len(causal_tokenizer)
    grown.save_pretrained(path)
    return path


def test_a_padding_token_without_a_row(copy: Copy, causal_tokenizer: Any) -> None:
    lm = load(padded(copy, causal_tokenizer))
    assert 0 <= lm.pad_id < lm.vocabulary
    task = get_task("sst2")
    encoder = Encoder(lm.tokenizer, lm.form, lm.max_length, lm.vocabulary)
    encoded = encoder.encode_all([task.example(row, "causal") for row in make_rows(4, 1)])
    with Scorer(lm.model, lm.form, lm.pad_id) as scorer, torch.no_grad():
        assert torch.isfinite(scorer.scores(scorer.collate(encoded))).all()
    with pytest.raises(UserError, match=r"the text 'a <new pad> It was' has the token '<new pad>', number \d+ of a model with"):
        encoder.encode(task.example({"sentence": "a <new pad>", "label": 1}, "causal"))


def test_a_soft_prompt_takes_no_row_of_the_vocabulary(model_folder: Callable[[str], Path]) -> None:
    for peft in ("none", "lora", "prompt", "prefix"):
        assert load(model_folder("llama"), peft=peft).vocabulary == load(model_folder("llama")).vocabulary


def test_contexts(copy: Copy) -> None:
    for said, expected in ((10**30, 64), (32, 64)):
        path = copy()
        content = json.loads((path / "tokenizer_config.json").read_text()) | {"model_max_length": said}
        (path / "tokenizer_config.json").write_text(json.dumps(content))
        assert load(path).max_length == expected
    for said, expected in ((10**30, 2048), (99, 99), (0, 2048)):  # a configuration that says nothing
        model = SimpleNamespace(config=SimpleNamespace(model_type="bloom"))
        lm = models.LanguageModel(model, SimpleNamespace(model_max_length=said), "causal", "none", torch.device("cpu"))
        assert lm.max_length == expected


@pytest.mark.parametrize("form", ["causal", "masked"])
def test_texts_tokenized_together_are_as_alone(tokenizer: Any, form: Any) -> None:
    """And each text is tokenized once."""
    task = get_task("sst2")
    examples = [task.example(row, form) for row in make_rows(9, 1)]
    examples += [Example(tuple(Candidate(f"ctx {k}", a, ".") for a in (" great", " great great", "great")), 0) for k in range(3)]

    class Counting:
        seen: list[str] = []  # noqa: RUF012

        def __call__(self, text: Any, **how: Any) -> Any:
            self.seen += [text] if isinstance(text, str) else text
            return tokenizer(text, **how)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    counting = Counting()
    encoder = Encoder(counting, form, 64, len(tokenizer))
    counting.seen.clear()
    together = encoder.encode_all(examples)
    assert len(counting.seen) == len(set(counting.seen))
    assert sum(text == examples[0].candidates[0].context for text in counting.seen) == 1
    for example, encoded in zip(examples, together, strict=True):
        assert encoded == Encoder(tokenizer, form, 64).encode(example)
        for candidate, span in zip(example.candidates, encoded.spans, strict=True):
            ids = list(encoded.inputs[span.row])
            if form == "causal":
                text = tokenizer(candidate.context + candidate.answer, add_special_tokens=False).input_ids
                assert [0, *text] == ids[: span.positions[0] + 1] + list(span.targets)
            else:
                assert list(span.targets) == tokenizer(candidate.answer, add_special_tokens=False).input_ids


def test_texts_that_are_cut_are_counted(causal_tokenizer: Any) -> None:
    encoder = Encoder(causal_tokenizer, "causal", 20)
    task = get_task("sst2")
    encoder.encode_all([task.example({"sentence": text, "label": 1}, "causal") for text in ("fine", "so " * 60, "fine " * 50)])
    assert encoder.cut == 2


def test_answers_that_are_the_same_tokens_are_refused(causal_tokenizer: Any) -> None:
    """To a tokenizer that knows neither word; their scores would be equal for ever."""
    from tokenizers import Tokenizer
    from tokenizers import models as cores
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(cores.WordLevel({"a": 0, "It": 1, "was": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), "causal", 20)
    with pytest.raises(UserError, match=r"' terrible' and ' great' are the same tokens \[3\]"):
        encoder.encode(get_task("sst2").example({"sentence": "a", "label": 1}, "causal"))
    same = Candidate("It was", " great")
    assert len(Encoder(causal_tokenizer, "causal", 20).encode(Example((same, same), 1)).spans) == 2


def test_a_tokenizer_that_ends_texts_and_begins_none(tokenizer: Any) -> None:
    """The end token is no part of a prompt that goes on."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"), "causal", 20)
    assert (encoder.before, encoder.after) == ([], [2])
    encoded = encoder.encode(get_task("sst2").example({"sentence": "fine", "label": 1}, "causal"))
    assert 2 not in encoded.inputs[0]


def test_a_tokenizer_with_dropout_cuts_a_text_the_same_way_every_time(copy: Copy) -> None:
    """Else no run could be repeated, nor resumed: its examples are other ones."""
    path = copy()
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (path / "tokenizer.json").write_text(json.dumps(content))
    lm, whole = load(path), load(copy())
    assert [note for note in lm.notes if "dropout was turned off" in note] == lm.notes != whole.notes
    texts = [row["sentence"] for row in make_rows(20, 0)]
    assert lm.tokenizer(texts).input_ids == whole.tokenizer(texts).input_ids


def test_a_tokenizer_without_words_is_refused() -> None:
    class Silent:
        mask_token_id = unk_token_id = pad_token_id = bos_token_id = eos_token_id = None
        all_special_ids: tuple[int, ...] = ()

        def __call__(self, text: Any, **_: Any) -> Any:
            class Ids:
                input_ids = [] if isinstance(text, str) else [[] for _ in text]

            return Ids

    with pytest.raises(UserError, match="changes a text's tokens"):
        Encoder(Silent(), "causal", 20)


def test_bounds_of_indices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_JSON", 9)
    (tmp_path / "config.json").write_text('{"a": "0123456789"}')
    with pytest.raises(UserError, match="it has 19 bytes, and at most 9 are read"):
        folders.check_folder(tmp_path)
