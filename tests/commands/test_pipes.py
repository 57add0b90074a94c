"""What a command says may be read in part."""

import subprocess
import sys

PLAN = "-m clip_jax plan --config=configs/demo.py --gpu=h100 --estimate"


def test_a_reader_that_leaves_early_is_no_error():
    command = f'"{sys.executable}" {PLAN} | true; echo codes ${{PIPESTATUS[@]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "codes 0 0\n", done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
