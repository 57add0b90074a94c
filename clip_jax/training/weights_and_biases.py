"""Weights & Biases beside TensorBoard: the lines of ``metrics.jsonl``, in the project that ``config.log.wandb`` names.

The run's id there is kept in the run folder, so that a restart continues the same run. Credentials and mode are the
library's own: ``wandb login`` or WANDB_API_KEY; WANDB_MODE=offline writes below the folder, for ``wandb sync``.
"""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.storage import atomic

ID_FILE = "wandb_id.txt"


def start(workdir: Path, project: str, config: Mapping[str, Any]) -> Any:
    """wandb's run, whose ``log`` takes lines with their ``step``. Raises UserError if it cannot begin."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"config.log.wandb={project}: pip install 'clip-jax-tpu[wandb]'") from error
    file = workdir / ID_FILE
    if not file.exists():
        atomic.write_text(file, secrets.token_hex(8))
    try:
        run = wandb.init(
            project=project,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
            settings=wandb.Settings(console="off"),  # it would replace the standard output of the process
        )
    except Exception as error:  # of wandb's, which have no common ancestor in all its versions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"config.log.wandb={project}: {reason}; `wandb login`, or WANDB_MODE=offline in the environment"
        ) from error
    # wandb drops lines whose own step does not grow, and a resumed run repeats some: ours is a metric like others.
    run.define_metric("*", step_metric="step")
    return run
