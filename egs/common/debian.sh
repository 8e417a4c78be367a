# Sourced by prepare.sh of the embedded models.

# need OPTION ... -- "PACKAGE SIGN" ...: install the Debian packages whose sign, a program or a file, is not there.
# The options go to apt-get install.
need() {
  local options=() missing=() admin=() entry package sign
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  for entry in "$@"; do
    read -r package sign <<<"$entry"
    if ! command -v "$sign" >/dev/null && [ ! -e "$sign" ]; then missing+=("$package"); fi
  done
  if [ ${#missing[@]} -eq 0 ]; then return 0; fi
  if ! command -v apt-get >/dev/null; then
    echo "prepare.sh: there is no apt-get here; install by hand: ${missing[*]}" >&2
    echo "            (the sounds are Debian's: unpack them to the same paths under /usr/share)" >&2
    exit 1
  fi
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "prepare.sh: need root to apt-get install ${missing[*]}" >&2 && exit 1; }
    admin=(sudo)
  fi
  echo "=== Debian packages: ${missing[*]}"
  "${admin[@]}" apt-get update -qq
  "${admin[@]}" apt-get install -y -q --no-install-recommends "${options[@]}" "${missing[@]}"
}
