#!/usr/bin/env bash
# Builds the sdist and from it the wheels, without CUDA and, where there is nvcc, with it; makes them portable, and tries
# each in a fresh environment outside the checkout. Run by `make wheel`, with .venv/bin first in PATH.
#
# CK_ARCHS: the GPU architectures, as setup.py has them; the default is every supported one, which takes minutes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

cp constraints.txt "$work" # pip splits PIP_CONSTRAINT at blanks, and this path has none
export PIP_CONSTRAINT="$work/constraints.txt"

rm -rf dist && mkdir dist
echo "wheel: without CUDA"
CK_CUDA=0 python -m build --quiet --outdir "$work/built" .
mv "$work"/built/*.tar.gz dist
scripts/repair_wheel.sh "$work"/built/*.whl dist cpu
variants=cpu

nvcc=$(python -c 'import setup; print(setup.find_nvcc() or "")')
if [ -n "$nvcc" ]; then
    major=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
    echo "wheel: with CUDA $major, for ${CK_ARCHS:-every supported architecture}"
    mkdir "$work/sdist" && tar -xzf dist/*.tar.gz -C "$work/sdist" --strip-components=1
    # without --quiet, which hides what the compilers say
    CK_CUDA=1 NVCC_APPEND_FLAGS=-Xptxas=-v python -m build --wheel --outdir "$work/built-cuda" "$work/sdist" \
        >"$work/built-cuda.log" 2>&1 || { cat "$work/built-cuda.log" >&2; exit 1; }
    case ";${CK_ARCHS:-90};" in
    *[\;\ ,]90[\;\ ,]*) python scripts/registers.py "$work/built-cuda.log" ;;
    esac
    scripts/repair_wheel.sh "$work"/built-cuda/*.whl dist "cuda$major"
    variants="cpu cuda$major"
fi
ls -l dist
for needed in csrc/bindings.cpp csrc/cuda/panel_pass.cu tests/package/test_packaging.py examples/demo.py Makefile constraints.txt; do
    tar -tzf dist/*.tar.gz | grep "/$needed\$" >/dev/null || { echo "the sdist lacks $needed" >&2; exit 1; }
done
# the Triton kernels as files: a link would dangle
for kernel in triton_kernels/*.py; do
    tar -tvzf dist/*.tar.gz | grep "^-.*/contrastive_kernels/_triton/${kernel##*/}\$" >/dev/null ||
        { echo "the sdist has no contrastive_kernels/_triton/${kernel##*/} that is a file" >&2; exit 1; }
done

python -m venv "$work/fresh"
cp scripts/wheel_smoke_test.py "$work"
for variant in $variants; do
    case $variant in
    cpu) wheel=$(ls dist/*.whl | grep -v cuda) ;;
    *) wheel=$(ls dist/*-"${variant#cuda}"cuda-*.whl) ;;
    esac
    "$work/fresh/bin/python" -m pip uninstall -qq --yes contrastive-kernels 2>/dev/null
    "$work/fresh/bin/python" -m pip install -qq --no-input --no-compile "$wheel"
    (cd "$work" && fresh/bin/python -I wheel_smoke_test.py "$root" "$variant")
done
