#!/usr/bin/env bash
# The embedded English model from nothing: data, synthesis, training, export, scores.  bash egs/mini_en/run.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)

stage=0
stop_stage=6
work="$here/work"
python=${PYTHON:-python3}
shared_data=""
github=https://github.com
jobs=2
hours_piper=12
hours_flite=10
hours_kokoro=4
books=80000
vocab_size=500
heads_minutes=15
train_minutes=135
decoder_minutes=15
stream_minutes=75
verifier_size=24000
processes=2
filter_model="$repo/nar_speech/assets/mini_en"
filter_score=-2.5
name=mini_en
embed=false
pack=""
pack_mib=60
seed=1
extra=()

usage() {
  cat <<END
Usage: bash egs/mini_en/run.sh [options] [-- key=value ...]

Trains the small English recogniser (Whisper tiny.en encoder, CTC, Paraformer, verifier) and scores it.
A stage that is finished is skipped; remove its marker in WORK/done to run it again.

  0 recordings and evaluation sets   1 synthetic speech   2 Whisper: weights, transcripts, pruned vocabulary; manifests
  3 training   4 language model, export, streaming twin   5 scores   6 RESULTS.md, embedding

  --stage N          first stage (default $stage)
  --stop-stage N     last stage (default $stop_stage)
  --work DIR         everything that is made (default egs/mini_en/work)
  --python FILE      Python with nar_speech installed (default \$PYTHON or python3)
  --shared-data DIR  folder with librispeech251, coffee_commands ... (default ../shared/data where it exists);
                     without it the sources that have a repository of their own are cloned, the others skipped
  --github WHERE     server, or a folder of owner+name/repo mirrors (default $github)
  --jobs N           processes of the synthesis (default $jobs)
  --hours-piper H    hours of Piper joe (default $hours_piper), likewise --hours-flite ($hours_flite)
                     and --hours-kokoro ($hours_kokoro); on one core Piper makes 14 s of speech a second, flite 60,
                     Kokoro 2.3
  --books N          sentences of public-domain books that may be spoken (default $books, 0 leaves the books out,
                     and with them the text of the language model)
  --vocab-size N     word pieces (default $vocab_size)
  --heads-minutes M  wall time of the first phase: branch and CTC head (default $heads_minutes)
  --train-minutes M  of the second phase: encoder, CTC and verifier (default $train_minutes)
  --decoder-minutes M  of the third phase: predictor and decoder (default $decoder_minutes)
  --stream-minutes M   of the streaming twin, after the export of its teacher (default $stream_minutes, 0: no twin)
  --verifier-size N  pieces of the verifier's vocabulary (default $verifier_size)
  --processes N      training processes of one thread each (default $processes)
  --filter-model DIR model folder with a CTC head; stage 2 drops the speechocean762 clips whose transcript it
                     finds unlikely (default: the shipped nar_speech/assets/mini_en; none: nothing is dropped)
  --filter-score S   mean log probability per token below which a clip is dropped (default $filter_score)
  --pack DIR         stage 2 also packs the training audio as Opus into a few files of DIR, to be taken to another
                     machine (local/pack.py unpack there; then --stage 3)
  --pack-mib N       their size in MiB (default $pack_mib)
  --name NAME        of the model (default $name)
  --embed            stage 6 copies the model folder to nar_speech/assets/NAME
  --seed N           of sentences, voices and training (default $seed)
  -- key=value ...   passed to the recipes of stage 3, recipes/draft_verify.py
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
    --stage | --stop-stage | --work | --python | --shared-data | --github | --jobs | --hours-piper | --hours-flite | \
      --hours-kokoro | --vocab-size | --heads-minutes | --train-minutes | --decoder-minutes | --stream-minutes | --verifier-size | --processes | --filter-model | --filter-score | --books | --pack | --pack-mib | --name | --seed) ;;
    *) fail "unknown option $option; --help lists them" ;;
  esac
  [ $# -ge 2 ] || fail "$option needs a value"
  key=${option#--}
  printf -v "${key//-/_}" '%s' "$2"
  shift 2
done
for number in stage stop_stage jobs books pack_mib processes vocab_size verifier_size seed; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number//_/-} must be a whole number, got '${!number}'"
done
for number in hours_piper hours_flite hours_kokoro heads_minutes train_minutes decoder_minutes stream_minutes; do
  [[ ${!number} =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--${number//_/-} must be a number, got '${!number}'"
done
if [ -n "$shared_data" ] && [ ! -d "$shared_data" ]; then fail "--shared-data: no folder $shared_data"; fi
if [ -z "$shared_data" ] && [ -d "$repo/../shared/data" ]; then shared_data="$repo/../shared/data"; fi

if [ "$filter_model" != none ] && [ ! -e "$filter_model/model.yaml" ]; then
  echo "!!! no model in $filter_model: speechocean762 is not filtered (--filter-model)" >&2
fi

mkdir -p "$work/done" "$work/log"
work=$(cd "$work" && pwd)
shared=()
if [ -n "$shared_data" ]; then shared=(--shared-data "$(cd "$shared_data" && pwd)"); fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1

source "$repo/egs/common/stages.sh"

py() { "$python" "$here/local/$1.py" "${@:2}"; }

recordings() { py prepare_real --work "$work" "${shared[@]}" --github "$github"; }
evaluation() { py prepare_eval --work "$work" "${shared[@]}" --github "$github"; }

# Text of a language model in lm/, and novel sentences for the voices.
books_text() {
  if [ "$books" = 0 ]; then return 0; fi
  py find_books --work "$work" --github "$github" --spoken "$books" --jobs "$jobs" --seed "$seed"
}

sentences() {
  local held=() prose=() novels=()
  if [ -e "$work/real/ljspeech32.jsonl" ]; then held=(--held-out "$work/real/ljspeech32.jsonl"); fi
  py find_prose --work "$work" "${shared[@]}" --github "$github"
  if [ -e "$work/synth/prose.txt" ]; then prose=(--prose "$work/synth/prose.txt"); fi
  if [ "$books" != 0 ] && [ -e "$work/synth/books.txt" ]; then
    novels=(--books "$work/synth/books.txt" --books-count "$books")
  fi
  py make_text "${prose[@]}" "${novels[@]}" "${held[@]}" --work "$work" --seed "$seed" --out "$work/synth/text.jsonl"
}

# Every voice in $jobs processes; a run that was stopped goes on where it was.
speech() {
  local voice hours shard pids pid bad=0
  for voice in flite piper kokoro; do
    hours="hours_$voice"
    pids=()
    for ((shard = 0; shard < jobs; shard++)); do
      "$work/tools/bin/python" "$here/local/synthesize.py" --engine "$voice" --text "$work/synth/text.jsonl" \
        --hours "${!hours}" --shard "$shard/$jobs" --seed "$seed" --out "$work/synth" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || bad=1; done
    [ "$bad" = 0 ] || fail "synthesis with $voice failed, see above; the same command goes on from there"
  done
}

# Its transcripts of the recordings say what is written with a capital, and where the commas are.
teacher() { py teacher --work "$work"; }

# Whisper's encoder whole; of its decoder the pieces that these texts need.
whisper() {
  local texts=("$work"/synth/text*.jsonl "$work"/real/cased/*.jsonl)
  py convert_whisper --output "$work/whisper_tiny_en.safetensors"
  py prune_whisper --size "$verifier_size" --first 6000 --output "$work/verifier" "${texts[@]}"
  py convert_whisper --parts decoder --decoder-ids "$work/verifier/verifier_ids.json" \
    --output "$work/verifier/decoder.safetensors"
}

manifests() {
  local filter=()
  if [ "$filter_model" != none ] && [ -e "$filter_model/model.yaml" ]; then
    py filter_speechocean --work "$work" --model "$filter_model"
    filter=(--least-score "$filter_score")
  fi
  py make_cuts --work "$work" "${shared[@]}" --vocab-size "$vocab_size" --seed "$seed" "${filter[@]}" \
    --repeat librispeech251=5 dctts_reader=3 asterisk=2 fsdd=2 synthetic_kokoro=3 synthetic_piper=2
}

packing() { py pack pack --work "$work" --out "$pack" --mib "$pack_mib" --jobs "$jobs" --seed "$seed"; }

# train NAME MINUTES SETTING ...: one run of the recipe in work/exp/NAME with conf/NAME.yaml.
train() {
  local run="$1" minutes="$2" noise=()
  shift 2
  if [ -e "$work/cuts/noise.jsonl.gz" ]; then noise=("augment.noise=$work/cuts/noise.jsonl.gz"); fi
  local settings=(
    "$repo/configs/draft_verify/mini_en.yaml" "$here/conf/$run.yaml"
    "train.output_dir=$work/exp/$run" "train.max_minutes=$minutes" train.threads=1 "train.seed=$seed"
    "data.train=[$work/cuts/train.jsonl.gz]" "data.dev=[$work/cuts/dev.jsonl.gz]"
    "tokenizer.file=$work/bpe.model" "verifier.tokenizer=$work/verifier/verifier.json"
    "${noise[@]}" "$@" "${extra[@]}"
  )
  (cd "$repo" && "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m recipes.draft_verify "${settings[@]}") 2>&1 | tee -a "$work/log/train_$run.log"
}

heads() {
  train heads "$heads_minutes" "init.init_from=$work/whisper_tiny_en.safetensors" init.partial=true \
    'init.prefix={"encoder.": "encoder."}' "init_verifier.init_from=$work/verifier/decoder.safetensors" \
    'init_verifier.prefix={"decoder.": ""}'
}

# from NAME: all weights of that run.
from() {
  local weights="$work/exp/$1/final.safetensors"
  settings_from=("init.init_from=$weights" "init_verifier.init_from=$weights" 'init_verifier.prefix={"verifier.": ""}')
}
joint() { from heads && train joint "$train_minutes" "${settings_from[@]}"; }
decoder() { from joint && train decoder "$decoder_minutes" "${settings_from[@]}"; }

export_model() {
  local run="$work/exp/decoder"
  [ -e "$run/final.safetensors" ] || run="$work/exp/joint"
  local lm=()
  if [ -e "$work/lm.safetensors" ]; then lm=(--lm "$work/lm.safetensors"); fi
  py export --run "$run" --name "$name" --out "$work/model" "${lm[@]}"
  if [ ${#lm[@]} -gt 0 ]; then
    py tune_lm --model "$work/model" "${lm[@]}" --cuts "$work/cuts/dev.jsonl.gz" \
      --prior-cuts "$work/cuts/train.jsonl.gz" --write
  fi
}
# Encoder and CTC head of the model, taught by it to hear in chunks.
stream() {
  local noise=() run="$work/exp/joint"
  if [ -e "$work/cuts/noise.jsonl.gz" ]; then noise=("augment.noise=$work/cuts/noise.jsonl.gz"); fi
  local settings=(
    "$repo/configs/ctc/mini_en_stream.yaml" "train.output_dir=$work/exp/stream" "train.max_minutes=$stream_minutes"
    train.threads=1 "train.seed=$seed" "data.train=[$work/cuts/train.jsonl.gz]" "data.dev=[$work/cuts/dev.jsonl.gz]"
    "tokenizer.file=$work/bpe.model" "init.init_from=$run/final.safetensors"
    'init.prefix={"encoder.": "encoder.", "ctc.": "ctc."}' "teacher.model=$work/model" "${noise[@]}"
  )
  (cd "$repo" && "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m recipes.ctc \
    "${settings[@]}") 2>&1 | tee -a "$work/log/train_stream.log"
  py export_stream --run "$work/exp/stream" --teacher "$work/model" --name "${name}_stream" --out "$work/stream_model"
  if [ -e "$work/lm_stream.safetensors" ]; then
    py tune_lm --model "$work/stream_model" --lm "$work/lm_stream.safetensors" --cuts "$work/cuts/dev.jsonl.gz" \
      --prior-cuts "$work/cuts/train.jsonl.gz" --write
  fi
}
# The beam's word 3-gram; without books there is no text to make one of.
language_model() {
  if [ "$books" = 0 ]; then return 0; fi
  py make_lm --work "$work" --out "$work/lm.safetensors"
  py make_lm --work "$work" --out "$work/lm_stream.safetensors" --vocab 30000 --entropy 1.8e-6 --limit 1.6
}
scores() { py score --work "$work" --model "$work/model"; }
stream_scores() {
  py score --work "$work" --model "$work/stream_model" --scores scores_stream \
    --decoders ctc_greedy ctc_beam ctc_beam_lm
}
results() {
  local flags=()
  if $embed; then flags=(--embed "$repo/nar_speech/assets/$name"); fi
  py results --work "$work" --name "$name" --out "$here/RESULTS.md" "${flags[@]}"
}

if [ "$stage" -le 1 ]; then
  bash "$here/prepare.sh" --work "$work" --python "$python"
fi
part 0 recordings recordings
part 0 evaluation evaluation
part 1 books books_text
part 1 sentences sentences
part 1 speech speech
part 2 teacher teacher
part 2 whisper whisper
part 2 manifests manifests
if [ -n "$pack" ]; then part 2 pack packing; fi
part 3 heads heads
part 3 joint joint
part 3 decoder decoder
part 4 language_model language_model
part 4 export export_model
if [ "$stream_minutes" != 0 ]; then part 4 stream stream; fi
part 5 scores scores
if [ "$stream_minutes" != 0 ]; then part 5 stream_scores stream_scores; fi
# Always made anew: it only reads what the other stages wrote.
if [ "$stage" -le 6 ] && [ "$stop_stage" -ge 6 ]; then results; fi
