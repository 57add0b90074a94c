"""``python -m clip_jax COMMAND`` is ``clip-jax COMMAND``."""

import sys

from clip_jax.commands import main

sys.exit(main())
