#!/usr/bin/env bash
# Runs on each worker of a slice; the other scripts call it over ssh.
#
#   worker.sh setup                       creates the environment and the links for the code that contains this file
#   worker.sh start HOSTS FLAGS...        starts main.py in the background, after stopping an earlier one
#   worker.sh status [WORKDIR]            prints one line: state, exit code, newest checkpoint, last message
#   worker.sh follow BYTES SECONDS        prints the log from BYTES to its end, for at most SECONDS; then the status
#   worker.sh stop                        sends SIGTERM, so that a checkpoint is written, and SIGKILL a minute later

set -euo pipefail
code=$(cd "$(dirname "$0")/.." && pwd)
home=$HOME/clip_jax
run=$home/run
mark="::clip-jax"

setup() {
    mkdir -p "$run"
    [ ! -f "$HOME/.clip_jax.env" ] || chmod 600 "$HOME/.clip_jax.env"
    # One environment for all revisions with the same dependencies; the marker says that it is complete.
    local pins env python
    pins=$(cat "$code/setup.py" "$code/launch/constraints.txt" | sha256sum | cut -c1-12)
    env=$home/env-$pins
    if [ ! -f "$env/.complete" ]; then
        python=$(command -v python3.12) || python=$(newer_python)
        rm -rf "$env"
        "$python" -m venv "$env"
        "$env/bin/python" -m pip install --quiet -c "$code/launch/constraints.txt" "${code}[tpu,gcs]"
        touch "$env/.complete"
    fi
    ln -sfn "$env" "$home/env"
    ln -sfn "$code" "$home/code"
    echo "worker $(worker): $(basename "$code") with $(basename "$env")"
}

# The TPU runtimes ship Python 3.10, which current JAX does not support.
newer_python() {
    python3 -m pip install --quiet --user uv >&2
    "$HOME/.local/bin/uv" python install --quiet 3.12 >&2
    "$HOME/.local/bin/uv" python find 3.12
}

start() {
    local hosts=$1 argument
    shift
    stop
    # A killed process leaves libtpu's lock behind, and the next one would fail because the TPU is in use.
    rm -f "${TMPDIR:-/tmp}/libtpu_lockfile"
    for argument in "$@"; do
        case $argument in --workdir=*) echo "${argument#*=}" >"$run/workdir" ;; esac
    done
    if [ "$hosts" -gt 1 ]; then # the cluster's metadata joins the processes, unless the environment does
        export CLIP_JAX_COORDINATOR=${CLIP_JAX_COORDINATOR:-auto} CLIP_JAX_NUM_PROCESSES=${CLIP_JAX_NUM_PROCESSES:-$hosts}
    fi
    rm -f "$run/exit_code"
    [ ! -f "$run/log" ] || mv "$run/log" "$run/log.before"
    # A new session, so that the run does not depend on this connection.
    setsid bash "$code/launch/worker.sh" supervise "$@" </dev/null >"$run/log" 2>&1 &
    echo $! >"$run/pid"
}

# Runs main.py and records its exit code. The trap lets this shell survive the SIGTERM that main.py handles.
supervise() {
    trap : TERM
    if [ -f "$HOME/.clip_jax.env" ]; then
        set -a
        # shellcheck source=/dev/null
        source "$HOME/.clip_jax.env"
        set +a
    fi
    # A TPU that is busy or missing ends the run; by default JAX would train on the host's CPU for days.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
    local exit_code=0
    cd "$code"
    "$home/env/bin/python" main.py "$@" || exit_code=$?
    echo "$exit_code" >"$run/exit_code.tmp"
    mv "$run/exit_code.tmp" "$run/exit_code"
}

running() { [ -f "$run/pid" ] && [ ! -f "$run/exit_code" ] && kill -0 "$(cat "$run/pid")" 2>/dev/null; }

stop() {
    running || return 0
    local group waited=0
    group=$(cat "$run/pid")
    kill -TERM -- "-$group" 2>/dev/null || true
    while kill -0 -- "-$group" 2>/dev/null && [ "$waited" -lt 600 ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
    kill -KILL -- "-$group" 2>/dev/null || true
}

status() {
    local workdir=${1:-} state=none exit_code=- message=
    [ -n "$workdir" ] || [ ! -f "$run/workdir" ] || workdir=$(cat "$run/workdir")
    if running; then
        state=running
    elif [ -f "$run/exit_code" ]; then
        state=exited exit_code=$(cat "$run/exit_code")
    elif [ -f "$run/pid" ]; then
        state=exited exit_code=137 # killed together with its supervising shell
    fi
    workdir=${workdir/#\~\//$HOME/}
    [ ! -f "$run/log" ] || message=$(grep -a '^main.py: ' "$run/log" | tail -n 1) || true
    printf '\n%s worker=%s state=%s code=%s step=%s message=%s\n' \
        "$mark" "$(worker)" "$state" "$exit_code" "$(newest_checkpoint "$workdir")" "$message"
}

follow() {
    local from=$1 seconds=$2 watch=()
    if [ -f "$run/log" ]; then
        if running; then watch=(-f "--pid=$(cat "$run/pid")" -s 0.2); fi
        timeout "$seconds" tail -c "+$((from + 1))" "${watch[@]}" "$run/log" || true
    fi
    status
}

# The step of the newest complete checkpoint, or -.
newest_checkpoint() {
    local found=""
    case $1 in
    "") ;;
    gs://*) # a bucket shows a folder before it is complete; Orbax marks the complete ones
        found=$(gcloud storage ls "$1/checkpoints/*/commit_success*" 2>/dev/null |
            sed -n 's|.*/checkpoints/\([0-9]*\)/.*|\1|p' | sort -n | tail -n 1) || true
        ;;
    *) [ ! -d "$1/checkpoints" ] || found=$(find "$1/checkpoints" -mindepth 1 -maxdepth 1 -printf '%f\n' |
        sed -n '/^[0-9][0-9]*$/p' | sort -n | tail -n 1) ;;
    esac
    echo "${found:--}"
}

# The number of this worker: in the environment on GKE, from the metadata server on a TPU VM.
worker() {
    echo "${TPU_WORKER_ID:-$(curl -sf --max-time 5 -H 'Metadata-Flavor: Google' \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo '?')}"
}

case ${1:-} in
setup | start | supervise | status | follow | stop) "$@" ;;
*) echo "worker.sh: ${1:-} is not one of setup, start, status, follow, stop" >&2 && exit 2 ;;
esac
