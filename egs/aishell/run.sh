#!/usr/bin/env bash
# AISHELL-1: manifests, training, scores.  bash egs/aishell/run.sh --corpus-dir DIR
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
source "$here/settings.sh"
source "$here/../common/run.sh"
