"""What is shipped: the packages, the source archive, the versions that are said.

Belongs here: pyproject.toml and the files beside it, as text. Does not belong here: building (`.github/workflows/wheels.yml`), and what an installed wheel
does (`tests/wheel.py`, which needs an environment of its own).
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import zo_kernels as zk

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_shipped() -> None:
    there = {
        path.parent.relative_to(at).as_posix().replace("/", ".")
        for at, name in ((ROOT, "zo_kernels"), (ROOT / "python", "zo_finetune"))
        for path in (at / name).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there


def test_the_source_archive_has_every_folder() -> None:
    grafted = re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    assert set(grafted) == {".ci", ".github", "benchmarks", "csrc", "docs", "examples", "python", "tests"}
    assert all((ROOT / name).is_dir() for name in grafted)


def test_versions_are_said_as_they_are() -> None:
    assert f"version: {zk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    page, pins = (ROOT / "docs" / "index.md").read_text(), (ROOT / "constraints.txt").read_text()
    oldest = " ".join([*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["finetune"]])
    for name in ("torch", "transformers", "peft"):
        least = re.search(rf"\b{name}>=([\d.]+)", oldest)
        pin = re.search(rf"^{name}==([\d.]+)$", pins, re.MULTILINE)
        assert least and pin and f"{name} {least[1]} or newer" in page and f"{name} {pin[1]}" in page, name


def test_workflows_run_what_is_there() -> None:
    targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        text = path.read_text()
        assert set(re.findall(r"\bmake ([\w-]+)", text)) <= set(targets), path
        for name in re.findall(r"\btests/[\w/.]+|\.ci/\w+", text):
            assert (ROOT / name).exists(), (path, name)
    assert "python -m zo_kernels" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
