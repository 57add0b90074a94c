"""``python -m clip_jax COMMAND`` is ``clip-jax COMMAND``."""

import sys

from clip_jax import interrupts


def main() -> int:
    interrupts.install("clip-jax: interrupted")  # before the other imports, which take half a second
    from clip_jax import commands

    return commands.main()


if __name__ == "__main__":
    sys.exit(main())
