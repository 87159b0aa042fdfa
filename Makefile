# make demo   fine-tune a real model on real labelled text (sets up .venv first), results in runs/demo
# make test   set up .venv and run the tests
# make lint   ruff, mypy, clang-format
# make bench  the benchmarks that fit this machine, as CSV and figures
# make compare MODEL=PATH DATA=PATH   the comparison of docs/algorithms.md, with a model and SST-2 of your own
# make fuzz  feed the readers RUNS broken inputs each (with atheris where it is installed: pip install -e '.[fuzz]')
# make mutants   plant each wrong line of tests/mutants.py in a copy and see its tests fail
# make sanitize   the CPU kernels' parity tests under AddressSanitizer and UBSan (minutes; gcc)
# make crash-test   end RUNS runs by kills, signals and exceptions at random moments, resume each, compare its weights with an undisturbed run's
# make cluster-test   RUNS runs of workers that share their steps, of which one is killed at a random moment and another number goes on; each ends in the bits of one process
# make docs   the pages of docs/ as a site in build/site, with a reference made from the docstrings (installs mkdocs into .venv the first time)
# make wheel-check   a wheel made from the source archive, in clean environments without a compiler, with the newest and the oldest packages (gigabytes in build/wheel-check)
# make claims   every figure of README and docs with its row, test or line of code; fails on one without
# make sass   instruction counts of the GPU kernels, as CSV (no GPU needed)
# make gpu-check   everything that only a GPU can show, with the Python that has torch for it: make gpu-check PYTHON=python3 OUT=FOLDER STAGES="smoke steps"
#
# Where a recipe sets up: .venv is made from $(BASE) and the pins of constraints.txt. VENV=0 uses $(PYTHON) as it is.

BASE ?= python3
VENV ?= .venv
ifeq ($(VENV),0)
PYTHON ?= python3
READY :=
else
PYTHON ?= $(VENV)/bin/python
READY := $(VENV)/.ready
endif
PYTEST := $(PYTHON) -m pytest
CLANG_FORMAT ?= $(dir $(PYTHON))clang-format
OUT ?= benchmarks/results


.PHONY: demo test lint format bench compare fuzz mutants crash-test cluster-test sanitize wheel-check claims docs sass gpu-check clean

demo: $(READY)
	$(PYTHON) -m zo_finetune demo --output runs/demo --overwrite

test: export PYTHONDONTWRITEBYTECODE := # what one process compiled, forty others need not
test: $(READY)
	$(PYTEST) -n logical --maxprocesses 8 --dist worksteal -m "not gpu" tests

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(READY)
	$(PYTHON) benchmarks/run.py --out $(OUT)

compare: $(READY)
	nice $(PYTHON) benchmarks/compare.py --model $(MODEL) --data $(DATA) --out $(OUT)/compare.csv --figures docs/figures --page docs/algorithms.md

fuzz: RUNS ?= 100000
fuzz: $(READY)
	nice $(PYTHON) -m tests.fuzz.run --runs $(RUNS)

mutants: $(READY)
	nice env OMP_NUM_THREADS=1 $(PYTHON) -m tests.mutants $(WORDS)

crash-test: RUNS ?= 200
crash-test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.crash --runs $(RUNS)

cluster-test: RUNS ?= 50
cluster-test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.cluster --runs $(RUNS)

sanitize: $(READY)
	nice tests/kernels/sanitize.sh $(PYTHON)

wheel-check: WHICH ?= newest oldest
wheel-check: $(READY)
	nice tests/wheel_check.sh $(PYTHON) build/wheel-check $(WHICH)

claims: $(READY)
	@$(PYTHON) benchmarks/claims.py

docs: $(READY)
	@$(PYTHON) -c 'import mkdocs, mkdocstrings_handlers.python' 2>/dev/null || $(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs 'mkdocstrings[python]'
	$(PYTHON) -m mkdocs build --strict

sass: $(READY)
	@$(PYTHON) benchmarks/sass.py

gpu-check:
	benchmarks/gpu_check.sh $(OUT) $(STAGES)

# The environment: the interpreter must be able to make virtual environments and compile; both are asked for by name if absent.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	@$(BASE) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(BASE) must be Python 3.11 or newer: make BASE=python3.12 ..."; exit 1; }
	@$(BASE) -c 'import venv, ensurepip' || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@test -f "$$($(BASE) -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" || { echo "Python.h is missing: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++ compiler is missing: apt-get install g++"; exit 1; }
	test -x $(VENV)/bin/python || $(BASE) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools wheel pybind11 ninja
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info zo_kernels/*.so zo_kernels/__pycache__
