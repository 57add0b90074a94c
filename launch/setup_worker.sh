#!/usr/bin/env bash
# Installs a revision of this checkout, with its pinned dependencies, on every worker of a slice. May be run again.
#
#   launch/setup_worker.sh --name=NAME --zone=ZONE [--project=PROJECT]
#
# --revision=HEAD        the git revision to install; uncommitted changes are left out
# --env-file=FILE        NAME=VALUE lines for the run's environment: the place for secrets (HF_TOKEN=...)
# --prepare=FILE         a script that each worker runs at the end of every setup, with the run's environment:
#                        prepare_copy.sh or prepare_mount.sh for data in a bucket, or your own
# --internal-ips         connect to the workers by their internal addresses
# --dry-run              print the commands only

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
checkout=$(cd "$(dirname "$0")/.." && pwd)

revision="HEAD" env_file="" prepare=""
for argument in "$@"; do
    case $argument in
    --revision=*) revision=${argument#*=} ;;
    --env-file=*) env_file=${argument#*=} ;;
    --prepare=*) prepare=${argument#*=} ;;
    *) common_flag "$argument" ;;
    esac
done
need name zone
[ -z "$env_file" ] || [ -f "$env_file" ] || fail "--env-file=$env_file: no such file"
[ -z "$prepare" ] || [ -f "$prepare" ] || fail "--prepare=$prepare: no such file"
commit=$(git -C "$checkout" rev-parse --short=12 --verify --quiet "$revision^{commit}") ||
    fail "--revision=$revision: not a revision of $checkout (which must be a git checkout)"
[ -z "$(git -C "$checkout" status --porcelain)" ] || echo "setup_worker.sh: installing $commit without the uncommitted changes" >&2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run git -C "$checkout" archive --format=tar.gz "--output=$folder/code.tar.gz" "$commit"

# One worker first: all of them at once would update the project's ssh keys concurrently, which gcloud rejects.
on_workers 0 true
to_workers "$folder/code.tar.gz" "clip_jax-$commit.tar.gz"
if [ -n "$env_file" ]; then
    install -m 600 "$env_file" "$folder/env"
    to_workers "$folder/env" .clip_jax.env
fi
code="clip_jax/code-$commit"
on_workers all "mkdir -p $code && tar -xzf clip_jax-$commit.tar.gz -C $code && bash $code/launch/worker.sh setup"
if [ -n "$prepare" ]; then
    to_workers "$prepare" clip_jax/prepare.sh
    on_workers all "set -a && { [ ! -f .clip_jax.env ] || . ./.clip_jax.env; } && bash clip_jax/prepare.sh"
fi
