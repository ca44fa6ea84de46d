#!/bin/sh
# Prints the Python to make .venv with: $PYTHON or, of the usual names, the first that really runs (a shim may not),
# is 3.10 or newer and has venv; one with its C headers before one without.
set -u

suits() { # interpreter, what else must hold
    "$1" -c "
import sys, sysconfig, os
sys.exit(not (sys.version_info >= (3, 10) and __import__('venv') and __import__('ensurepip') and $2))" >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11 python3.10 python3.14; fi
for condition in "os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h'))" "True"; do
    for candidate in "$@"; do
        if suits "$candidate" "$condition"; then
            command -v "$candidate"
            exit 0
        fi
    done
done
echo "No usable Python among: $*. Needed: 3.10 or newer, with venv and headers (on Debian and Ubuntu the" \
    "packages python3-venv and python3-dev). Name another with 'make PYTHON=/path/to/python3 ...'." >&2
exit 1
