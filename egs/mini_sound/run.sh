#!/usr/bin/env bash
# The embedded pair for sound from nothing: data, codec, MAGNeT, scores.  bash egs/mini_sound/run.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)

stage=0
stop_stage=5
work="$here/work"
python=${PYTHON:-python3}
shared_data=""
github=https://github.com
speech=""
jobs=2
hours_music=3
hours_effects=2
sound_font=/usr/share/sounds/sf2/FluidR3_GM.sf2
codec_minutes=45
model_minutes=55
processes=2
embed=false
seed=1
extra=()

usage() {
  cat <<END
Usage: bash egs/mini_sound/run.sh [options] [-- key=value ...]

Trains the small 16 kHz codec and the small text-to-sound MAGNeT, and scores both.
A stage that is finished is skipped; remove its marker in WORK/done to run it again.

  0 recordings: ESC-10, samples of Sonic Pi, speech   1 effects, music, manifests, classifier
  2 codec   3 codes of all clips, MAGNeT   4 scores   5 RESULTS.md, embedding

  --stage N          first stage (default $stage)
  --stop-stage N     last stage (default $stop_stage)
  --work DIR         everything that is made (default egs/mini_sound/work)
  --python FILE      Python with nar_speech installed (default \$PYTHON or python3)
  --shared-data DIR  folder with esc10, librispeech251 ... (default ../shared/data where it exists);
                     without it the sources that have a repository of their own are cloned, the others skipped
  --github WHERE     server, or a folder of owner+name/repo mirrors (default $github)
  --speech DIR       work folder of egs/mini_en whose recordings are used (default: stage 0 makes them in WORK)
  --jobs N           processes of the renderers (default $jobs)
  --hours-music H    hours of rendered music for training (default $hours_music)
  --hours-effects H  hours of synthesised effects for training (default $hours_effects)
  --sound-font FILE  General MIDI sound font (default $sound_font, MIT licence)
  --codec-minutes M  wall time of the codec's training (default $codec_minutes)
  --model-minutes M  of MAGNeT's (default $model_minutes)
  --processes N      training processes of one thread each (default $processes)
  --embed            stage 5 copies both to nar_speech/assets
  --seed N           of music, effects and training (default $seed)
  -- key=value ...   passed to recipes/magnet.py in stage 3
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
    --stage | --stop-stage | --work | --python | --shared-data | --github | --speech | --jobs | --hours-music | \
      --hours-effects | --sound-font | --codec-minutes | --model-minutes | --processes | --seed) ;;
    *) fail "unknown option $option; --help lists them" ;;
  esac
  [ $# -ge 2 ] || fail "$option needs a value"
  key=${option#--}
  printf -v "${key//-/_}" '%s' "$2"
  shift 2
done
for number in stage stop_stage jobs processes seed; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} must be a whole number, got '${!number}'"
done
if [ "$processes" -lt 1 ] || [ "$processes" -gt 8 ]; then fail "--processes must be 1 to 8, got $processes"; fi
for number in hours_music hours_effects codec_minutes model_minutes; do
  [[ ${!number} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--${number//_/-} must be a number, got '${!number}'"
done
if [ -n "$shared_data" ] && [ ! -d "$shared_data" ]; then fail "--shared-data: no folder $shared_data"; fi
if [ -z "$shared_data" ] && [ -d "$repo/../shared/data" ]; then shared_data="$repo/../shared/data"; fi
if [ -n "$speech" ] && [ ! -d "$speech/real" ]; then fail "--speech: no folder $speech/real; run stage 0 of mini_en"; fi

mkdir -p "$work/done" "$work/log"
work=$(cd "$work" && pwd)
shared=()
if [ -n "$shared_data" ]; then shared=(--shared-data "$(cd "$shared_data" && pwd)"); fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1

source "$repo/egs/common/stages.sh"

py() { "$python" "$here/local/$1.py" "${@:2}"; }

real_sounds() { py real_sounds --work "$work" "${shared[@]}" --github "$github"; }
recordings() { py speech --work "$work" "${shared[@]}" --github "$github"; }
effects() { py effects --work "$work" --hours "$hours_effects" --jobs "$jobs" --seed "$seed"; }
music() {
  py render_music --work "$work" --hours "$hours_music" --jobs "$jobs" --seed "$seed" --sound-font "$sound_font"
}
manifests() { py make_cuts --work "$work" --speech "${speech:-$work}" --seed "$seed"; }
# The manifests of sounds that nothing is trained on, into the caller's array dev.
held_out() {
  dev=("$work"/cuts/eval_{effects,music}.jsonl.gz)
  if [ -e "$work/cuts/eval_esc10.jsonl.gz" ]; then dev=("$work/cuts/eval_esc10.jsonl.gz" "${dev[@]}"); fi
}
# Scored on recordings that it hasn't heard; later it says what generated sounds sound like.
classifier() {
  local cuts="$work/cuts" dev
  held_out
  py classifier train "$cuts/sound_train.jsonl.gz" -o "$work/classifier.safetensors" --seed "$seed" \
    2>&1 | tee "$work/log/classifier.log"
  py classifier score "$work/classifier.safetensors" "${dev[@]}" --json "$work/scores/classifier.json" \
    2>&1 | tee -a "$work/log/classifier.log"
}

# recipe NAME CONFIG key=value ...: training, in as many processes as wanted.
recipe() {
  local launcher=("$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m)
  if [ "$processes" = 1 ]; then launcher=("$python" -m); fi
  "${launcher[@]}" "recipes.$1" "$repo/$2" train.threads=1 train.seed="$seed" "${@:3}"
}
codec() {
  local cuts="$work/cuts/codec"
  recipe codec configs/codec/mini.yaml train.output_dir="$work/exp/codec" train.max_minutes="$codec_minutes" \
    data.train="[${cuts}_train_speech.jsonl.gz,${cuts}_train_real.jsonl.gz,${cuts}_train_effects.jsonl.gz,${cuts}_train_music.jsonl.gz]" \
    data.weights="[4,1.5,1.3,2]" data.dev="[${cuts}_dev.jsonl.gz]" data.batch_size=$((16 / processes)) \
    train.find_unused_parameters=$([ "$processes" = 1 ] && echo false || echo true)
  py export_codec --model "$work/exp/codec/model" --out "$work/codec"
}
codes() {
  local part
  for part in train dev; do
    "$python" -m recipes.prepare_sound "$work/cuts/sound_$part.jsonl.gz" -o "$work/codes/$part" \
      --codec "$work/codec" --codebooks 4 --conditioner sentence
  done
}
magnet() {
  recipe magnet configs/magnet/mini.yaml train.output_dir="$work/exp/magnet" train.max_minutes="$model_minutes" \
    data.train="[$work/codes/train]" data.dev="[$work/codes/dev]" codec="$work/codec" \
    data.batch_size=$((16 / processes)) "${extra[@]}"
}
codec_scores() { py score_codec --work "$work" --codec "$work/codec" --out "$work/scores/codec.json"; }
sounds() {
  local dev
  held_out
  py make_sounds generate --model "$work/exp/magnet/model" --out "$work/made/generated" --seed "$seed"
  py make_sounds code --codec "$work/codec" --out "$work/made/coded" "${dev[@]}"
  py classifier score "$work/classifier.safetensors" "$work/made/generated" "$work/made/coded" \
    --json "$work/scores/sounds.json"
}
results() {
  local words=(--work "$work" --out "$here/RESULTS.md")
  if $embed; then words+=(--assets "$repo/nar_speech/assets"); fi
  py results "${words[@]}"
}

if [ "$stage" -le 1 ]; then bash "$here/prepare.sh"; fi
part 0 real_sounds real_sounds
if [ -z "$speech" ]; then part 0 recordings recordings; fi
part 1 effects effects
part 1 music music
part 1 manifests manifests
part 1 classifier classifier
part 2 codec codec
part 3 codes codes
part 3 magnet magnet
part 4 codec_scores codec_scores
part 4 sounds sounds
part 5 results results
