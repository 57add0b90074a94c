"""What a run prints: the header, one line per evaluation, and at the end the results and the report."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from clip_jax.command_line import program
from clip_jax.data.sources.mixture import Mixture
from clip_jax.data.sources.sample import BadSampleError, notes
from clip_jax.data.stream import read
from clip_jax.devices import xla_flags
from clip_jax.devices.sharding import batch_shards
from clip_jax.models.attention_choice import choose_attention
from clip_jax.reports import history, page, terminal
from clip_jax.reports.gallery import Gallery
from clip_jax.training.metrics import FILE
from clip_jax.training.run import Run

READ_CAPTIONS = 200
SIDES = re.compile(r"\b(left|right)(most|wards?)?\b", re.IGNORECASE)


def header(run: Run) -> list[tuple[str, str]]:
    """Names and values of the run that is about to start."""
    counts, mesh, batch = run.parameters, run.mesh, run.config.batch_size
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    train, preset = run.train, run.phases[0].preset
    attention = choose_attention(
        run.config.model.attention, jnp.dtype(run.config.model.dtype), preset.architecture, mesh
    )
    shares = run.phases[0].learner.flops_shares(batch)
    rows = [
        ("model", f"{run.config.model.name}, {counts['total'] / 1e6:.1f}M parameters"),
        ("towers", f"image {counts['image'] / 1e6:.1f}M, text {counts['text'] / 1e6:.1f}M, {run.config.model.dtype}"),
        ("mesh", f"{axes} on {jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"),
        ("attention", str(attention)),
        ("XLA flags", xla_flags.describe(jax.default_backend())),
        ("batch", f"{batch} pairs, {batch // batch_shards(mesh)} per device"),
        *(("", note) for note in repeated_pairs(run)),
        ("objectives", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + " of a step's FLOPs"),
        ("steps", f"{run.steps} ({run.steps * batch / run.phases[0].batches.order.epoch:.1f} epochs)"),
        ("data", f"{train.name}, {len(train)} examples"),
        *(("", note) for note in notes(train)),
        *(("", note) for note in mirrored_captions(run)),
    ]
    for number, phase in enumerate(run.phases[1:], start=2):
        size = phase.preset.architecture.image.image_size
        rows.append((f"phase {number}", f"from step {phase.start + 1}, images of {size} px"))
    for evaluation in run.phases[0].evaluations:
        source = evaluation.source
        classes = f", {len(source.class_names)} classes" if evaluation.protocol == "zero_shot" else ""
        rows.append((evaluation.name, f"{evaluation.protocol}: {source.name}, {len(source)} examples{classes}"))
        rows += [("", note) for note in notes(source)]
    return [*rows, ("folder", str(run.folder))]


def mirrored_captions(run: Run) -> tuple[str, ...]:
    """A warning where images are mirrored and some captions, of examples spread over the data, say left or right."""
    flip, train = run.config.data.augment.flip, run.train
    if flip == 0:
        return ()
    count = min(READ_CAPTIONS, len(train))
    found = []
    for index in range(count):
        try:
            captions = read(train, index * len(train) // count).captions
        except BadSampleError:  # counted when training meets it
            continue
        found += [caption for caption in captions if SIDES.search(caption)][:1]
    if not found:
        return ()
    return (
        f"config.data.augment.flip={flip}: captions of {len(found)} of {count} examples say left or right "
        f'("{found[0][:80]}") and are wrong for mirrored images; turn it off with 0',
    )


def repeated_pairs(run: Run) -> tuple[str, ...]:
    """A warning where a batch is larger than the data: it holds some pairs twice, each as a negative of itself."""
    batch, examples, shards = run.config.batch_size, len(run.train), batch_shards(run.mesh)
    if isinstance(run.train, Mixture):
        quotas = run.phases[0].batches.order.counts(batch)
        return tuple(
            f"WARNING: {quota} pairs of a batch are from the {len(part)} of {part.name}: some are there more than "
            "once, as their own negatives; lower its weight or config.batch_size"
            for part, quota in zip(run.train.parts, quotas, strict=True)
            if quota > len(part)
        )
    if batch <= examples:
        return ()
    fits = examples // shards * shards
    way_out = f"set config.batch_size={fits}" if fits else f"train on fewer devices, or on {shards} pairs or more"
    times = -(-batch // examples)
    return (f"WARNING: only {examples} pairs: each is up to {times} times in a batch, as its own negative; {way_out}",)


def summary(step: int, values: Mapping[str, float]) -> str:
    """One line of an evaluation's numbers."""
    shown = ("loss", "zero_shot_top1", "i2t_R@1", "t2i_R@1", "i2t_R@5", "t2i_R@5", "mean", "all_shot", "mean_iou")
    parts = [f"{name.removeprefix('eval/')} {v:.3f}" for name, v in values.items() if name.split("/")[-1] in shown]
    return f"evaluation at step {step}: " + "  ".join(parts)


def finish(run: Run, gallery: Gallery | None) -> None:
    """The report, the table of results, and what to try next."""
    report = run.workdir / "report.html"
    if gallery is not None or not report.exists():
        page.write(run.workdir, gallery)
    last: dict[str, float] = {}
    for line in history.read_metrics(run.workdir / FILE):
        last |= line
    rows = [
        (name.removeprefix("eval/"), f"{value:.3f}")
        for name, value in last.items()
        if name.startswith("eval/") and name.split("/")[-1] not in ("images", "skipped", "time_seconds")
    ]
    terminal.results(
        "Results", [("train/loss", f"{last['train/loss']:.3f}"), *rows, ("report", f"{run.folder}/report.html")]
    )
    named = [e.source.class_names for e in run.phases[-1].evaluations if e.source.class_names]
    classes = named[0] if named else ("cat", "dog")
    labels = ",".join(f"a {name}" for name in classes[:3])
    folder = shlex.quote(str(run.folder))
    again = f"{_installed('python')} main.py" if program() == "main.py" else f"{_installed('clip-jax')} train"
    terminal.next_commands(
        [
            f'{_installed("clip-jax")} classify --model={folder} --image=PATH --labels="{labels}"',
            f"{again} --workdir={folder}    # resumes where it stopped, or shows this again",
        ]
    )


def _installed(program: str) -> str:
    """How to call a program of this environment from here: by its name alone where that finds the same program."""
    ours = Path(sys.executable).with_name(program)
    if shutil.which(program) == str(ours):
        return program
    return shlex.quote(os.path.relpath(ours)) if ours.is_relative_to(Path.cwd()) else shlex.quote(str(ours))
