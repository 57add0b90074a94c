#!/usr/bin/env bash
# Requests a TPU slice.
#
#   launch/create_tpu_vm.sh --name=NAME --zone=ZONE --accelerator=v5litepod-16 [--project=PROJECT]
#
# --capacity=spot        (default) cheap, may be preempted at any time; or on-demand, or reserved
# --provider=queued      (default) waits in a queue for capacity; or tpu-vm: succeeds or fails at once
# --version=...          the runtime version; default: the one for the accelerator
# --wait=6h              queued: the request expires after this time
# --service-account=...  the identity of the slice
# --internal-ips         no external IP addresses
# --dry-run              print the command only

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

accelerator="" capacity="spot" version="" wait="" service_account=""
for argument in "$@"; do
    case $argument in
    --accelerator=*) accelerator=${argument#*=} ;;
    --capacity=spot | --capacity=on-demand | --capacity=reserved) capacity=${argument#*=} ;;
    --version=*) version=${argument#*=} ;;
    --wait=*) wait=${argument#*=} ;;
    --service-account=*) service_account=${argument#*=} ;;
    *) common_flag "$argument" ;;
    esac
done
need name zone accelerator

# Source: cloud.google.com/tpu/docs/runtimes
if [ -z "$version" ]; then
    case $accelerator in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "--accelerator=$accelerator has no known runtime; pass --version=..." ;;
    esac
fi

mapfile -t flags < <(location)
flags+=("--accelerator-type=$accelerator")
case $capacity in
spot) flags+=(--spot) ;;
reserved) flags+=(--reserved) ;;
esac
[ -z "$service_account" ] || flags+=("--service-account=$service_account")
[ -z "$internal_ips" ] || flags+=(--internal-ips)

if [ "$provider" = queued ]; then
    # The request and its node share one name. The flag for the version differs from the one below.
    flags+=("--node-id=$name" "--runtime-version=$version" --async)
    [ -z "$wait" ] || flags+=("--valid-until-duration=$wait")
    run gcloud compute tpus queued-resources create "$name" "${flags[@]}"
else
    run gcloud compute tpus tpu-vm create "$name" "${flags[@]}" "--version=$version"
fi
