#!/usr/bin/env bash
# For --prepare: copies the shards in $DATA (gs://BUCKET/FOLDER, a line of the --env-file) to ~/data on each worker.
#
# For data that fits on a worker's disk (100 GB, less what is installed). Files that exist there are not copied again.

set -euo pipefail
mkdir -p "$HOME/data"
gcloud storage rsync --recursive "${DATA:?DATA=gs://BUCKET/FOLDER is missing in --env-file}" "$HOME/data"
