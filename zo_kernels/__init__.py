"""Fine-tune large language models with forward passes only, with noise regenerated from a seed. The public names, nothing else."""

from zo_kernels._backends import backends
from zo_kernels.ops import RandomMask, normal, pack_mask, perturb_

__all__ = ["RandomMask", "backends", "normal", "pack_mask", "perturb_"]
