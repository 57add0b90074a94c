"""The output of a command can be piped to a program that does not read all of it."""

import subprocess
import sys

PLAN = "-m clip_jax plan --config=configs/demo.py --gpu=h100 --estimate"


def test_a_reader_that_closes_the_pipe_early_is_no_error():
    command = f'"{sys.executable}" {PLAN} | true; echo codes ${{PIPESTATUS[@]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "codes 0 0\n", done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
