#!/usr/bin/env bash
# A wheel, made from the source archive, in clean environments without a compiler: make wheel-check.
#
#   wheel_check.sh PYTHON FOLDER [newest] [oldest]
#
# newest: what `pip install 'WHEEL[finetune]'` takes today. oldest: every package that pyproject.toml bounds from below at that version, the rest as pip has it.
# In each `tests/wheel.py` runs with a PATH of the environment alone. FOLDER gets gigabytes (pip's torch brings CUDA) and can be removed afterwards.
set -euo pipefail
python=$(command -v "${1:?usage: wheel_check.sh PYTHON FOLDER [newest] [oldest]}")
folder=$(mkdir -p "${2:?a folder}" && cd "$2" && pwd)
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)

if [ ! -f "$folder/dist/.ready" ]; then
	rm -rf "$folder/dist" "$folder/source" && mkdir -p "$folder/dist" "$folder/source"
	(cd "$root" && "$python" setup.py -q egg_info -e "$folder/source" sdist -d "$folder/dist")
	# From the archive and nothing else.
	tar -xzf "$folder"/dist/*.tar.gz -C "$folder/source" --strip-components=1
	ZO_KERNELS_CUDA=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/dist" "$folder/source"
	touch "$folder/dist/.ready"
fi
wheel=$(ls "$folder"/dist/*.whl)

oldest() {
	"$python" - "$root/pyproject.toml" <<-'PYTHON'
		import re, sys, tomllib
		project = tomllib.load(open(sys.argv[1], "rb"))["project"]
		for one in (*project["dependencies"], *project["optional-dependencies"]["finetune"]):
		    if found := re.fullmatch(r"([\w-]+)>=([\d.]+)", one):
		        print(f"{found[1]}=={found[2]}.*")
	PYTHON
}

for which in "$@"; do
	there=$folder/$which
	rm -rf "$there"
	"$python" -m venv "$there"
	bounds=()
	[ "$which" != oldest ] || mapfile -t bounds < <(oldest)
	env -u PYTHONPATH "$there/bin/python" -m pip install --quiet --disable-pip-version-check "zo_kernels[finetune] @ file://$wheel" "${bounds[@]}"
	mkdir -p "$there/work"
	cp "$root/tests/wheel.py" "$there/work"
	echo "$which:"
	none='import shutil; assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "nvcc")))'
	env -i PATH="$there/bin" python -c "$none"
	(cd "$there/work" && env -i PATH="$there/bin" HOME="$there/work" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python wheel.py)
done
