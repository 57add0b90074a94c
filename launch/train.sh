#!/usr/bin/env bash
# Starts a run on every worker of a slice that setup_worker.sh has set up. The run survives a dropped connection.
#
#   launch/train.sh --name=NAME --zone=ZONE [--project=PROJECT] --hosts=4 -- --config=configs/... --workdir=gs://...
#
# --hosts=N              the number of workers (launch/tpu.py derives it from the accelerator)
# --follow               show worker 0's log until the run ends; Ctrl-C does not stop the run
# --                     the flags after it are passed to main.py
# --dry-run              print the commands only

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

hosts="" follow=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --hosts=*) hosts=${1#*=} ;;
    --follow) follow=yes ;;
    *) common_flag "$1" ;;
    esac
    shift
done
need name zone hosts
[ $# -gt 1 ] || fail "the flags of main.py are missing: -- --config=configs/NAME.py --workdir=gs://BUCKET/NAME"
shift

# A command line is visible to every user of both machines, and is logged.
for argument in "$@"; do
    key=${argument%%=*}
    if [[ $argument = *=* && ${key,,} =~ (^|[-_.])(token|secret|password|passwd|credentials?|api_?key)$ ]]; then
        fail "$key: secrets do not belong on the command line; use setup_worker.sh --env-file=FILE"
    fi
done

on_workers all "bash clip_jax/code/launch/worker.sh start $(quoted "$hosts" "$@")"
[ -z "$follow" ] || on_workers 0 "bash clip_jax/code/launch/worker.sh follow 0 1000000"
