"""Names and streams."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zo_kernels as zk
from tests.optim.models import make
from zo_kernels import parameters


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("module.model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("_orig_mod.module.w", "w"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_A.default.weight"),
        ("weight", "weight"),
        ("submodule.weight", "submodule.weight"),
        ("module", "module"),
    ],
)
def test_canonical_names(name: str, bare: str) -> None:
    assert parameters.canonical_name(name) == bare


def test_the_stream_is_a_stable_hash() -> None:
    """A known answer, sha256(b"weight")[:4], little-endian. It may never change: runs depend on it."""
    assert zk.stream_of("weight") == int.from_bytes(bytes.fromhex("0844df8f"), "little")
    assert zk.stream_of("model.layers.0.q_proj.weight") == zk.stream_of("model.layers.0.q_proj.weight")


def test_collisions_are_resolved_the_same_way_whatever_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = parameters.stream_of
    monkeypatch.setattr(parameters, "stream_of", lambda name: 7 if name in ("a", "b") else real(name))
    table = parameters.streams_of(["b", "c", "a"])
    assert table["a"] == 7
    assert table["b"] == real("b#1")
    assert table["c"] == real("c")


def test_no_two_parameters_of_a_large_model_share_a_stream() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.{k}.weight" for i in range(32) for j in range(64) for k in ("w1", "w2", "w3")]
    table = parameters.streams_of(names)
    assert len(set(table.values())) == len(names) == 6144


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "qwen", "roberta"])
def test_no_decay_finds_every_bias_and_norm_by_class(family: str) -> None:
    """Name lists miss Llama's and Qwen's `norm` and GPT-2's `ln_1`."""
    model = make(family)
    skip = parameters.no_decay(model)
    for name, p in model.named_parameters():
        assert (id(p) in skip) == (p.ndim == 1), name


def test_tied_weights_are_one_parameter() -> None:
    model = make("llama-tied")
    pairs = parameters.trainable(model)
    assert len({id(p) for _, p in pairs}) == len(pairs)
    assert "lm_head.weight" not in dict(pairs)


def test_base_model_and_peft_model_share_noise() -> None:
    """The same base weight has the same name, so the same stream, with an adapter around it."""
    bare = parameters.streams_of(n for n, _ in make("llama").named_parameters())
    lora = make("lora")
    for name, _ in lora.named_parameters():
        if "lora_" not in name:
            assert parameters.stream_of(parameters.canonical_name(name)) == bare[parameters.canonical_name(name)]


def test_groups_need_names_once_added() -> None:
    m = nn.Linear(2, 2)
    step = zk.MeZOStep([("weight", m.weight)], lr=0.1)
    step.add_param_group({"params": [("bias", m.bias)], "lr": 0.5})
    before = m.bias.detach().clone()
    values = iter([1.0, 0.0])
    step.step(lambda: next(values))
    z = zk.normal(2, seed=0, stream=zk.stream_of("bias"), tag=0)
    assert torch.allclose(m.bias, before - 0.5 * 500 * z, rtol=1e-4)
