#!/bin/sh
# Builds dist/*.tar.gz and, from it, dist/*.whl; then runs the demo where nothing but the wheel and its demo extra is installed.
# `make dist` calls it. KEEP=FOLDER keeps that environment.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$root/.venv/bin/python

rm -rf dist build
mkdir dist
build() {
  "$python" -c "from setuptools import build_meta; print(build_meta.build_$1('$root/dist'))" >/dev/null
}
build sdist
tar -xzf dist/*.tar.gz -C "$work"
(cd "$work"/vitdistill-* && build wheel)
rm -rf build vitdistill.egg-info
ls -l dist

# The versions of constraints.txt without their hashes, which pip would then want of the wheel too.
sed -e '/--hash/d' -e 's/ \\$//' requirements/constraints.txt >"$work/constraints.txt"
env=${KEEP:-$work/env}
uv=$(command -v uv || true)
if [ -n "$uv" ]; then
  uv venv --quiet --no-project --python "$python" "$env"
  uv pip install --quiet --python "$env/bin/python" -c "$work/constraints.txt" "$(echo dist/*.whl)[demo]"
else
  "$python" -m venv "$env"
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check -c "$work/constraints.txt" "$(echo dist/*.whl)[demo]"
fi

cd "$work"
unset PYTHONPATH
"$env/bin/vitdistill" --version
"$env/bin/vitdistill" demo --output "$work/demo"
test -s "$work/demo/report.html"
"$env/bin/vitdistill" eval "$work/demo/kd" --json
echo "dist is ready: the demo ran from the wheel alone."
