"""Builds the extension `zo_kernels._C` with ninja: pybind11, no torch.

Belongs here: which sources are compiled with which flags. Does not belong here: names, versions, dependencies (pyproject.toml).

ninja rather than setuptools' compiler, because every instruction set needs its own flags and nvcc compiles beside them; header
changes are seen through the compilers' own dependency files. CMake through scikit-build-core says the same in half the lines and builds as
fast, but needs packages that machines without a network do not have, and can say nothing of its own when a compiler fails.

    ZO_KERNELS_CUDA   auto (default): compile CUDA if nvcc is found; 1: a missing nvcc is an error; 0: never
    CXX, CUDA_HOME, MAX_JOBS   compiler, CUDA toolkit, parallel compilations
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# -ffp-contract=off: the contract's products round by themselves. -fno-math-errno, -fno-trapping-math: let loops vectorise;
# neither changes a result. Never -ffast-math: it reassociates and flushes subnormals.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra"]
X86_FLAGS = {
    "perturb_avx2": ["-mavx2", "-mfma", "-mf16c"],
    # The intrinsics' own headers trip these two warnings in gcc 12 (gcc bug 105593).
    "perturb_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
    ],
}
NVCC_FLAGS = ["-O3", "--std=c++17", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the usual place."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if os.environ.get("CUDA_HOME") else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(p) for p in places if os.access(p, os.X_OK)), None)


def pick_nvcc() -> str | None:
    """The nvcc to use, or None: what ZO_KERNELS_CUDA asks for."""
    mode = os.environ.get("ZO_KERNELS_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ZO_KERNELS_CUDA={mode!r} must be auto, 0 or 1")
    nvcc = None if mode == "0" else find_nvcc()
    if mode == "1" and nvcc is None:
        raise SystemExit(
            "ZO_KERNELS_CUDA=1, but nvcc was found neither in CUDA_HOME, nor on PATH, nor in /usr/local/cuda: install the CUDA "
            "toolkit or set CUDA_HOME; ZO_KERNELS_CUDA=0 builds without CUDA"
        )
    return nvcc


def gpu_flags(nvcc: str) -> list[str]:
    """SASS for A100, for H100/H200 and, where nvcc knows it, for B200; PTX of the newest of these for whatever comes after."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    archs = ["80", "90", *(["100"] if "compute_100" in known else [])]
    return [f"-gencode=arch=compute_{a},code={b}_{a}" for a, b in (*((a, "sm") for a in archs), (archs[-1], "compute"))]


def pybind11_include() -> str:
    """The headers of the pybind11 package, or those that torch carries (an offline machine has at least these)."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)  # does not import it
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / "include"
            if (include / "pybind11" / "pybind11.h").exists():
                return str(include)
    raise SystemExit("the headers of pybind11 are missing: pip install pybind11")


def ninja_program() -> list[str]:
    """The command of the ninja package, or of the machine's ninja."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    if (found := shutil.which("ninja")) is None:
        raise SystemExit("ninja is missing: pip install ninja")
    return [found]


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_file(objects: Path, target: Path, cxx: list[str], nvcc: str | None) -> str:
    """The text of build.ninja: every source of csrc with the flags of its kind, linked into `target`."""
    includes = [f"-I{CSRC}", f"-isystem{pybind11_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    machine = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    x86 = machine.startswith("x86_64")
    cuda_sources = sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []
    define = ["-DZO_WITH_CUDA"] if cuda_sources else []
    lines = ["rule cxx", "  command = $compile -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    lines += ["  description = $label", "rule link", "  command = $link $in -o $out", "  description = link $out"]
    outputs = []

    def compile_one(source: Path, command: list[str]) -> None:
        out = objects / f"{source.name}.o"
        outputs.append(ninja_path(out))
        lines.append(f"build {outputs[-1]}: cxx {ninja_path(source)}")
        lines.append(f"  compile = {ninja_command(command)}")
        lines.append(f"  label = {source.relative_to(ROOT)}")

    for source in sorted([CSRC / "module.cpp", *(CSRC / "cpu").glob("*.cpp")]):
        isa = X86_FLAGS.get(source.stem)
        if isa is None or x86:
            compile_one(source, [*cxx, *CXX_FLAGS, *WARNINGS, *(isa or []), *define, *includes])
    for source in cuda_sources:
        assert nvcc is not None
        compile_one(source, [nvcc, *NVCC_FLAGS, *gpu_flags(nvcc), "-ccbin", cxx[0], f"-I{CSRC}"])
    # nvcc as the linker knows where its own static cudart lies, which looks for libcuda only when it is first called.
    linker = [str(nvcc), "-shared", "-cudart", "static", "-ccbin", cxx[0]] if cuda_sources else [*cxx, "-shared", "-pthread"]
    lines.append(f"build {ninja_path(target)}: link {' '.join(outputs)}")
    lines.append(f"  link = {ninja_command(linker)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """`build_ext` that writes build.ninja and calls ninja; setuptools still decides where the extension goes."""

    def build_extension(self, ext: Extension) -> None:
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(cxx[0]) is None:
            raise SystemExit(f"the C++ compiler {cxx[0]!r} was not found: install one (g++ or clang++) or set CXX")
        nvcc = pick_nvcc()
        print(f"CUDA: {'compiled with ' + nvcc if nvcc else 'not compiled (no nvcc, or ZO_KERNELS_CUDA=0)'}", flush=True)
        (objects / "build.ninja").write_text(ninja_file(objects, target, cxx, nvcc))
        command = [*ninja_program(), "-C", str(objects)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if self.verbose > 1:
            command.append("-v")
        if subprocess.run(command).returncode:
            remedy = "; if it was nvcc that failed, ZO_KERNELS_CUDA=0 builds without CUDA" if nvcc else ""
            raise SystemExit(f"compiling zo_kernels._C failed, see the messages above{remedy}")


def main() -> None:
    """Sources and headers are listed for the source distribution; what is compiled is `ninja_file`'s business."""
    sources = [CSRC / "module.cpp", *CSRC.glob("cpu/*.cpp"), *CSRC.glob("cuda/*.cu")]
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    extension = Extension(
        "zo_kernels._C",
        sources=sorted(str(p.relative_to(ROOT)) for p in sources),
        depends=sorted(str(p.relative_to(ROOT)) for p in headers),
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": NinjaBuild})


if __name__ == "__main__":  # the tests import this file
    main()
