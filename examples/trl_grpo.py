"""Any Python function as a reward, with TRL's GRPO trainer, by forward passes: pip install 'zo_kernels[trl]'; python examples/trl_grpo.py

A step generates a group of answers to each prompt once; every one of its forwards weighs their log-probabilities by rewards relative to their group.
"""

import datasets
import tiny
from zo_finetune import ZOGRPOConfig, ZOGRPOTrainer


def says_good(completions: list[str], **columns: list) -> list[float]:
    return [float(text.split().count("good")) for text in completions]


model, tokenizer = tiny.causal()
prompts = datasets.Dataset.from_dict({"prompt": ["the film is", "it was", "the film was", "it is"] * 30})
args = ZOGRPOConfig(
    "runs/trl-grpo", learning_rate=3e-2, zo_eps=1e-2, zo_options={"queries": 8}, max_steps=12, per_device_train_batch_size=32, num_generations=8,
    max_completion_length=4, bf16=False, logging_steps=3, save_strategy="no", report_to="none",
)  # fmt: skip
trainer = ZOGRPOTrainer(model=model, args=args, train_dataset=prompts, processing_class=tokenizer, reward_funcs=says_good)
trainer.train()

rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
