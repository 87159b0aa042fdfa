"""An adapter on a base in 8 bits, its journal, and the adapter made again from it: pip install 'zo_kernels[quantized]'; python examples/quantized_base.py

In 4 bits: `from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))`.
"""

import pathlib

import peft
import tiny
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import zo_kernels as zk


def adapted() -> tuple[torch.nn.Module, object]:
    base, tokenizer = tiny.causal()
    quantize_(base.model, Int8WeightOnlyConfig())
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4)).eval(), tokenizer


pathlib.Path("runs").mkdir(exist_ok=True)
model, tokenizer = adapted()
batch = tokenizer(tiny.TEXTS, padding=True, return_token_type_ids=False, return_tensors="pt")
batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
step = zk.MeZOStep(model, lr=1e-1, eps=1e-2, queries=4, seed=0)
step.open_journal("runs/quantized.zoj", replace=True)
losses = [float(step.step(lambda: model(**batch).loss)) for _ in range(40)]
step.close_journal()

again, _ = adapted()
zk.replay(again, "runs/quantized.zoj")  # another base, or one that was packed otherwise, is refused
trained = [(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True) if a.requires_grad]
assert trained and all(torch.equal(a, b) for a, b in trained)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
