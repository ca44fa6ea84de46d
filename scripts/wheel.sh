#!/usr/bin/env bash
# Builds the sdist and from it the wheel, makes the wheel portable, and tries it in a fresh environment outside the
# checkout. Run by `make wheel`, with .venv/bin first in PATH.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

cp constraints.txt "$work" # pip splits PIP_CONSTRAINT at blanks, and this path has none
export PIP_CONSTRAINT="$work/constraints.txt"
python -m build --quiet --outdir "$work/built" .

rm -rf dist && mkdir dist
mv "$work"/built/*.tar.gz dist
if [ "$(uname)" = Linux ] && ! ls "$work"/built/*-none-any.whl >/dev/null 2>&1; then
    # torch brings libgomp.so.1; a second one in the wheel would be a second team of threads on the same cores
    auditwheel repair --exclude libgomp.so.1 --wheel-dir dist "$work"/built/*.whl
else
    mv "$work"/built/*.whl dist
fi
ls -l dist
for needed in csrc/bindings.cpp tests/test_packaging.py examples/demo.py Makefile constraints.txt; do
    tar -tzf dist/*.tar.gz | grep "/$needed\$" >/dev/null || { echo "the sdist lacks $needed" >&2; exit 1; }
done

python -m venv "$work/fresh"
"$work/fresh/bin/python" -m pip install -qq --no-input --no-compile dist/*.whl
cp scripts/wheel_smoke_test.py "$work"
cd "$work"
"$work/fresh/bin/python" -I wheel_smoke_test.py "$root"
