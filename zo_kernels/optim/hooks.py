"""What torch puts around an optimizer's step: hooks, and a range in a profile.

Belongs here: when they are called. Does not belong here: the step (step.py), the hooks of a lazy optimizer's module (lazy.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as _everybodys_after
from torch.optim.optimizer import _global_optimizer_pre_hooks as _everybodys_before

P = ParamSpec("P")
T = TypeVar("T")


def around(func: Callable[P, T]) -> Callable[P, T]:
    """`torch.optim.Optimizer.profile_hook_step`, whose range takes as long as a decision of a small model: where there is a hook, or a profile."""
    watched = torch.optim.Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(*args: P.args, **kwargs: P.kwargs) -> T:
        its: Any = args[0]
        hooks = its._optimizer_step_pre_hooks or its._optimizer_step_post_hooks or _everybodys_before or _everybodys_after
        return (watched if hooks or torch.autograd._profiler_enabled() else func)(*args, **kwargs)

    return step
