# Sourced by egs/<corpus>/prepare.sh: lhotse manifests from a local copy of the corpus that settings.sh describes.
# shellcheck shell=bash disable=SC2154

corpus_dir=""
data_dir="$here/data"
jobs=4
python=${PYTHON:-python3}

usage() {
  cat <<END
Usage: bash egs/$corpus/prepare.sh --corpus-dir DIR [options]

Writes DATA/train.jsonl.gz and DATA/dev.jsonl.gz (lhotse CutSets) and DATA/PART.jsonl of every dev and test part
for nar-speech evaluate. Audio stays where it is.

  --corpus-dir DIR   $corpus_holds (required)
  --data-dir DIR     where manifests go (default egs/$corpus/data)
  --train PARTS      (default "$train")
  --dev PARTS        (default "$dev")
  --test PARTS       (default "$test")
  --jobs N           threads (default $jobs)
  --python FILE      Python with nar_speech installed (default \$PYTHON or python3)
END
}

fail() {
  echo "prepare.sh: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --corpus-dir | --data-dir | --train | --dev | --test | --jobs | --python) ;;
    *) fail "unknown option $1; --help lists them" ;;
  esac
  [ $# -ge 2 ] || fail "$1 needs a value"
  key=${1#--}
  printf -v "${key//-/_}" '%s' "$2"
  shift 2
done
[ -n "$corpus_dir" ] || fail "--corpus-dir is required: $corpus_holds"
[ -d "$corpus_dir" ] || fail "--corpus-dir: no folder $corpus_dir"
[[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "--jobs must be a whole number above 0, got '$jobs'"

export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
# Lists of parts are split at spaces on purpose.
# shellcheck disable=SC2086
"$python" -m nar_speech.data.corpora "$corpus" --corpus-dir "$corpus_dir" --data-dir "$data_dir" \
  --train $train --dev $dev --test $test --jobs "$jobs"
