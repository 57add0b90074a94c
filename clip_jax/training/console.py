"""What a run says to the person before it: header, a line an evaluation, and results with the report at the end."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from clip_jax import xla_flags
from clip_jax.reports import page, terminal
from clip_jax.reports.gallery import Gallery
from clip_jax.sharding import batch_shards
from clip_jax.training.metrics import FILE
from clip_jax.training.setup import Run


def header(run: Run) -> list[tuple[str, str]]:
    """What is about to run, for a person."""
    counts, mesh, batch = run.parameters, run.mesh, run.config.batch_size
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    train = run.sources.train
    rows = [
        ("model", f"{run.config.model.name}, {counts['total'] / 1e6:.1f}M parameters"),
        ("towers", f"image {counts['image'] / 1e6:.1f}M, text {counts['text'] / 1e6:.1f}M, {run.config.model.dtype}"),
        ("mesh", f"{axes} on {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"),
        ("XLA flags", xla_flags.told(jax.default_backend())),
        ("batch", f"{batch} pairs, {batch // batch_shards(mesh)} a device"),
        ("steps", f"{run.steps} ({run.steps * batch / len(train):.1f} epochs)"),
        ("data", f"{train.name}, {len(train)} samples"),
    ]
    if run.sources.heldout is not None:
        rows.append(("held out", f"{run.sources.heldout.name}, {len(run.sources.heldout)} samples"))
    if run.sources.zero_shot is not None:
        classes = len(run.sources.zero_shot.class_names)
        rows.append(("zero-shot", f"{run.sources.zero_shot.name}, {classes} classes"))
    return [*rows, ("folder", str(run.folder))]


def summary(step: int, values: Mapping[str, float]) -> str:
    """One line of an evaluation's numbers."""
    shown = ("loss", "zero_shot_top1", "i2t_R@1", "t2i_R@1", "i2t_R@5", "t2i_R@5")
    parts = [f"{name.removeprefix('eval/')} {v:.3f}" for name, v in values.items() if name.split("/")[-1] in shown]
    return f"evaluation at step {step}: " + "  ".join(parts)


def finish(run: Run, gallery: Gallery | None) -> None:
    """The report, the table of results, and what to try next."""
    report = run.workdir / "report.html"
    if gallery is not None or not report.exists():
        page.write(run.workdir, gallery)
    last: dict[str, float] = {}
    for line in page.read_metrics(run.workdir / FILE):
        last |= line
    rows = [
        (name.removeprefix("eval/"), f"{value:.3f}")
        for name, value in last.items()
        if name.startswith("eval/") and name.split("/")[-1] not in ("images", "skipped", "time_seconds")
    ]
    terminal.results(
        "Results", [("train/loss", f"{last['train/loss']:.3f}"), *rows, ("report", f"{run.folder}/report.html")]
    )
    classes = run.sources.zero_shot.class_names if run.sources.zero_shot is not None else ("cat", "dog")
    labels = ",".join(f"a {name}" for name in classes[:3])
    folder = shlex.quote(str(run.folder))
    terminal.next_commands(
        [
            f'{_installed("clip-jax")} classify --model={folder} --image=PATH --labels="{labels}"',
            f"{_installed('python')} main.py --workdir={folder}    # goes on where it stopped, or shows this again",
        ]
    )


def _installed(program: str) -> str:
    """How to call a program of this environment from here: by its name alone only where that is the same one."""
    ours = Path(sys.executable).with_name(program)
    if shutil.which(program) == str(ours):
        return program
    return shlex.quote(os.path.relpath(ours)) if ours.is_relative_to(Path.cwd()) else shlex.quote(str(ours))
