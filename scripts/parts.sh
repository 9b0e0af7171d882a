# For scripts that run many parts on a GPU machine, none of which can hang the others. To be sourced.
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
summary=()

part() { # name, seconds, command...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "=== $name"
  timeout --signal=TERM --kill-after=5 "$limit" "$@" 2>&1 | tail -n "${LINES_SHOWN:-45}"
  local code=${PIPESTATUS[0]}
  summary+=("$(printf '%-28s exit %3d %5d s' "$name" "$code" $((SECONDS - started)))")
  return "$code"
}

finish() {
  echo "=== processes left on the GPUs"
  nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader
  printf '%s\n' "=== summary" "${summary[@]}"
}
