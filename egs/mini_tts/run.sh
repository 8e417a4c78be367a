#!/usr/bin/env bash
# The embedded model that speaks from nothing: data, semantic codec, codes, networks, scores.  bash egs/mini_tts/run.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)

stage=0
stop_stage=7
work="$here/work"
python=${PYTHON:-python3}
shared_data=""
github=https://github.com
speech=""
codec=mini_codec
codebooks=4
hours_kokoro=8
hours_piper=3
jobs=2
semantic_minutes=12
t2s_minutes=90
s2a_minutes=60
duration_minutes=12
processes=2
embed=false
seed=1
synthesis=()
extra=()

usage() {
  cat <<END
Usage: bash egs/mini_tts/run.sh [options] [-- key=value ...]

Trains a small MaskGCT over the embedded codec and recogniser, and scores it.
A stage that is finished is skipped; remove its marker in WORK/done to run it again.

  0 recordings and synthetic speech, by egs/mini_en   1 manifests   2 semantic codec   3 codes of all clips
  4 text to semantic, semantic to acoustic codes, durations   5 model folder   6 scores   7 RESULTS.md, embedding

  --stage N          first stage (default $stage)
  --stop-stage N     last stage (default $stop_stage)
  --work DIR         everything that is made (default egs/mini_tts/work)
  --python FILE      Python with nar_speech installed (default \$PYTHON or python3)
  --shared-data DIR  folder with librispeech251 ... (default ../shared/data where it exists)
  --github WHERE     server, or a folder of owner+name/repo mirrors (default $github)
  --speech DIR       work folder of an egs/mini_en with recordings and voices (default: stage 0 makes WORK/mini_en)
  --codec NAME       of the acoustic codes, 50 frames a second (default $codec)
  --codebooks N      of it that are made (default $codebooks)
  --hours-kokoro H   hours of Kokoro's mixed voices (default $hours_kokoro)
  --hours-piper H    hours of Piper's voice (default $hours_piper)
  --jobs N           processes of the voices (default $jobs)
  --semantic-minutes M, --t2s-minutes M, --s2a-minutes M, --duration-minutes M
                     wall time of the trainings (default $semantic_minutes, $t2s_minutes, $s2a_minutes, $duration_minutes)
  --processes N      training processes of one thread each (default $processes)
  --synthesis WORD   key=value, a default of synthesis for the model folder; may be repeated
  --embed            stage 7 copies the model to nar_speech/assets/mini_tts
  --seed N           of voices and trainings (default $seed)
  -- key=value ...   passed to recipes/maskgct.py for text to semantic codes
END
}

fail() {
  echo "run.sh: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  option=$1
  case $option in
    -h | --help) usage && exit 0 ;;
    --embed) embed=true && shift && continue ;;
    --) shift && extra=("$@") && break ;;
    --stage | --stop-stage | --work | --python | --shared-data | --github | --speech | --codec | --codebooks | \
      --hours-kokoro | --hours-piper | --jobs | --semantic-minutes | --t2s-minutes | --s2a-minutes | \
      --duration-minutes | --processes | --synthesis | --seed) ;;
    *) fail "unknown option $option; --help lists them" ;;
  esac
  [ $# -ge 2 ] || fail "$option needs a value"
  if [ "$option" = --synthesis ]; then
    synthesis+=("$2")
  else
    key=${option#--}
    printf -v "${key//-/_}" '%s' "$2"
  fi
  shift 2
done
for number in stage stop_stage codebooks jobs processes seed; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} must be a whole number, got '${!number}'"
done
if [ "$processes" -lt 1 ] || [ "$processes" -gt 8 ]; then fail "--processes must be 1 to 8, got $processes"; fi
for number in hours_kokoro hours_piper semantic_minutes t2s_minutes s2a_minutes duration_minutes; do
  [[ ${!number} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--${number//_/-} must be a number, got '${!number}'"
done
if [ -n "$shared_data" ] && [ ! -d "$shared_data" ]; then fail "--shared-data: no folder $shared_data"; fi
if [ -z "$shared_data" ] && [ -d "$repo/../shared/data" ]; then shared_data="$repo/../shared/data"; fi
if [ -n "$speech" ] && [ ! -d "$speech/real" ]; then fail "--speech: no folder $speech/real; run egs/mini_en/run.sh"; fi

mkdir -p "$work/done" "$work/log"
work=$(cd "$work" && pwd)
shared=()
if [ -n "$shared_data" ]; then shared=(--shared-data "$(cd "$shared_data" && pwd)"); fi
if [ -d "$codec" ]; then codec=$(cd "$codec" && pwd); fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1

source "$repo/egs/common/stages.sh"

py() { "$python" "$here/local/$1.py" "${@:2}"; }

# Recordings, evaluation sets and voices are mini_en's; its stage 2 would also make what only a recogniser needs.
recordings() {
  bash "$repo/egs/mini_en/run.sh" --stop-stage 1 --work "$work/mini_en" --python "$python" "${shared[@]}" \
    --github "$github" --jobs "$jobs" --hours-kokoro "$hours_kokoro" --hours-piper "$hours_piper" --hours-flite 0 \
    --seed "$seed"
  "$python" "$repo/egs/mini_en/local/teacher.py" --work "$work/mini_en" # case and punctuation
}
manifests() { py tts_cuts --work "$work" --speech "${speech:-$work/mini_en}"; }

# recipe NAME CONFIG key=value ...: training, in as many processes as wanted.
recipe() {
  local launcher=("$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m)
  if [ "$processes" = 1 ]; then launcher=("$python" -m); fi
  (cd "$repo" && "${launcher[@]}" "recipes.$1" "$repo/configs/maskgct/$2.yaml" train.threads=1 \
    train.seed="$seed" "${@:3}")
}
semantic() {
  recipe semantic_codec mini_semantic train.output_dir="$work/exp/semantic" \
    train.max_minutes="$semantic_minutes" data.train="[$work/cuts/speech_train.jsonl.gz]" \
    data.dev="[$work/cuts/tts_dev.jsonl.gz]" data.batch_size=$((16 / processes))
}
codes() {
  local part
  for part in train dev; do
    (cd "$repo" && "$python" -m recipes.prepare_speech "$work/cuts/tts_$part.jsonl.gz" -o "$work/codes/$part" \
      --codec "$codec" --codebooks "$codebooks" --semantic "$work/exp/semantic/model" --language en)
  done
}
# part_of NAME MINUTES RECIPE key=value ...: one network.
part_of() {
  recipe "$3" "mini_$1" train.output_dir="$work/exp/$1" train.max_minutes="$2" data.train="[$work/codes/train]" \
    data.dev="[$work/codes/dev]" "${@:4}"
}
t2s() { part_of t2s "$t2s_minutes" maskgct "${extra[@]}"; }
s2a() { part_of s2a "$s2a_minutes" maskgct data.num_codebooks="$codebooks"; }
durations() { part_of duration "$duration_minutes" duration; }
model() {
  (cd "$repo" && "$python" -m recipes.join_speech "$here/conf/card.yaml" -o "$work/model" --codec "$codec" \
    --t2s "$work/exp/t2s/model" --s2a "$work/exp/s2a/model" --duration "$work/exp/duration/model" \
    --semantic "$work/exp/semantic/model" --language en --store int8 "${synthesis[@]}")
}
scores() { py tts_score --work "$work" --model "$work/model" --out "$work/scores/tts.json" --seed "$seed"; }
results() {
  local words=(--work "$work" --out "$here/RESULTS.md")
  if $embed; then words+=(--assets "$repo/nar_speech/assets"); fi
  py tts_results "${words[@]}"
}

if [ -z "$speech" ]; then part 0 recordings recordings; fi
part 1 manifests manifests
part 2 semantic semantic
part 3 codes codes
part 4 t2s t2s
part 4 s2a s2a
part 4 duration durations
part 5 model model
part 6 scores scores
part 7 results results
