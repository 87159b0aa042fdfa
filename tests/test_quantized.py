"""Adapters on packed bases, and their scales: trained, recorded, gone on with and replayed; another base is refused, one that has run is not.

Belongs here: models that bitsandbytes and torchao packed, on the CPU. Does not belong here: `zo-finetune train --quantize` (tests/finetune/test_quantize.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as tf
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import zo_kernels as zk
from zo_kernels import journal, quantized

IDS = torch.arange(16).reshape(2, 8)


def llama(seed: int = 1) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, max_position_embeddings=16)).eval()


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """With other modules in the place of the linear ones but the head, as transformers puts them there."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(module))
    return model


def four_bits(linear: nn.Linear, nested: bool = False) -> nn.Module:
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, False, torch.float32, compress_statistics=nested, quant_type="nf4"
    )
    made.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=made
    )
    return made.to("cpu")  # which packs it


def eight_bits(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def torchao(model: nn.Module, config: Any) -> nn.Module:
    quantize_(model.model, config)
    return model


BASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": lambda m: replaced(m, four_bits),
    "nf4, scales packed": lambda m: replaced(m, lambda linear: four_bits(linear, True)),
    "int8 of bitsandbytes": lambda m: replaced(m, eight_bits),
    "int8 of torchao": lambda m: torchao(m, Int8WeightOnlyConfig(version=2)),
    "int4 of torchao": lambda m: torchao(m, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


def adapted(base: str, seed: int = 1) -> Any:
    model = BASES[base](llama(seed))
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, lora_dropout=0.0)).eval()


def loss_of(model: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=IDS, labels=IDS).loss


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def repacked(model: nn.Module) -> nn.Module:
    """As after a forward on a processor with AVX512-BF16, which keeps 4 bits in a layout of its own."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )
    return model


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_trains_is_recorded_goes_on_and_replays(tmp_path: Path, base: str) -> None:
    model, path = adapted(base), tmp_path / "run.zoj"
    before = trained(model)
    step = zk.MeZOStep(model, lr=1e-2, eps=1e-2, seed=3, journal=path)
    for _ in range(4):
        step.step(loss_of(model))
    step.close_journal()
    assert all("lora_" in name for name in before)
    assert all(not torch.equal(p, before[n]) for n, p in trained(model).items())
    loss_of(again := adapted(base))()  # it was evaluated, in whatever layout that leaves it
    zk.MeZOStep(again, lr=1e-2, eps=1e-2, seed=3, journal=path, resume=True).close_journal()
    zk.replay(replayed := adapted(base), path)
    for other in (again, replayed):
        assert all(torch.equal(p, trained(other)[n]) for n, p in trained(model).items())
    recorded = {p.name.removeprefix("base_model.model.") for p in journal.read(path).header.frozen}
    assert any(".q_proj.base_layer.weight." in name for name in recorded) and "model.embed_tokens.weight" in recorded


@pytest.mark.parametrize("base", BASES)
def test_another_base_is_refused(tmp_path: Path, base: str) -> None:
    """One of other weights, and one whose scales alone are others."""
    zk.MeZOStep(adapted(base), lr=1e-2, eps=1e-2, seed=3, journal=tmp_path / "run.zoj").close_journal()
    other = adapted(base, seed=2)
    scaled = adapted(base)
    weight: Any = scaled.base_model.model.model.layers[0].self_attn.k_proj.weight
    kind = quantized.library(weight)
    if kind == "bitsandbytes-4bit":
        (weight.quant_state.state2 or weight.quant_state).absmax[0] *= 2
    elif kind == "bitsandbytes-8bit":
        weight.SCB[0] *= 2
    else:
        weight.scale[0] *= 2
    for model in (other, scaled, llama()):
        with pytest.raises(ValueError, match="the model is not the one that this run started from"):
            zk.replay(model, tmp_path / "run.zoj")


@pytest.mark.parametrize("base", ["nf4", "nf4, scales packed"])
def test_the_layout_of_a_processor_is_no_other_base(tmp_path: Path, base: str) -> None:
    model = adapted(base)
    zk.MeZOStep(model, lr=1e-2, eps=1e-2, seed=3, journal=tmp_path / "run.zoj").close_journal()
    zk.replay(repacked(adapted(base)), tmp_path / "run.zoj")
    other = repacked(adapted(base))
    other.base_model.model.model.layers[0].self_attn.k_proj.weight.data[3, 5] ^= 1
    with pytest.raises(ValueError, match=r"k_proj\.weight\.codes.* has other values"):
        zk.replay(other, tmp_path / "run.zoj")


def test_a_first_forward_takes_the_scales_of_eight_bits(tmp_path: Path) -> None:
    """And they are looked for where they are then."""
    fresh, run = adapted("int8 of bitsandbytes"), adapted("int8 of bitsandbytes")
    loss_of(run)()
    names = [n for n, _ in quantized.spread(fresh.named_parameters(), fresh)]
    assert names == [n for n, _ in quantized.spread(run.named_parameters(), run)]
    assert sum(name.endswith("weight.scales") for name in names) == 7


SCALES = {"nf4": "absmax", "int8 of bitsandbytes": "SCB", "int8 of torchao": "scale", "int4 of torchao": "scale"}


@pytest.mark.parametrize("base", SCALES)
def test_scales_alone_are_trained(tmp_path: Path, base: str) -> None:
    """QZO: codes stay, scales move as a hand-written loop moves them, and the run is recorded and replayed."""
    model, other = BASES[base](llama()), BASES[base](llama())
    parts = {n: t.clone() for n, t in quantized.spread(model.named_parameters(), model)}
    scales = zk.quantized_scales(model)
    assert len(scales) == 7 and all(n.endswith(f".weight.{SCALES[base]}") for n, _ in scales)
    path, start = tmp_path / "run.zoj", [t.detach().clone() for _, t in scales]
    step = zk.MeZOStep(scales, lr=1e-6, eps=1e-4, seed=3, model=model, perturbation="inplace", clip=100.0, journal=path)
    streams = [step.stream_of(n) for n, _ in scales]
    losses = [float(step.step(loss_of(model))) for _ in range(3)]
    step.close_journal()
    assert len(set(losses)) == 3 and all(not torch.equal(t, s) for (_, t), s in zip(scales, start, strict=True))
    for name, part in quantized.spread(model.named_parameters(), model):
        assert torch.equal(part, parts[name]) or name.endswith((".scale", ".scales")), name

    tensors = [t for _, t in zk.quantized_scales(other)]
    for k in range(3):
        seen = []
        for c in (1e-4, -2e-4):
            zk.perturb_(tensors, [(k, c)], seed=3, streams=streams)
            with torch.no_grad():
                seen.append(float(loss_of(other)().double()))
        g = max(-100.0, min(100.0, (seen[0] - seen[1]) / 2e-4))
        zk.perturb_(tensors, [(k, 1e-4 - 1e-6 * g)], seed=3, streams=streams)
    assert all(torch.allclose(a, b, rtol=1e-5) for (_, a), b in zip(scales, tensors, strict=True))

    zk.replay(replayed := BASES[base](llama()), path)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(scales, zk.quantized_scales(replayed), strict=True))
    with pytest.raises(ValueError, match="other values"):
        zk.replay(model, path)


def test_scales_that_are_not_there_are_named() -> None:
    for model in (llama(), BASES["nf4, scales packed"](llama()), repacked(BASES["nf4"](llama()))):
        with pytest.raises(ValueError, match=r"no quantisation scale in floating point.*before its first forward"):
            zk.quantized_scales(model)


def test_a_forward_does_not_replace_scales_that_are_trained() -> None:
    model = BASES["nf4"](llama())
    linear = model.model.layers[0].mlp.up_proj
    linear.support_avx512bf16_for_cpu = True
    zk.quantized_scales(model)
    assert linear.support_avx512bf16_for_cpu is False


def test_matrices_that_a_processors_layout_cannot_hold_are_trained_on() -> None:
    """bitsandbytes would bring them into it at the first forward of a step, and fail: rows of 32, columns of 64."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False), nn.Linear(64, 48, bias=False))
    packed: Any = nn.Sequential(*(four_bits(linear) for linear in model), nn.Linear(48, 4)).eval()
    for linear in packed[:3]:
        linear.support_avx512bf16_for_cpu = True
    step = zk.MeZOStep(packed, lr=1e-2, eps=1e-2)
    assert [linear.support_avx512bf16_for_cpu for linear in packed[:3]] == [True, False, False]
    before = packed[3].weight.clone()
    packed[0].support_avx512bf16_for_cpu = False  # whose layout needs the processor
    step.step(lambda: packed(torch.ones(2, 64)).square().mean())
    assert not torch.equal(packed[3].weight, before)


def test_a_packed_weight_is_known_by_its_type() -> None:
    plain = llama()
    assert {quantized.library(p) for p in plain.parameters()} == {""} and quantized.parts(plain.lm_head.weight) == {}
    assert quantized.library(bnb.nn.Params4bit(torch.zeros(4, 4), requires_grad=False)) == ""  # not packed yet
    step = zk.MeZOStep(copy.deepcopy(adapted("nf4")), lr=1e-2, eps=1e-2)
    assert all("lora_" in n for g in step.param_groups for n in g["param_names"])
