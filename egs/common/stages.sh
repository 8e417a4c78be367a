# Sourced by run.sh of the embedded models; needs stage, stop_stage and work.

# part NUMBER NAME FUNCTION: run FUNCTION unless it is outside the wanted stages or its marker exists.
part() {
  if [ "$stage" -gt "$1" ] || [ "$stop_stage" -lt "$1" ]; then return 0; fi
  local marker="$work/done/$1-$2"
  if [ -e "$marker" ]; then
    echo "=== stage $1, $2: done before (remove $marker to repeat)"
    return 0
  fi
  echo "=== stage $1, $2 ($(date '+%H:%M:%S'))"
  "$3"
  touch "$marker"
}
