"""Do the objectives help? A small tower trained with each of them on three sets, read at equal pairs and at equal cost.

python benchmarks/objectives.py [--data=data] [--only=scenes] [--minutes=60] [--write=docs/objectives.md]

The runs are those of benchmarks/objectives_recipe.py, made by the training loop itself, one process each. A row is
added to benchmarks/objectives.jsonl when its run is done, and the same command continues with the next one; an
interrupted run resumes. ``--only`` takes sets, objectives or set/objective/seed, separated by commas; after
``--minutes`` no further row is started. ``--table`` only prints the table, which ``--write`` puts between the two marks
of a document.

Everything is read from the embeddings of the held-out set. Its loss is the softmax loss of all pairs as one batch, at
the temperature that is best for the model: models of the sigmoid loss, and with other targets, have another scale.
R@k and the median rank are means of both directions; the ± is the standard error by bootstrap over the pairs.
Seconds per step are measured in turns in one process, on random batches, without reading data.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from objectives_recipe import OBJECTIVES, SETS
from objectives_table import END, START, mean_of, table

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "benchmarks/objectives_recipe.py"
ROWS = ROOT / "benchmarks/objectives.jsonl"
SEEDS = {"softmax": 3, "teacher": 1}
"""How many seeds an objective has; 2 if it is not named."""
VIEWS = 1
"""Stored crops per image."""
RESAMPLES = 1000
TURNS = 7
TIMES = "times"
"""The name of the row with the seconds per step of a set."""


class Row(NamedTuple):
    """A run, or the times of a set."""

    of: str
    objective: str
    seed: int

    def __str__(self) -> str:
        return f"{self.of}/{self.objective}/{self.seed}"


def plan() -> Iterator[Row]:
    """All rows in their order: on each set every objective once and their times, then further seeds."""
    for of in SETS:
        # The teacher is the row before the one that learns from it.
        order = [*(name for name in OBJECTIVES if name not in ("teacher", "distilled")), "teacher", "distilled"]
        yield from (Row(of, objective, 0) for objective in order)
        yield Row(of, TIMES, 0)
        yield from (Row(of, "softmax", seed) for seed in range(1, SEEDS["softmax"]))
    for of in SETS:
        others = [name for name in OBJECTIVES if name != "softmax"]
        yield from (Row(of, name, seed) for name in others for seed in range(1, SEEDS.get(name, 2)))


def read_rows() -> dict[Row, dict]:
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    found = [json.loads(line) for line in lines if line]
    return {Row(line["set"], line["objective"], line["seed"]): line for line in found}


def finished(of: str, done: Mapping[Row, dict]) -> set[str]:
    """The objectives that have a row of the set."""
    return {row.objective for row in done if row.of == of} - {TIMES}


def is_due(row: Row, done: Mapping[Row, dict]) -> bool:
    """Whether the row is missing; times are repeated when there are more objectives."""
    if row.objective == TIMES:
        return not finished(row.of, done) <= set(done.get(row, {}).get("seconds", ()))
    return row not in done


def wanted(row: Row, only: str) -> bool:
    """Whether ``--only`` names the row, its set or its objective."""
    names = {row.of, row.objective, str(row), f"{row.of}/{row.objective}"}
    return not only or not names.isdisjoint(only.split(","))


# What follows runs in the process of one row.


def train_and_read(row: Row, folder: Path, data: str) -> dict:
    """Trains the row's run, or what is left of it, and reads it."""
    from clip_jax.training import loop

    if row.of == "scenes":
        pack_scenes(folder / "scenes")
    if row.objective == "distilled":
        store_teacher(row.of, folder, data)
    workdir = folder / row.of / f"{row.objective.replace(' ', '_')}_{row.seed}"
    recipe = f"{RECIPE}:{row.of},{row.objective},{folder},{data}"
    code = loop.run(workdir=str(workdir), recipe=recipe, overrides={"seed": str(row.seed)})
    if code:
        sys.exit(code)
    return read(row, workdir, data)


def pack_scenes(to: Path) -> None:
    """The first of the bundled scenes as shards: a teacher's embeddings need a set that is not too large."""
    from clip_jax.data.packing import pack
    from clip_jax.data.sources.shapes import open_shapes

    pack(open_shapes("train", examples=12_800), to, per_shard=3200, max_size=0, workers=2)


def store_teacher(of: str, folder: Path, data: str) -> None:
    """``clip-jax reinforce`` with the teacher of the set; shards that are there are not computed again."""
    from clip_jax import commands
    from clip_jax import config as configs

    teacher = configs.load(f"{RECIPE}:{of},teacher,{folder},{data}")
    low, high = teacher.data.crop_scale
    arguments = [
        *("reinforce", f"--data={teacher.data.train}", f"--caption={teacher.data.caption}"),
        *(f"--teacher={folder}/{of}/teacher_0", f"--output={folder}/{of}/stored", f"--views={VIEWS}"),
        *(f"--crop-scale={low},{high}", "--batch-size=128"),
    ]
    if commands.main(arguments):
        sys.exit(f"{of}: the teacher's embeddings were not stored")


def read(row: Row, workdir: Path, data: str) -> dict:
    """The row of a finished run: from the embeddings of its held-out set, and from its metrics."""
    from clip_jax.commands.evaluate import open_subject
    from clip_jax.data.sources import open_source
    from clip_jax.reports.history import read_metrics

    of = SETS[row.of]
    subject = open_subject(str(workdir), 128)
    source = open_source(of.held_out.format(data=data, folder=""), caption=of.held_out_caption)
    embedded = subject.embed(source, texts=True)
    _, first = np.unique(embedded.owner, return_index=True)
    numbers = held_out(embedded.images, embedded.texts[first])
    curve, last = [], {}
    for line in read_metrics(workdir / "metrics.jsonl"):
        last |= line
        if "eval/held_out/i2t_R@1" in line:
            found = [mean_of(line, name) for name in ("R@1", "R@10", "median_rank")]
            curve.append([line["step"], *found])
    probe = {"probe": round(last[f"eval/probe/{of.metric}"], 4)} if of.metric else {}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **{"steps": of.steps, "pairs": last["train/pairs"], "held_out": len(first), **numbers, **probe},
        **{"train_loss": round(last["train/loss"], 4), "curve": curve},
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
    }


def held_out(images: np.ndarray, texts: np.ndarray) -> dict:
    """name -> [value, standard error]; row i of both is a pair."""
    cosines = (images @ texts.T).astype(np.float32)
    pairs, paired = len(cosines), np.diag(cosines)[:, None]
    both = (cosines, cosines.T)
    # Ties are pessimistic, as everywhere (clip_jax/evaluation/ranking.py).
    ranks = np.stack([np.sum(c >= paired - 1e-6, axis=1) for c in both], axis=1)

    def losses(scale: float) -> np.ndarray:
        sums = [scale * c.max(1) + np.log(np.exp(scale * (c - c.max(1, keepdims=True))).sum(1)) for c in both]
        return sum(sums) / 2 - scale * paired[:, 0]

    loss = min((losses(scale) for scale in np.geomspace(2, 200, 24)), key=np.mean)
    draws = np.random.default_rng(0).integers(pairs, size=(RESAMPLES, pairs))

    def with_error(statistic) -> list[float]:
        return [round(float(statistic(slice(None))), 4), round(float(np.std([statistic(d) for d in draws])), 4)]

    return {
        "loss": with_error(lambda rows: loss[rows].mean()),
        "R@1": with_error(lambda rows: (ranks[rows] <= 1).mean()),
        "R@10": with_error(lambda rows: (ranks[rows] <= 10).mean()),
        "median_rank": with_error(lambda rows: np.median(ranks[rows], axis=0).mean()),
    }


def seconds_per_step(of: str, folder: Path, data: str) -> dict:
    """Objective -> seconds of each turn, for all that have a row; of a run with two phases, those of the last one."""
    import train_step

    from clip_jax import config as configs

    runs = {}
    for objective in sorted(finished(of, read_rows())):
        config = configs.load(f"{RECIPE}:{of},{objective},{folder},{data}")
        runs[objective] = train_step.prepare(configs.phases(config)[-1].config)[0]
    turns = {objective: [] for objective in runs}
    for _ in range(TURNS):
        for objective, run in runs.items():
            turns[objective].append(round(run(2) / 2, 4))
    return {"seconds": turns}


# The process of the command.


def run_row(row: Row, args: argparse.Namespace) -> bool:
    """Runs a row in a process of its own and adds its line."""
    environment = os.environ | {
        # The same program is compiled once for all seeds.
        "JAX_COMPILATION_CACHE_DIR": str(args.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, __file__, f"--row={row}", f"--folder={args.folder}", f"--data={args.data}"]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment)
    outcome = "done" if done.returncode == 0 else "failed"
    print(f"{row}: {outcome} after {time.perf_counter() - started:.0f} s", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="the folder that has emoji and icons")
    parser.add_argument("--folder", type=Path, default=Path("runs/objectives"), help="of the runs")
    parser.add_argument("--only", default="", help="sets, objectives or set/objective/seed, separated by commas")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after these, no row is started")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    parser.add_argument("--write", type=Path, help="a document that gets the table")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        of, objective, seed = args.row.split("/")
        row = Row(of, objective, int(seed))
        found = (
            seconds_per_step(of, args.folder, args.data)
            if objective == TIMES
            else train_and_read(row, args.folder, args.data)
        )
        with ROWS.open("a") as file:
            file.write(json.dumps({"set": of, "objective": objective, "seed": row.seed, **found}) + "\n")
        return
    started = time.monotonic()
    for row in () if args.table else [row for row in plan() if wanted(row, args.only)]:
        if time.monotonic() - started > 60 * args.minutes:
            break
        if is_due(row, read_rows()):
            run_row(row, args)
    done = read_rows()
    text = table(list(done.values()), [str(row) for row in plan() if is_due(row, done)])
    print(text)
    if args.write:
        before, _, rest = args.write.read_text().partition(START)
        args.write.write_text(f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
