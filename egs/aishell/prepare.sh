#!/usr/bin/env bash
# AISHELL-1: lhotse manifests from a local copy.  bash egs/aishell/prepare.sh --corpus-dir DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
source "$here/settings.sh"
source "$here/../common/prepare.sh"
