"""The version and the commit; setup.py reads this file without importing anything else."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """The commit of the checkout that this code runs from, with ``-dirty`` after it if files differ; else ``""``."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed, or inside of another project's checkout
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or not the user's checkout
        return ""
