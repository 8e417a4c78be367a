# Sourced by egs/<corpus>/run.sh: manifests, training, scores of a corpus that lies in a local folder. The corpus'
# settings.sh gives corpus, corpus_holds, train, dev, test, language, paraformer_config and ctc_config.
# shellcheck shell=bash disable=SC2154

stage=0
stop_stage=2
corpus_dir=""
data_dir="$here/data"
exp_dir=""
model=paraformer
config=""
processes=1
jobs=4
device=auto
decoder=auto
python=${PYTHON:-python3}
extra=()

usage() {
  cat <<END
Usage: bash egs/$corpus/run.sh --corpus-dir DIR [options] [-- key=value ...]

  0 manifests (prepare.sh)   1 training, model folder   2 decoding and scores of every dev and test part

  --stage N          first stage (default $stage)
  --stop-stage N     last stage (default $stop_stage)
  --corpus-dir DIR   $corpus_holds (required by stage 0)
  --data-dir DIR     manifests (default egs/$corpus/data)
  --exp-dir DIR      checkpoints, logs, model folder, scores (default egs/$corpus/exp/MODEL)
  --model NAME       paraformer or ctc (default $model)
  --config FILE      (default configs/$paraformer_config or configs/$ctc_config)
  --train PARTS      (default "$train"), likewise
  --dev PARTS        (default "$dev") and
  --test PARTS       (default "$test")
  --processes N      training processes, one a GPU (default $processes)
  --jobs N           threads of stage 0 (default $jobs)
  --device NAME      auto, cpu or cuda (default $device)
  --decoder NAME     of stage 2, see nar-speech evaluate --help (default $decoder)
  --python FILE      Python with nar_speech installed (default \$PYTHON or python3)
  -- key=value ...   settings for recipes/MODEL.py

Training that was stopped goes on with the same command.
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
    --stage | --stop-stage | --corpus-dir | --data-dir | --exp-dir | --model | --config | --train | --dev | --test | \
      --processes | --jobs | --device | --decoder | --python) ;;
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
case $model in
  paraformer) default_config="$repo/configs/$paraformer_config" ;;
  ctc) default_config="$repo/configs/$ctc_config" ;;
  *) fail "--model must be paraformer or ctc, got '$model'" ;;
esac
config=${config:-$default_config}
exp_dir=${exp_dir:-$here/exp/$model}
[ -f "$config" ] || fail "--config: no file $config"
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"

if [ "$stage" -le 0 ] && [ "$stop_stage" -ge 0 ]; then
  [ -n "$corpus_dir" ] || fail "--corpus-dir is required: $corpus_holds"
  echo "=== stage 0: manifests"
  bash "$here/prepare.sh" --corpus-dir "$corpus_dir" --data-dir "$data_dir" --train "$train" --dev "$dev" \
    --test "$test" --jobs "$jobs" --python "$python"
fi

if [ "$stage" -le 1 ] && [ "$stop_stage" -ge 1 ]; then
  [ -f "$data_dir/train.jsonl.gz" ] || fail "$data_dir/train.jsonl.gz is missing: run stage 0"
  echo "=== stage 1: training"
  settings=(
    "$config" "train.output_dir=$exp_dir" "train.device=$device"
    "data.train=[$data_dir/train.jsonl.gz]" "data.dev=[$data_dir/dev.jsonl.gz]" "${extra[@]}"
  )
  if [ "$processes" -gt 1 ]; then
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m "recipes.$model" "${settings[@]}"
  else
    "$python" -m "recipes.$model" "${settings[@]}"
  fi
fi

if [ "$stage" -le 2 ] && [ "$stop_stage" -ge 2 ]; then
  [ -f "$exp_dir/model/model.yaml" ] || fail "$exp_dir/model is missing: run stage 1 to its end"
  mkdir -p "$exp_dir/scores"
  {
    worst=0 # a part with a file that can't be read does not keep the others from being scored
    for part in $dev $test; do
      echo "=== stage 2: $part"
      "$python" -m nar_speech evaluate "$data_dir/$part.jsonl" --model "$exp_dir/model" --normalize "$language" \
        --device "$device" --decoder "$decoder" --report "$exp_dir/scores/$part.txt" || worst=$?
    done
    exit "$worst"
  } | tee "$exp_dir/scores/summary.txt"
fi
