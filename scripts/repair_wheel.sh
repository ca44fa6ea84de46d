#!/usr/bin/env bash
# repair_wheel.sh WHEEL FOLDER VARIANT: the wheel made portable, in FOLDER. Wheels of one version and Python differ in what
# they hold, so those with CUDA (VARIANT cuda13, ...) get a build tag, as in ...-0.1.0-13cuda-cp312-...; where pip has the
# choice, it prefers them to the one without.
set -euo pipefail
wheel=$1 folder=$2 variant=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "$(uname)" = Linux ] && [[ $wheel != *-none-any.whl ]]; then
    # torch brings libgomp.so.1; a second one in the wheel would be a second team of threads on the same cores
    auditwheel repair --exclude libgomp.so.1 --wheel-dir "$work" "$wheel"
else
    cp "$wheel" "$work"
fi
if [ "$variant" != cpu ]; then
    python -m wheel tags --remove --build "${variant#cuda}cuda" "$work"/*.whl >/dev/null
fi
mkdir -p "$folder"
mv "$work"/*.whl "$folder"
