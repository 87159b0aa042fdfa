"""A GGUF file as the model: written here, loaded by its own path and as --gguf-file of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zo_finetune import model as models

WIDTH, HEADS, HIDDEN = 32, 4, 64


@pytest.fixture
def gguf_path(tmp_path: Path, causal_tokenizer: Any) -> Path:
    """A random one-block Llama with the tests' tokenizer."""
    import json

    import gguf

    core = json.loads(causal_tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(causal_tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in core["merges"]]
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
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
        value = torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator)
        writer.add_tensor(f"{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
