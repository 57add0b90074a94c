#!/usr/bin/env bash
# For --prepare: mounts the shards in $DATA (gs://BUCKET/FOLDER, a line of the --env-file) at ~/data on each worker.
#
# For data that does not fit on a disk. Set config.data.shuffle_block and shuffle_window, so that reads are long.

set -euo pipefail
: "${DATA:?DATA=gs://BUCKET/FOLDER is missing in --env-file}"
if ! command -v gcsfuse >/dev/null; then
    # Source: cloud.google.com/storage/docs/cloud-storage-fuse/install
    curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
        "gcsfuse-$(lsb_release -c -s) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A machine that has just booted may still be installing updates.
    sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
    sudo apt-get -o DPkg::Lock::Timeout=600 install -qq -y gcsfuse
fi
path=${DATA#gs://}
bucket=${path%%/*} folder=${path#"$bucket"}
folder=${folder#/}
mkdir -p "$HOME/data"
if ! mountpoint -q "$HOME/data"; then
    gcsfuse -o ro --implicit-dirs ${folder:+"--only-dir=$folder"} "$bucket" "$HOME/data"
fi
