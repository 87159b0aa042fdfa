"""The step rules: what to evaluate, and which terms the update is made of. Arithmetic on weights belongs to `zo_kernels.ops`."""

from zo_kernels.optim.mezo import MeZOStep

__all__ = ["MeZOStep"]
