"""Every protocol of a run gives the same numbers on two processes as on one: each example is counted exactly once."""

import pytest

from tests.data.shards import jpeg, write_shard
from tests.training import runs
from tests.training.test_resume import run_together

EVALUATIONS = """
    labeled, more = "tar:{folder}/labeled.tar", "tar:{folder}/more.tar"
    for protocol in ("zero_shot", "corruptions", "typographic", "adversarial"):
        config.eval[protocol] = evaluation(protocol=protocol, source=labeled, batch_size=4)
    config.eval.probe = evaluation(protocol="probe", source=labeled, train=more, batch_size=4)
    for protocol in ("composition", "dense"):
        config.eval[protocol] = evaluation(protocol=protocol, source="shapes:heldout")
    config.eval.cues = evaluation(protocol="cues", source="shapes:zero_shot")
"""


def write_labeled(folder):
    for name, count in (("labeled", 13), ("more", 21)):  # neither is a multiple of a batch
        samples = [{"jpg": jpeg(i), "cls": str(i % 3).encode()} for i in range(count)]
        write_shard(folder / f"{name}.tar", samples)
    (folder / "classnames.txt").write_text("circle\nsquare\nstar\n")


@pytest.mark.slow
def test_every_protocol_has_the_numbers_of_one_process(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    write_labeled(tmp_path)
    recipe.write_text(
        recipe.read_text().replace("    return config", EVALUATIONS.format(folder=tmp_path) + "    return config")
    )
    given = (f"--config={recipe}", "--config.steps=1", "--config.optimizer.learning_rate=0")
    found = []
    for processes in (1, 2):
        workdir, devices = tmp_path / str(processes), f"--config.mesh.cpu_devices={2 // processes}"
        run_together(tmp_path, processes, *given, "--config.optimizer.warmup_steps=0", f"--workdir={workdir}", devices)
        lines = runs.metrics(workdir)
        found.append({name: value for line in lines for name, value in line.items() if name.startswith("eval/")})
    one, two = found
    assert {name.split("/")[1] for name in one} == {
        *("held_out", "zero_shot", "corruptions", "typographic", "adversarial", "probe", "composition", "dense", "cues")
    }
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
