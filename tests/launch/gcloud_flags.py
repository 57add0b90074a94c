"""The flags that each gcloud command takes, from its page in cloud.google.com/sdk/gcloud/reference (2025-10).

Only the generally available track: ``tpu-vm ssh --batch-size`` and ``--tunnel-through-iap`` exist only in alpha.
As a program: checks a command of xpk.
"""

import sys

# fmt: off
EVERY_COMMAND = {
    "account", "billing-project", "configuration", "flags-file", "flatten", "format", "help",
    "impersonate-service-account", "log-http", "project", "quiet", "trace-token", "user-output-enabled", "verbosity",
}

_CREATE = {
    "zone", "async", "data-disk", "description", "internal-ips", "labels", "metadata",
    "metadata-from-file", "network", "range", "reserved", "scopes", "service-account", "shielded-secure-boot", "spot",
    "subnetwork", "tags", "accelerator-type", "topology", "type",
}
_SSH = {
    "dry-run", "force-key-file-overwrite", "internal-ip", "plain", "ssh-key-file", "strict-host-key-checking", "worker",
    "zone", "ssh-key-expiration", "ssh-key-expire-after",
}

FLAGS = {
    "compute tpus queued-resources create": _CREATE | {
        "runtime-version", "node-id", "node-count", "node-prefix", "guaranteed", "valid-after-duration",
        "valid-after-time", "valid-until-duration", "valid-until-time", "reservation-host-folder",
        "reservation-host-organization", "reservation-host-project",
    },
    "compute tpus queued-resources describe": {"zone"},
    "compute tpus queued-resources delete": {"zone", "async", "force"},
    "compute tpus tpu-vm create": _CREATE | {"version", "preemptible", "queue-count"},
    "compute tpus tpu-vm describe": {"zone"},
    "compute tpus tpu-vm delete": {"zone", "async"},
    "compute tpus tpu-vm ssh": _SSH | {"ssh-flag", "command", "output-directory"},
    "compute tpus tpu-vm scp": _SSH | {"compress", "recurse", "scp-flag"},
    "storage ls": {
        "all-versions", "buckets", "etag", "fetch-encrypted-object-hashes", "full",
        "json", "long", "next-page-token", "readable-sizes", "recursive", "soft-deleted", "additional-headers",
    },
    "storage buckets create": {
        "location", "default-storage-class", "uniform-bucket-level-access", "placement", "retention-period",
        "soft-delete-duration", "public-access-prevention", "enable-autoclass", "enable-hierarchical-namespace",
    },
    "storage cp": {"recursive", "no-clobber", "gzip-in-flight", "gzip-local", "manifest-path", "continue-on-error"},
    "storage rsync": {"recursive", "delete-unmatched-destination-objects", "exclude", "checksums-only", "no-clobber"},
    "storage buckets add-iam-policy-binding": {"member", "role", "condition", "condition-from-file"},
    "storage rm": {"recursive", "all-versions", "continue-on-error", "exclude-managed-folders"},
    "iam service-accounts create": {"description", "display-name"},
    "compute tpus accelerator-types list": {"zone", "filter", "limit", "page-size", "sort-by"},
    "compute tpus queued-resources list": {"zone", "filter", "limit", "page-size", "sort-by"},
    "config set": {"installation"},
    "services enable": {"async"},
    "auth login": {"brief", "launch-browser", "update-adc", "force"},
}

XPK = {
    "workload create": {
        "workload", "cluster", "project", "zone", "tpu-type", "device-type", "command", "docker-image",
        "base-docker-image", "script-dir", "num-slices", "priority", "max-restarts", "restart-on-exit-codes",
        "termination-grace-period-seconds", "ttl-seconds-after-finished", "env", "env-file", "spot", "on-demand",
        "reservation", "dry-run", "quiet", "skip-validation",
    },
    "workload list": {"cluster", "project", "zone", "filter-by-status", "filter-by-job", "wait-for-job-completion"},
    "workload delete": {"cluster", "project", "zone", "workload", "filter-by-status", "filter-by-job", "force"},
    "cluster create": {
        "cluster", "project", "zone", "tpu-type", "device-type", "num-slices", "num-nodes", "spot", "on-demand",
        "reservation", "gke-version", "host-maintenance-interval", "default-pool-cpu-machine-type",
        "default-pool-cpu-num-nodes", "custom-cluster-arguments", "custom-nodepool-arguments", "private", "force",
        "dry-run", "quiet", "skip-validation",
    },
    "cluster delete": {"cluster", "project", "zone", "force", "dry-run", "quiet", "skip-validation"},
}
# fmt: on
"""The flags of the xpk commands in the guides, from its parsers (AI-Hypercomputer/xpk, src/xpk/parser)."""


def command_of(words: list[str]) -> str | None:
    """The longest known command at the start of the words (without ``gcloud``)."""
    for length in range(len(words), 0, -1):
        if " ".join(words[:length]) in FLAGS:
            return " ".join(words[:length])
    return None


def unknown_flags(words: list[str]) -> list[str]:
    """The flags that the command does not take; words after ``--`` are not gcloud's."""
    known = FLAGS[command_of(words)] | EVERY_COMMAND
    own = words[: words.index("--")] if "--" in words else words
    return [w for w in own if w.startswith("--") and w[2:].partition("=")[0] not in known]


def check_xpk(words: list[str]) -> str | None:
    """The error for a command or flags that xpk does not have."""
    command = " ".join(words[:2])
    unknown = [w for w in words[2:] if w.startswith("--") and w[2:].partition("=")[0] not in XPK.get(command, ())]
    return f"xpk {command}: unknown {' '.join(unknown) or 'command'}" if unknown or command not in XPK else None


if __name__ == "__main__":
    sys.exit(check_xpk(sys.argv[1:]))
