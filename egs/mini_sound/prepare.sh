#!/usr/bin/env bash
# Programs and sounds that the data stages need, as Debian packages. Called by run.sh; alone: bash egs/mini_sound/prepare.sh
set -euo pipefail

# package, and a file or program that shows that it is there
wanted=(
  "git git" "fluidsynth fluidsynth"
  "fluid-soundfont-gm /usr/share/sounds/sf2/FluidR3_GM.sf2"
  "sonic-pi-samples /usr/share/sonic-pi/samples/elec_blip.flac"
)
missing=()
for entry in "${wanted[@]}"; do
  read -r package sign <<<"$entry"
  if ! command -v "$sign" >/dev/null && [ ! -e "$sign" ]; then missing+=("$package"); fi
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
  echo "prepare.sh: there is no apt-get here; install by hand: ${missing[*]}" >&2
  echo "            (the sounds are Debian's: unpack them to the same paths under /usr/share)" >&2
  exit 1
fi
admin=()
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "prepare.sh: need root to apt-get install ${missing[*]}" >&2 && exit 1; }
  admin=(sudo)
fi
echo "=== Debian packages: ${missing[*]}"
"${admin[@]}" apt-get update -qq
"${admin[@]}" apt-get install -y -q --no-install-recommends "${missing[@]}"
