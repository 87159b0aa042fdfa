"""setup.py: what is compiled with which flags, what a missing tool says, and what a wheel carries.

Belongs here: the build. Does not belong here: what the compiled code computes.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zo_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def compiler_for(path: Path, machine: str) -> str:
    """A compiler that knows its target and compiles nothing."""
    return script(path, f'[ "$1" = -dumpmachine ] && echo {machine} && exit 0\necho cannot compile >&2; exit 1\n')


def test_instruction_sets_have_their_own_flags(setup: ModuleType, tmp_path: Path) -> None:
    text = setup.ninja_file(tmp_path, tmp_path / "_C.so", [compiler_for(tmp_path / "c++", "x86_64-linux-gnu")], None)
    compile_of = dict(re.findall(r"^build .*/(\S+)\.o: .*\n  compile = (.*)$", text, re.M))
    assert "-mavx512f" in compile_of["perturb_avx512.cpp"]
    assert "-mavx2" in compile_of["perturb_avx2.cpp"]
    for source in ("perturb.cpp", "perturb_portable.cpp", "module.cpp"):
        assert "-mavx" not in compile_of[source], source
    for source, command in compile_of.items():
        assert "-ffp-contract=off" in command, source
        assert "-ffast-math" not in command, source
    assert "ZO_WITH_CUDA" not in text


def test_other_processors_compile_portable_code_only(setup: ModuleType, tmp_path: Path) -> None:
    text = setup.ninja_file(tmp_path, tmp_path / "_C.so", [compiler_for(tmp_path / "c++", "aarch64-linux-gnu")], None)
    assert "perturb_portable.cpp" in text
    assert "perturb_avx" not in text
    assert "-mavx" not in text


def test_cuda_modes(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = script(tmp_path / "toolkit" / "bin" / "nvcc", "exit 1\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    for mode, expected in (("auto", nvcc), ("1", nvcc), ("0", None)):
        monkeypatch.setenv("ZO_KERNELS_CUDA", mode)
        assert setup.pick_nvcc() == expected
    monkeypatch.setenv("ZO_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes' must be auto, 0 or 1"):
        setup.pick_nvcc()
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.setenv("ZO_KERNELS_CUDA", "auto")
    assert setup.pick_nvcc() is None
    monkeypatch.setenv("ZO_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="set CUDA_HOME; ZO_KERNELS_CUDA=0 builds without"):
        setup.pick_nvcc()


@pytest.mark.parametrize(
    ("known", "newest"), [("compute_80\\ncompute_90", "90"), ("compute_80\\ncompute_90\\ncompute_100\\ncompute_103", "100")]
)
def test_every_gpu_that_nvcc_knows_has_its_own_code(setup: ModuleType, tmp_path: Path, known: str, newest: str) -> None:
    """PTX is compiled at the first use, which takes as long as this build: only what is newer than all of these runs from it."""
    nvcc = script(tmp_path / "nvcc", f'[ "$1" = --list-gpu-arch ] && printf "{known}\\n"\n')
    text = setup.ninja_file(tmp_path, tmp_path / "_C.so", [compiler_for(tmp_path / "c++", "x86_64-linux-gnu")], nvcc)
    codes = re.findall(r"-gencode=arch=compute_(\d+),code=(\w+)_\1", next(line for line in text.splitlines() if "-gencode" in line))
    real = sorted({"80", "90", newest}, key=int)
    assert codes == [*((a, "sm") for a in real), (newest, "compute")]


def test_headers_of_torch_serve_where_pybind11_is_missing(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else find(name))
    assert "torch" in setup.pybind11_include()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install pybind11"):
        setup.pybind11_include()


@pytest.mark.parametrize("cuda", [False, True])
def test_a_failing_compiler_is_an_error_with_a_remedy(tmp_path: Path, cuda: bool) -> None:
    """Under auto, an nvcc that was found and fails does not silently give a build without CUDA."""
    script(tmp_path / "toolkit" / "bin" / "nvcc", "exit 1\n")
    env = os.environ | {"CXX": compiler_for(tmp_path / "c++", "x86_64-linux-gnu"), "CUDA_HOME": str(tmp_path / "toolkit")}
    env["ZO_KERNELS_CUDA"] = "auto" if cuda else "0"
    command = [sys.executable, "setup.py", "-q", "build_ext", "-t", str(tmp_path / "temp"), "-b", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "compiling zo_kernels._C failed" in done.stderr
    assert ("ZO_KERNELS_CUDA=0 builds without CUDA" in done.stderr) == cuda


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """From a folder with a space in its name, offline: the wheel carries the extension and both packages, works without a GPU, and
    a changed header is noticed by the next build."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler")
    tree = tmp_path / "a copy"
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.so", "*.egg-info", "tests", "benchmarks")
    shutil.copytree(ROOT, tree, ignore=skip)
    quick = script(
        tmp_path / "c++", f'exec {os.environ.get("CXX", "c++")} "$@" -O0\n'
    )  # optimizing would be most of the test's time
    env = os.environ | {"ZO_KERNELS_CUDA": "0", "CXX": quick}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "-w", str(tmp_path), str(tree)], env=env, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert any(re.fullmatch(r"zo_kernels/_C\..*", name) for name in names)
    for folder in (ROOT / "zo_kernels", ROOT / "python" / "zo_finetune"):
        for file in folder.rglob("*.py"):
            assert f"{folder.name}/{file.relative_to(folder).as_posix()}" in names
    check = "import zo_kernels as zk; print(zk.__file__, zk.normal(3, seed=0, stream=0, tag=0, backend='cpu'))"
    env["PYTHONPATH"] = str(tmp_path / "installed")
    done = subprocess.run([sys.executable, "-c", check], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(tmp_path / "installed") in done.stdout

    build = [sys.executable, "setup.py", "build_ext"]
    del env["PYTHONPATH"]
    unchanged = subprocess.run(build, cwd=tree, env=env, capture_output=True, text=True, check=True).stdout
    assert "no work to do" in unchanged
    os.utime(tree / "csrc" / "cpu" / "simd.h")
    (file,) = (tree / "build").rglob("build.ninja")
    dry = [sys.executable, "-m", "ninja", "-n", "-v", "-C", str(file.parent)]  # what it would compile
    changed = subprocess.run(dry, env=env, capture_output=True, text=True, check=True).stdout
    compiled = set(re.findall(r"(perturb_\w+)\.cpp\b(?!\.o)", changed))  # the linker is given all objects
    assert ("perturb_avx2" in compiled) == (platform.machine() in ("x86_64", "AMD64"))
    assert "perturb_portable" not in compiled
