"""Weights & Biases gets the lines of metrics.jsonl; a restart continues the same run there."""

import json
import sys
import types

import pytest

from clip_jax.errors import UserError
from clip_jax.training.metrics import Writer


class Fake:
    """What the library would get: the arguments of each ``init``, and all lines."""

    def __init__(self):
        self.inits, self.lines, self.metrics, self.finished = [], [], [], 0

    def module(self):
        def finish():
            self.finished += 1

        def init(**arguments):
            self.inits.append(arguments)
            return types.SimpleNamespace(
                log=self.lines.append, define_metric=lambda *a, **k: self.metrics.append((a, k)), finish=finish
            )

        return types.SimpleNamespace(init=init, Settings=lambda **settings: settings)


def write(folder, steps, first_step=0):
    writer = Writer(
        folder, enabled=True, tensorboard=False, first_step=first_step, wandb="clip", config={"seed": 3, "steps": 9}
    )
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / step})
    writer.close()


def test_lines_go_there_and_a_restart_continues_the_same_run(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake.module())
    write(tmp_path, (1, 2))
    write(tmp_path, (2, 3), first_step=1)
    first, second = fake.inits
    assert first["project"] == "clip" and first["config"] == {"seed": 3, "steps": 9}
    assert first["id"] == second["id"] and len(first["id"]) == 16 and second["resume"] == "allow"
    assert [line["step"] for line in fake.lines] == [1, 2, 2, 3] and fake.lines[1]["train/loss"] == 0.5
    assert fake.metrics[0] == (("*",), {"step_metric": "step"}) and fake.finished == 2
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == fake.lines


def test_without_the_library_or_credentials_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.log.wandb=clip: pip install 'clip-jax-tpu\[wandb\]'"):
        write(tmp_path, ())
    module = Fake().module()
    module.init = lambda **_: (_ for _ in ()).throw(RuntimeError("api_key not configured\nmore"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match="api_key not configured; `wandb login`, or WANDB_MODE=offline"):
        write(tmp_path, ())


def test_offline_it_writes_below_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, (1, 2))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
