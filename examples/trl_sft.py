"""Supervised fine-tuning with TRL's trainer, by forward passes: pip install 'zo_kernels[trl]'; python examples/trl_sft.py"""

import datasets
import tiny
from zo_finetune import ZOSFTConfig, ZOSFTTrainer

model, tokenizer = tiny.causal()
rows = datasets.Dataset.from_dict({"text": tiny.TEXTS * 8})
args = ZOSFTConfig(
    "runs/trl-sft", learning_rate=1e-2, zo_eps=1e-2, zo_options={"queries": 4}, max_steps=30, per_device_train_batch_size=8, bf16=False,
    logging_steps=5, save_strategy="no", report_to="none",
)  # fmt: skip
trainer = ZOSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
trainer.train()

losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
