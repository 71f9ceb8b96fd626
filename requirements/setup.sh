#!/bin/sh
# Builds .venv with the versions and hashes of constraints.txt and this checkout in it; `make` calls it when they changed.
# `setup.sh docs` adds those of docs.txt.
# An existing .venv is brought to those versions. uv is quicker where there is one; pip does the same.
set -eu
cd "$(dirname "$0")/.."
venv=.venv/bin/python
pinned="--no-deps --require-hashes --only-binary :all: -r requirements/${1:-constraints}.txt"
checkout="--no-deps --no-build-isolation -e ."
uv=$(command -v uv || true)

fail() {
  echo "$*" >&2
  exit 1
}

supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'
}

if [ -n "$uv" ]; then usable="-V"; else usable="-m pip --version"; fi
if ! "$venv" $usable >/dev/null 2>&1; then
  python=$(command -v "$PYTHON") ||
    fail "vitdistill needs Python 3.11 to 3.14 and there is no '$PYTHON' here: run make PYTHON=/path/to/python3.11."
  supported "$python" ||
    fail "vitdistill needs Python 3.11 to 3.14 and '$PYTHON' is $("$python" -V 2>&1): run make PYTHON=/path/to/python3.11."
  if [ -n "$uv" ]; then
    uv venv --quiet --no-project --clear --python "$python" .venv
  else
    "$python" -m venv --clear .venv || fail "'$PYTHON' cannot make virtual environments: install its venv package" \
      "(Debian, Ubuntu: apt install python3-venv) or uv, and run make again."
  fi
fi
supported "$venv" || fail "vitdistill needs Python 3.11 to 3.14 and .venv has $("$venv" -V 2>&1): remove .venv and run make again."

[ $# -gt 0 ] || echo "Installing into .venv (about 6 GB with PyTorch's CUDA libraries; a few minutes, once)."
if [ -n "$uv" ]; then
  uv pip install --quiet --python "$venv" $pinned
  uv pip install --quiet --python "$venv" --offline $checkout
else
  "$venv" -m pip install --quiet --disable-pip-version-check $pinned
  "$venv" -m pip install --quiet --disable-pip-version-check --no-index $checkout
fi
