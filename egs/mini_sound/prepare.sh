#!/usr/bin/env bash
# Programs and sounds that the recipe needs, as Debian packages. Called by run.sh; alone: bash egs/mini_sound/prepare.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../common/debian.sh"
need -- \
  "git git" "fluidsynth fluidsynth" "opus-tools opusenc" \
  "fluid-soundfont-gm /usr/share/sounds/sf2/FluidR3_GM.sf2" \
  "sonic-pi-samples /usr/share/sonic-pi/samples/elec_blip.flac"
