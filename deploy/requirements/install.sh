#!/usr/bin/env bash
# Builds .venv from a lock. Usage: install.sh cpu|gpu
#
# torch comes first: on a CPU machine a CPU build, because the registry's own build brings several GB of CUDA
# libraries. Packages are then installed exactly as locked, without resolving anything again.
set -euo pipefail
platform=$1
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}

fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python is missing; install Python 3.11, or name one with PYTHON=..."
"$python" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
    fail "$("$python" --version) will not do; Python 3.11 or 3.12 is needed (name one with PYTHON=...)"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "this Python has no venv; install python3-venv"
[ -f "$here/$platform.lock" ] || fail "there is no lock for platform '$platform'; it is cpu or gpu"

cd "$root"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
version=$(sed -n 's/^torch==//p' "$here/torch.txt")

echo "setup: torch $version ($platform)"
if [ "$platform" = gpu ]; then
    pip install --no-deps "torch==$version"
elif ! .venv/bin/python -c "import torch; raise SystemExit(torch.__version__ != '$version+cpu')" 2>/dev/null; then
    # Where pip is configured with a CPU wheel, that; otherwise PyTorch's own CPU index, which uv knows by name.
    if ! pip install --no-deps "torch==$version+cpu" 2>/dev/null; then
        pip install uv
        .venv/bin/uv pip install --python .venv/bin/python --quiet --no-deps --torch-backend cpu "torch==$version" ||
            fail "no CPU build of torch $version was found; give pip one (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL) and try again"
    fi
fi

echo "setup: $(grep -c == "$here/$platform.lock") packages from deploy/requirements/$platform.lock"
grep -v '^torch==' "$here/$platform.lock" | pip install --no-deps -r /dev/stdin
pip install --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import redis, torch, transformers, typer; import serve, feedback, train, deploy' ||
    fail "the installed packages do not import; remove .venv and run make setup again"
echo "setup: done"
