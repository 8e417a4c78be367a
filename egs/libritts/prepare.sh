#!/usr/bin/env bash
# LibriTTS: lhotse manifests from a local copy.  bash egs/libritts/prepare.sh --corpus-dir DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
source "$here/settings.sh"
source "$here/../common/prepare.sh"
