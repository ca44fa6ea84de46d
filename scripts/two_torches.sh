#!/usr/bin/env bash
# two_torches.sh WHEEL VARIANT REQUIREMENT...: tries one wheel under several versions of torch, each in an environment of
# its own. Slow where pip has to download torch, so it is not part of the tests.
#
#   scripts/two_torches.sh dist/*-cp312-*.whl cpu "torch==2.6.*" torch
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1") variant=$2
shift 2
python=${PYTHON:-python3}
for requirement; do
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "two torches: $requirement"
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -qq --no-input --no-compile "$requirement" "$wheel"
    cp "$root/scripts/wheel_smoke_test.py" "$work"
    (cd "$work" && venv/bin/python -I wheel_smoke_test.py "$root" "$variant")
    rm -rf "$work"
done
