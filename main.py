"""Pretrains a CLIP: ``python main.py --config=configs/demo.py --workdir=runs/demo [--config.some.key=value ...]``.

``--workdir`` alone continues the run in that folder. An installed ``clip-jax train`` is the same program.
"""

import sys

from clip_jax import interrupts

if __name__ == "__main__":
    interrupts.install()  # before the other imports, which take half a second
    from clip_jax.commands import train

    sys.exit(train.main(sys.argv[1:]))
