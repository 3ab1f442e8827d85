#!/usr/bin/env bash
# Runs N processes of a command on this host, each with its share of the GPUs, and ends when all have ended:
#   scripts/launch/one_host.sh 2 python -m jaxllm.train CONFIG.yaml
# One process drives all GPUs of a host too, and needs no launcher. Ctrl-C and SIGTERM go to every process.
# The exit status is the first that is not 0. A process that is stopped (SIGSTOP) is ended once another has ended.
set -euo pipefail
set -m # each process gets a group of its own, so that Ctrl-C reaches it once

if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
processes=$1
shift

gpus=0
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true)
elif command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | grep -c '^GPU' || true)
fi
if ((gpus % processes)); then
  echo "error: $processes processes cannot share $gpus GPUs evenly; choose a number that divides them" >&2
  exit 2
fi

# Below the ports that the system gives to connections.
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${JAX_COORDINATOR_PORT:-$((20000 + RANDOM % 12000))}
export JAX_NUM_PROCESSES=$processes
# Keeps other programs and other runs of this host out.
export JAXLLM_RUN_TOKEN=${JAXLLM_RUN_TOKEN:-$(od -An -N16 -tx8 /dev/urandom | tr -d ' \n')}

running=()
for ((process = 0; process < processes; process++)); do
  (
    export JAX_PROCESS_ID=$process
    if ((gpus)); then
      each=$((gpus / processes))
      JAX_LOCAL_DEVICE_IDS=$(seq -s , $((process * each)) $((process * each + each - 1)))
      export JAX_LOCAL_DEVICE_IDS
    fi
    exec "$@"
  ) &
  running+=($!)
done
trap 'kill -INT "${running[@]}" 2>/dev/null || true' INT
trap 'kill -TERM "${running[@]}" 2>/dev/null || true' TERM

exec {silence}<> <(:) # reading from it is a pause that a signal ends

stopped() {
  local line
  line=$(cat "/proc/$1/stat" 2>/dev/null) && [[ ${line##*) } == [Tt]* ]]
}

another_ended() {
  local pid
  for pid in "${running[@]}"; do
    [[ $pid == "$1" ]] || kill -0 "$pid" 2>/dev/null || return 0
  done
  return 1
}

# The other processes of a run end by themselves when one has ended; one that is stopped cannot.
end_stopped() {
  local seconds=0
  while stopped "$1" && another_ended "$1"; do
    ((++seconds))
    case $seconds in
      5) send TERM "$1" ;;
      15) send KILL "$1" ;;
    esac
    read -r -t 1 -u "$silence" || true
  done
  read -r -t 1 -u "$silence" || true
}

send() {
  echo "process $2 is stopped and others have ended: it is sent SIG$1" >&2
  kill -"$1" "$2" 2>/dev/null || true
  kill -CONT "$2" 2>/dev/null || true
}

status=0
for pid in "${running[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true # a signal ends the wait, not the process
    if stopped "$pid"; then end_stopped "$pid"; fi
  done
  code=0
  wait "$pid" || code=$?
  ((status)) || status=$code
done
exit "$status"
