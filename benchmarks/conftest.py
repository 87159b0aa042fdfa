"""Options of the benchmarks that run under pytest. No fixtures, no measuring."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zo_kernels benchmarks")
    group.addoption("--weights", type=int, default=1 << 26, help="weights of the tensor that a pass goes over")
    group.addoption("--sweeps", type=int, default=5, help="how often all contenders are timed one after the other")
    group.addoption("--no-compile", action="store_true", help="leave the torch.compile contenders out")
