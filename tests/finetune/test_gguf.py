"""A GGUF file as the model: written here, loaded by its own path and as --gguf-file of a folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import model as models
from zo_finetune.config import Config
from zo_finetune.errors import UserError

WIDTH, HEADS, HIDDEN = 32, 4, 64


def write(path: Path, causal_tokenizer: Any, without: str | None = None, layers: int = 1) -> Path:
    """A random one-block Llama with the tests' tokenizer, perhaps without a tensor, or said to have more blocks."""
    import json

    import gguf

    core = json.loads(causal_tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(causal_tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in core["merges"]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in ("<s>", "<pad>", "</s>", "<mask>") else 1 for t in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "output": (len(tokens), WIDTH)}
    block = {
        "attn_norm": (WIDTH,),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    block |= {f"attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    generator = torch.Generator().manual_seed(0)
    for name, shape in [*shapes.items(), *((f"blk.0.{name}", shape) for name, shape in block.items())]:
        if name == without:
            continue
        value = torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator)
        writer.add_tensor(f"{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_path(tmp_path: Path, causal_tokenizer: Any) -> Path:
    return write(tmp_path / "tiny.gguf", causal_tokenizer)


def test_a_gguf_file_is_a_model(gguf_path: Path, causal_tokenizer: Any) -> None:
    by_path = models.load(str(gguf_path), device="cpu", peft="ln")
    in_folder = models.load(str(gguf_path.parent), gguf_file=gguf_path.name, device="cpu", peft="ln")
    text = "the film is warm It was great"
    ids = causal_tokenizer(text, add_special_tokens=False).input_ids
    for lm in (by_path, in_folder):
        assert lm.form == "causal"
        assert lm.counts()[0] == 3 * WIDTH
        assert lm.tokenizer(text, add_special_tokens=False).input_ids == ids
    with torch.no_grad():
        a, b = (lm.model(input_ids=torch.tensor([ids])).logits for lm in (by_path, in_folder))
    assert torch.equal(a, b)
    assert a.std() > 0.1


@torch.no_grad()
def test_all_of_its_weights_can_be_trained_and_saved(gguf_path: Path, tmp_path: Path) -> None:
    lm = models.load(str(gguf_path), device="cpu", train_blocks="last:1")
    for p in lm.model.parameters():
        if p.requires_grad:
            p += 0.1
    again = models.load(str(lm.save(tmp_path)), device="cpu")
    saved, read = dict(lm.model.named_parameters()), dict(again.model.named_parameters())
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    ids = torch.arange(8)[None]
    assert torch.equal(lm.model(input_ids=ids).logits, again.model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["blk.0.ffn_down", "token_embd", "output_norm"])
def test_a_gguf_file_without_a_tensor_is_refused(name: str, tmp_path: Path, causal_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"tiny\.gguf lacks \d tensors of LlamaForCausalLM: .*(down_proj|embed_tokens|model\.norm)"):
        models.load(str(write(tmp_path / "tiny.gguf", causal_tokenizer, without=name)), device="cpu")


def test_a_gguf_file_cut_short_or_with_other_numbers_is_refused(gguf_path: Path, tmp_path: Path, causal_tokenizer: Any) -> None:
    whole = gguf_path.read_bytes()
    for cut in (20, len(whole) // 2, len(whole) - 100):
        gguf_path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"tiny\.gguf"):
            models.load(str(gguf_path), device="cpu")
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        models.load(str(write(tmp_path / "tiny.gguf", causal_tokenizer, layers=2)), device="cpu")
    with pytest.raises(UserError, match="'num_hidden_layers' is 2000000000"):
        models.load(str(write(tmp_path / "tiny.gguf", causal_tokenizer, layers=2_000_000_000)), device="cpu")


def test_a_gguf_file_beside_another_is_named_once(gguf_path: Path, tmp_path: Path) -> None:
    """Which of the two is meant is the user's to say."""
    shutil.copy(gguf_path, tmp_path / "other.gguf")
    config = Config(model=str(gguf_path), task="sst2", data="absent", output="o", gguf_file="other.gguf")
    with pytest.raises(UserError, match=r"--gguf-file 'other\.gguf': --model .*tiny\.gguf is a GGUF file itself"):
        config.check_use()
    for good in (replace(config, gguf_file="tiny.gguf"), replace(config, gguf_file=None), replace(config, model=str(tmp_path))):
        good.check_use()
