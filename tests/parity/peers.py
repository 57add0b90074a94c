"""The peers' half of a parity test: a script that runs in their own environment, which ``make_env.sh`` builds.

The environment is in ``CLIP_JAX_PEERS``, or ``.venv-peers``; without it the parity tests are skipped with that reason.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("CLIP_JAX_PEERS") or ROOT / ".venv-peers")

MARKS = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not (PEERS / ".complete").exists(),
        reason=f"no peers at {PEERS}: run tests/peers/make_env.sh DIR and set CLIP_JAX_PEERS=DIR",
    ),
]


def run(script: str, folder: Path, jobs: Any = None) -> Path:
    """The script with ``folder`` as its argument, and ``jobs`` in its ``jobs.json``; returns the folder."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [PEERS / "bin" / "python", "-c", script, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def relative(ours, theirs) -> float:
    """The largest distance between two embeddings, relative to their norm."""
    difference = np.linalg.norm(np.asarray(ours) - theirs, axis=-1)
    return float(np.max(difference / np.linalg.norm(theirs, axis=-1)))
