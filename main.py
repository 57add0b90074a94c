"""Pretrains a CLIP: ``python main.py --config=configs/demo.py --workdir=runs/demo [--config.some.key=value ...]``.

``--workdir`` alone continues the run in that folder.
"""

import os
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging

from clip_jax import errors, interrupts
from clip_jax.command_line import split_overrides

flags.DEFINE_string("config", None, "A recipe: configs/NAME.py or configs/NAME.py:ARGUMENT.")
flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, metrics, report. Alone: continues the run in it.")
# Several processes: by flags, or by environment variables of the same names. A TPU slice of several hosts: auto.
flags.DEFINE_string(
    "coordinator", os.environ.get("CLIP_JAX_COORDINATOR"), "host:port of process 0; auto: ask the cluster."
)
flags.DEFINE_integer("num_processes", os.environ.get("CLIP_JAX_NUM_PROCESSES"), "How many processes the run has.")
flags.DEFINE_integer("process_id", os.environ.get("CLIP_JAX_PROCESS_ID"), "Which of them this is, from 0.")


def main(overrides: dict[str, str]) -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax and Grain narrate every file at INFO
    # Imported here, so that a mistyped flag is answered at once.
    from clip_jax.training import loop

    flag = flags.FLAGS
    return loop.run(
        workdir=flag.workdir,
        recipe=flag.config,
        overrides=overrides,
        processes=(flag.coordinator, flag.num_processes, flag.process_id),
    )


def leave(code: int) -> NoReturn:
    """Ends the process. One of several that fails alone does not wait, as JAX's own exit does for minutes, for others
    that will never come; they notice that it is gone."""
    together = code in (errors.EXIT_DONE, errors.EXIT_PREEMPTED, errors.EXIT_INTERRUPTED, errors.EXIT_NON_FINITE)
    if not together and flags.FLAGS.is_parsed() and flags.FLAGS.coordinator is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    interrupts.install()  # before JAX is imported, which takes seconds
    try:
        arguments, overrides = split_overrides(sys.argv)
        app.run(lambda _: leave(main(overrides)), argv=arguments)
    except errors.UserError as error:
        print(f"main.py: {error}", file=sys.stderr)
        leave(errors.EXIT_USER_ERROR)
    except errors.StoppedError as error:
        print(f"main.py: {error}", file=sys.stderr)
        leave(error.exit_code)
    except Exception:
        traceback.print_exc()
        leave(errors.EXIT_UNEXPECTED)
