#!/usr/bin/env bash
# Brings the browser that the pages are tested in: Debian's Chromium where apt may, else playwright's own.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v chromium >/dev/null && exit 0
own() { .venv/bin/python -c 'from playwright.sync_api import sync_playwright
with sync_playwright() as p: print(p.chromium.executable_path)'; }
[ -x "$(own)" ] && exit 0

export DEBIAN_FRONTEND=noninteractive
root=""
[ "$(id -u)" = 0 ] || root="sudo -n"
echo "setup: chromium"
if command -v apt-get >/dev/null && $root apt-get -qq update >/dev/null &&
    $root apt-get -qq install --no-install-recommends -y chromium >/dev/null; then
    exit 0
fi
.venv/bin/playwright install chromium ||
    echo "setup: no browser could be installed; without one the tests of the pages are skipped (in CI they fail)" >&2
