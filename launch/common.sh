# shellcheck shell=bash
# Shared by the launch scripts: their common flags, and run(), which prints a command before it runs it.

# shellcheck disable=SC2034  # read by the scripts that source this file
name="" zone="" project="" provider="queued" internal_ips="" dry_run=""

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# Sets the variable of a flag that all scripts take, and rejects any other argument.
# shellcheck disable=SC2034
common_flag() {
    case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --provider=queued | --provider=tpu-vm) provider=${1#*=} ;;
    --internal-ips) internal_ips=yes ;;
    --dry-run) dry_run=yes ;;
    --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
    *) fail "$1 is not a flag of this script; try --help" ;;
    esac
}

need() {
    local flag variable
    for flag in "$@"; do
        variable=${flag//-/_}
        [ -n "${!variable}" ] || fail "--$flag=... is missing"
    done
}

# The arguments as one line of shell, each quoted where necessary.
quoted() {
    local argument line=()
    for argument in "$@"; do
        if [[ $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
            line+=("$argument")
        else
            line+=("'${argument//\'/\'\\\'\'}'")
        fi
    done
    printf '%s' "${line[*]}"
}

# Prints the command so that it can be pasted, and runs it unless --dry-run is given.
run() {
    printf '+ %s\n' "$(quoted "$@")"
    [ -n "$dry_run" ] || "$@"
}

# The location of the slice, as flags of every gcloud command.
location() {
    printf '%s\n' "--zone=$zone"
    [ -z "$project" ] || printf '%s\n' "--project=$project"
}

# on_workers WORKER COMMAND: runs a line of shell on one worker (by its number) or on all.
on_workers() {
    local worker=$1 command=$2 flags
    mapfile -t flags < <(location)
    [ -z "$internal_ips" ] || flags+=(--internal-ip)
    run gcloud compute tpus tpu-vm ssh "$name" "${flags[@]}" --quiet "--worker=$worker" "--command=$command"
}

# to_workers FILE DESTINATION: copies a file to the home folder of every worker.
to_workers() {
    local flags
    mapfile -t flags < <(location)
    [ -z "$internal_ips" ] || flags+=(--internal-ip)
    run gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${flags[@]}" --quiet --worker=all
}
