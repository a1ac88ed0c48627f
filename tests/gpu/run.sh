#!/usr/bin/env bash
# Checks this source tree on a machine with a GPU, without a network and without an installation of the project:
#   tests/gpu/run.sh WHEELS OUT [options of check.py]
# WHEELS is a folder of wheels that tests/gpu/wheels.txt names (on a machine with a network: pip download --no-deps
# --only-binary=:all: -r tests/gpu/wheels.txt -d WHEELS, with the Python version and platform of the other).
set -eu
wheels=$1 out=$2
shift 2
cd "$(dirname "$0")/../.."
site=$(mktemp -d)
python3 tests/gpu/install.py "$site" "$wheels"
export PYTHONPATH="$site:$PWD:$PWD/backends:$PWD/model"
exec python3 tests/gpu/check.py --out "$out" "$@"
