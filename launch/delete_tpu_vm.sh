#!/usr/bin/env bash
# Deletes a TPU slice and everything on its disks; the run itself is in its bucket.
#
#   launch/delete_tpu_vm.sh --name=NAME --zone=ZONE [--project=PROJECT]
#
# --provider=queued      (default) deletes the request and its node; or tpu-vm
# --dry-run              print the command only

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

for argument in "$@"; do
    common_flag "$argument"
done
need name zone

mapfile -t flags < <(location)
if [ "$provider" = queued ]; then
    # --force also deletes the node; without it only a request without a node can be deleted.
    run gcloud compute tpus queued-resources delete "$name" "${flags[@]}" --force --quiet
else
    run gcloud compute tpus tpu-vm delete "$name" "${flags[@]}" --quiet
fi
