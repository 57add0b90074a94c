"""What a run says to the person before it: header, a line an evaluation, and results with the report at the end."""

import shlex
from collections.abc import Mapping

import jax

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
        ("batch", f"{batch} pairs, {batch // batch_shards(mesh)} a device"),
        ("steps", f"{run.steps} ({run.steps * batch / len(train):.1f} epochs)"),
        ("data", f"{train.name}, {len(train)} samples"),
    ]
    if run.sources.heldout is not None:
        rows.append(("held out", f"{run.sources.heldout.name}, {len(run.sources.heldout)} samples"))
    if run.sources.zero_shot is not None:
        classes = len(run.sources.zero_shot.class_names)
        rows.append(("zero-shot", f"{run.sources.zero_shot.name}, {classes} classes"))
    return [*rows, ("folder", str(run.workdir))]


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
    terminal.results("Results", [("train/loss", f"{last['train/loss']:.3f}"), *rows])
    folder = shlex.quote(str(run.workdir))
    labels = ",".join(f"a {name}" for name in run.sources.zero_shot.class_names[:3]) if run.sources.zero_shot else ""
    terminal.next_commands(
        [
            f"open {shlex.quote(str(report))}",
            f'clip-jax classify --model={folder} --image=PATH --labels="{labels or "a cat,a dog"}"',
            f"python -c \"import clip_jax; print(clip_jax.load('{run.workdir}'))\"",
        ]
    )
