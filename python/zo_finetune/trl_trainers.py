"""TRL's trainers with zeroth-order training steps.

Belongs here: their classes with `ZOTrainerMixin`, and what of TRL's losses is meant for backpropagation alone. Does not belong here: what every trainer needs
(trainer.py). TRL is loaded with this file, which `zo_finetune` loads when it is asked for one of its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

try:
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f"ZOSFTTrainer and ZOGRPOTrainer are TRL's trainers, which cannot be loaded ({error}): pip install 'zo_kernels[trl]'"
    ) from error

from zo_finetune.trainer import ARGUMENTS, ZOArguments, ZOTrainerMixin, dropout_off

# A factor that TRL holds constant in the backward pass (by detach) moves with the weights in a difference of two losses, whose slope is then another's.
_HELD = "it weighs a token by the model's own probability, which only backpropagation can hold constant"
_CHOSEN = "which tokens count would be chosen anew at each of a step's points, and the difference of two losses would be that of two choices"


def _refuse(args: Any, wrong: Mapping[str, tuple[Any, str]]) -> None:
    for name, (usual, why) in wrong.items():
        if (given := getattr(args, name)) != usual:
            raise ValueError(f"{name}={given!r} with zeroth-order steps: {why}; leave it at {usual!r}")


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):  # type: ignore[misc]
    __doc__ = f"""`trl.SFTConfig` with the arguments of a zeroth-order step.

    {ARGUMENTS}
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "dft":
            raise ValueError(f"loss_type='dft' with zeroth-order steps: {_HELD}; take 'nll'")


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` whose training steps are zeroth-order: forward passes only. See `ZOTrainerMixin`, and docs/trainer.md.

    Args:
        args: `ZOSFTConfig`. Everything else is TRL's.
    """


@dataclass
class ZOGRPOConfig(ZOArguments, GRPOConfig):  # type: ignore[misc]
    __doc__ = f"""`trl.GRPOConfig` with the arguments of a zeroth-order step.

    {ARGUMENTS}
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type in ("cispo", "vespo"):
            raise ValueError(
                f"loss_type={self.loss_type!r} with zeroth-order steps: {_HELD}; take 'dapo', 'grpo', 'dr_grpo' or another"
            )
        _refuse(
            self,
            {
                "top_entropy_quantile": (1.0, _CHOSEN),
                "off_policy_mask_threshold": (None, _CHOSEN),
                "use_adaptive_entropy": (False, "the coefficient would change between the points of a step"),
                "use_transformers_continuous_batching": (False, "it casts the weights themselves"),
            },
        )


class ZOGRPOTrainer(ZOTrainerMixin, GRPOTrainer):
    """`trl.GRPOTrainer` whose training steps are zeroth-order: answers are generated and scored once, by the weights that a step begins with, and each of its
    points weighs their log-probabilities. See `ZOTrainerMixin`, and docs/trainer.md.

    Args:
        args: `ZOGRPOConfig`. Everything else is TRL's.
    """

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Theirs, without dropout as the steps are, and always with the answers' log-probabilities. Theirs leaves these out where a step's only forward is at
        the weights that generated: it takes that forward's own, and a loss of ratios to itself is the same number at every point."""
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self.zo_step.flush()
        with dropout_off(self.model):
            found = super()._generate_and_score_completions(inputs)
            if "old_per_token_logps" not in found:
                found["old_per_token_logps"] = self._log_probs(found)
        return found

    def _log_probs(self, found: Mapping[str, Any]) -> torch.Tensor:
        """[answers, tokens], as `_compute_loss` has them."""
        ids = torch.cat([found["prompt_ids"], found["completion_ids"]], dim=1)
        mask = torch.cat([found["prompt_mask"], found["completion_mask"]], dim=1)
        beside = {
            name: found[name] for name in signature(self._get_per_token_logps_and_entropies).parameters if name in found
        }  # of images
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                self.model, ids, mask, found["completion_ids"].size(1), batch_size=self.args.per_device_train_batch_size, **beside
            )[0]
