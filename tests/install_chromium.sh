#!/usr/bin/env bash
# Install Debian's Chromium for the browser tests, unless there is one. If it can't be installed, this says why and
# does not fail: the tests are skipped.
set -u
for name in chromium chromium-browser google-chrome chrome; do
    command -v "$name" >/dev/null && exit
done
root=()
[ "$(id -u)" = 0 ] || root=(sudo -n)
if ! command -v apt-get >/dev/null; then
    echo "No Chromium is installed, and there is no apt-get to install it with."
elif ! "${root[@]}" true 2>/dev/null; then
    echo "No Chromium is installed, and it takes root or sudo without a password to install it."
else
    echo "No Chromium is installed; installing Debian's."
    options=(-q -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
    { "${root[@]}" apt-get "${options[@]}" update &&
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" install -y --no-install-recommends chromium
    } >/dev/null || echo "Chromium can't be installed; apt-get says why above."
fi
exit 0
