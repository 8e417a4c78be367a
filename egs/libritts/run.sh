#!/usr/bin/env bash
# LibriTTS: manifests, codes, the networks of MaskGCT at full size.  bash egs/libritts/run.sh --corpus-dir DIR
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
source "$here/settings.sh"

stage=0
stop_stage=4
corpus_dir=""
data_dir="$here/data"
exp_dir="$here/exp"
codec=maskgct
semantic=""
t2s_config="$repo/configs/maskgct/t2s_base.yaml"
processes=1
jobs=4
device=auto
python=${PYTHON:-python3}
extra=()

usage() {
  cat <<END
Usage: bash egs/$corpus/run.sh --corpus-dir DIR [options] [-- key=value ...]

  0 manifests (prepare.sh)   1 semantic codec over w2v-BERT 2.0, unless one is named   2 codes of all clips
  3 text to semantic codes, semantic to acoustic codes (first layer, all layers), durations   4 model folder

  --stage N          first stage (default $stage)
  --stop-stage N     last stage (default $stop_stage)
  --corpus-dir DIR   $corpus_holds (required by stage 0)
  --data-dir DIR     manifests and codes (default egs/$corpus/data)
  --exp-dir DIR      checkpoints, logs, model folders (default egs/$corpus/exp)
  --codec NAME       acoustic codec of 50 frames a second (default $codec: amphion/MaskGCT, for non-commercial use)
  --semantic DIR     semantic codec: a folder of recipes/semantic_codec.py or of MaskGCT (default: stage 1 trains one)
  --t2s-config FILE  (default configs/maskgct/t2s_base.yaml; t2s.yaml is the released size)
  --train PARTS      (default "$train"), likewise
  --dev PARTS        (default "$dev") and
  --test PARTS       (default "$test")
  --processes N      training processes, one a GPU (default $processes)
  --jobs N           threads of stage 0 (default $jobs)
  --device NAME      auto, cpu or cuda (default $device)
  --python FILE      Python with nar_speech installed (default \$PYTHON or python3)
  -- key=value ...   settings for all trainings of recipes/maskgct.py

Trainings that were stopped go on with the same command.
END
}

fail() {
  echo "run.sh: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --) shift && extra=("$@") && break ;;
    --stage | --stop-stage | --corpus-dir | --data-dir | --exp-dir | --codec | --semantic | --t2s-config | --train | \
      --dev | --test | --processes | --jobs | --device | --python) ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
  [ $# -ge 2 ] || fail "$1 needs a value"
  key=${1#--}
  printf -v "${key//-/_}" '%s' "$2"
  shift 2
done
for number in stage stop_stage processes jobs; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} must be a whole number, got '${!number}'"
done
[ "$stop_stage" -ge "$stage" ] || fail "--stage $stage is after --stop-stage $stop_stage: nothing would run"
[ -f "$t2s_config" ] || fail "--t2s-config: no file $t2s_config"
if [ -n "$semantic" ] && [ ! -d "$semantic" ]; then fail "--semantic: no folder $semantic"; fi

mkdir -p "$data_dir" "$exp_dir"
data_dir=$(cd "$data_dir" && pwd)
exp_dir=$(cd "$exp_dir" && pwd)
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

wanted() { [ "$stage" -le "$1" ] && [ "$stop_stage" -ge "$1" ]; }

# recipe NAME CONFIG key=value ...: a training in as many processes as wanted.
recipe() {
  local launcher=("$python" -m)
  if [ "$processes" -gt 1 ]; then
    launcher=("$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m)
  fi
  "${launcher[@]}" "recipes.$1" "$2" "train.device=$device" "${@:3}"
}

if wanted 0; then
  [ -n "$corpus_dir" ] || fail "--corpus-dir is required: $corpus_holds"
  echo "=== stage 0: manifests"
  bash "$here/prepare.sh" --corpus-dir "$corpus_dir" --data-dir "$data_dir" --train "$train" --dev "$dev" \
    --test "$test" --jobs "$jobs" --python "$python"
fi

if wanted 1 && [ -z "$semantic" ]; then
  echo "=== stage 1: semantic codec"
  recipe semantic_codec "$repo/configs/maskgct/semantic.yaml" "train.output_dir=$exp_dir/semantic" \
    "data.train=[$data_dir/train.jsonl.gz]" "data.dev=[$data_dir/dev.jsonl.gz]"
fi
semantic=${semantic:-$exp_dir/semantic/model}

if wanted 2; then
  echo "=== stage 2: codes"
  where=$device
  if [ "$where" = auto ]; then
    where=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
  fi
  for part in train dev; do
    "$python" -m recipes.prepare_speech "$data_dir/$part.jsonl.gz" -o "$data_dir/codes_$part" --codec "$codec" \
      --semantic "$semantic" --language en --device "$where"
  done
fi

if wanted 3; then
  codes=("data.train=[$data_dir/codes_train]" "data.dev=[$data_dir/codes_dev]")
  for name in t2s s2a_first s2a_full; do
    echo "=== stage 3: $name"
    config="$repo/configs/maskgct/$name.yaml"
    if [ "$name" = t2s ]; then config=$t2s_config; fi
    recipe maskgct "$config" "train.output_dir=$exp_dir/$name" "${codes[@]}" "${extra[@]}"
  done
  echo "=== stage 3: durations"
  recipe duration "$repo/configs/maskgct/duration.yaml" "train.output_dir=$exp_dir/duration" "${codes[@]}"
fi

if wanted 4; then
  echo "=== stage 4: model folder"
  "$python" -m recipes.join_speech "$here/card.yaml" -o "$exp_dir/model" --codec "$codec" --t2s "$exp_dir/t2s/model" \
    --s2a-first "$exp_dir/s2a_first/model" --s2a "$exp_dir/s2a_full/model" --duration "$exp_dir/duration/model" \
    --semantic "$semantic" --language en
fi
