from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RulePass:
    seed: int
    tags: Any
    coefs: Any
    kind: str
    rounding: str
    rule: str
    numbers: Any
    squares: Any = None


def run_rule(*a):
    raise NotImplementedError
