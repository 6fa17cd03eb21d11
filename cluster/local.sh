#!/usr/bin/env bash
# A Ray cluster on this machine, with dashboard and token auth, for `ray job submit`.
#
#   cluster/local.sh up       start it; prints how to submit a job
#   cluster/local.sh status   what runs (exit code 3: nothing)
#   cluster/local.sh down     end exactly what `up` started, and its children
#
# Set in the environment, alike for all three, to move or grow it; two clusters need other ports and directories:
#   CLUSTER_DIR=runs/cluster   token (0600), process ids, logs
#   DASHBOARD_PORT=8265        dashboard and job submission
#   GCS_PORT=6379              where nodes and drivers join
#   NODES=1                    nodes to pretend to be; each gets CPUS
#   CPUS=<all>                 CPUs of a node
# The dashboard listens on 127.0.0.1 alone. Ray's own ports, where nodes and drivers meet, are on all interfaces,
# behind the token; but for GCS_PORT they are free ones, taken as they are found.
set -Eeuo pipefail  # E: what goes wrong within `up` ends what it has started

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${CLUSTER_DIR:-$root/runs/cluster}
dashboard_port=${DASHBOARD_PORT:-8265}
gcs_port=${GCS_PORT:-6379}
nodes=${NODES:-1}
host=127.0.0.1
bin=${VENV:-$root/.venv}/bin
# Short: sockets lie in it, and their paths may have 107 characters. Not /tmp/ray: other clusters live there.
temp=${TMPDIR:-/tmp}/recsys-$(id -u)-$gcs_port

export PATH=$bin:$PATH  # a job's `python` is the one on the cluster's PATH
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token
export RAY_USAGE_STATS_ENABLED=0
# idle processes that a node keeps for the next stage of Ray Data, and their memory: see recsys_dist/session.py
export RAY_num_workers_soft_limit=${RAY_num_workers_soft_limit:-$((4 * ${CPUS:-$(nproc)}))}
export ARROW_DEFAULT_MEMORY_POOL=${ARROW_DEFAULT_MEMORY_POOL:-jemalloc}

main() {
  case ${1:-} in
    up) up ;;
    status) status ;;
    down) down ;;
    *)
      sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
}

up() {
  [[ -x $bin/ray ]] || fail "no $bin/ray; run 'make install' first"
  if [[ -n $(living) ]]; then
    echo "already up"
    how_to
    return
  fi
  mkdir -p "$dir"
  chmod 700 "$dir"
  (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$dir/token")
  : >"$dir/pids"
  trap 'down >&2' ERR INT TERM
  start head --head --port="$gcs_port" --dashboard-host="$host" --dashboard-port="$dashboard_port" \
    --ray-client-server-port="$(free_port)" --temp-dir="$temp"
  wait_until answers "$dir/head.log"
  for ((number = 2; number <= nodes; number++)); do
    start "node$number" --address="$host:$gcs_port"
  done
  wait_until all_joined "$dir/head.log"
  trap - ERR INT TERM
  cat >"$dir/env" <<EOF
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='$dir/token' RAY_API_SERVER_ADDRESS=http://$host:$dashboard_port
EOF
  how_to
}

# A node in the background, its process id kept. Worker ports 0: free ones, so that clusters do not meet.
start() {
  local name=$1
  shift
  nohup "$bin/ray" start "$@" --block ${CPUS:+--num-cpus="$CPUS"} \
    --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 \
    --disable-usage-stats >"$dir/$name.log" 2>&1 </dev/null &
  echo "$! $(started $!)" >>"$dir/pids"
}

status() {
  if [[ -z $(living) ]]; then
    echo "down (nothing of $dir runs)"
    exit 3
  fi
  echo "up: http://$host:$dashboard_port, $(api /nodes?view=summary | grep -o '"state": *"ALIVE"' | wc -l) of $nodes nodes;" \
    "process ids $(living | tr '\n' ' ')"
}

down() {
  local roots all pid
  roots=$(living)
  if [[ -z $roots ]]; then
    echo "nothing to end"
    rm -f "$dir/pids"
    return
  fi
  all=$(for pid in $roots; do family "$pid"; done)
  # shellcheck disable=SC2086 # process ids, one word each
  kill $roots 2>/dev/null || true
  for ((tries = 0; tries < 100; tries++)); do
    [[ -z $(of_us_alive "$all") ]] && break
    sleep 0.1
  done
  for pid in $(of_us_alive "$all"); do kill -9 "$pid" 2>/dev/null || true; done
  rm -rf "$dir/pids" "$dir/env" "$temp"
  echo "down"
}

# `pid@start` of a process and all below it. The start tells it from a later one with the same number.
family() {
  echo "$1@$(started "$1")"
  local child
  for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do family "$child"; done
}

of_us_alive() {
  local one
  for one in $1; do
    [[ $(started "${one%@*}") == "${one#*@}" ]] && echo "${one%@*}"
  done
  true
}

# Those of our recorded processes that still run.
living() {
  [[ -f $dir/pids ]] || return 0
  of_us_alive "$(tr ' ' '@' <"$dir/pids")"
}

# When a process began, in clock ticks since boot; nothing where it has ended.
started() {
  local stat fields
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
  read -ra fields <<<"${stat##*) }"  # what follows the name, which may hold spaces
  [[ ${fields[0]} == Z ]] || echo "${fields[19]}"
}

answers() { api /api/jobs/ >/dev/null 2>&1; }

all_joined() { [[ $(api '/nodes?view=summary' 2>/dev/null | grep -o '"state": *"ALIVE"' | wc -l) -ge $nodes ]]; }

api() {
  python - "http://$host:$dashboard_port$1" "$dir/token" <<'EOF'
import sys, urllib.request
from pathlib import Path
headers = {"Authorization": "Bearer " + Path(sys.argv[2]).read_text()}
with urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers), timeout=10) as answer:
    print(answer.read().decode())
EOF
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

wait_until() {
  for ((tries = 0; tries < 240; tries++)); do
    "$1" && return
    [[ -n $(living) ]] || break
    sleep 0.5
  done
  tail -n 20 "$2" >&2
  fail "the cluster did not come up; logs are in $dir"
}

how_to() {
  cat <<EOF
dashboard: http://$host:$dashboard_port   (it asks for the token in $dir/token)
submit a job, with absolute paths for data and results, because it runs in a copy of this directory:
  source $dir/env
  ray job submit --working-dir . -- python -m jobs.prepare simulate --out $root/runs/data
  ray job submit --working-dir . -- python -m jobs.train wide_deep data=$root/runs/data --out $root/runs/train
EOF
}

fail() {
  echo "error: $*" >&2
  false
}

main "$@"
