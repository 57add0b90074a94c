"""The state that a run starts from: its newest checkpoint, or a fresh one, with other weights where asked."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp

from clip_jax import presets
from clip_jax.data.tokenizers.sentence_pieces import Pieces
from clip_jax.errors import UserError
from clip_jax.interop.merge import Report, differences, merge
from clip_jax.model import Model, load
from clip_jax.models.clip import Params
from clip_jax.storage.atomic import write_text
from clip_jax.storage.checkpoints import Checkpoints
from clip_jax.training.phases import convert
from clip_jax.training.run import Phase, Run
from clip_jax.training.state import TrainState, matching

INIT_FROM_FILE = "init_from.txt"


def initial_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The state to continue from and its step, in the phase that trained this step."""
    step = checkpoints.latest()
    if step is not None:
        return checkpoints.restore(step, run.phases[run.phase_of(step)].learner.abstract_state()), step
    state = run.phases[0].learner.create_state()
    return (with_weights(run, state) if run.config.model.init_from else state), 0


def enter(run: Run, phase: Phase, state: TrainState, step: int) -> TrainState:
    """The state of a step as the phase continues it; converted where another phase trained it."""
    before = run.phases[run.phase_of(step)]
    return state if before is phase else convert(state, before.learner, phase.learner, step)


def with_weights(run: Run, state: TrainState) -> TrainState:
    """A fresh state with the weights that ``config.model.init_from`` names.

    A line says what they lacked; ``init_from.txt`` has a line for every tensor. Raises UserError.
    """
    source, preset = run.config.model.init_from, run.phases[0].preset
    names_no_model = Path(source).expanduser().is_file()
    loaded = load(run.config.model.name, weights=source) if names_no_model else load(source)
    differing = {} if names_no_model else differences(preset, loaded.preset)
    differing |= _vocabulary(run, preset, loaded)
    objectives = {name: tree for name, tree in state.params.items() if name == "objectives"}
    model = {name: tree for name, tree in state.params.items() if name != "objectives"}
    merged, report = merge(model, loaded.params, run.config.model.init_from_allow, differing)
    if jax.process_index() == 0:
        _describe(run, source, report)
        if line := _limited_scale(run, merged):
            print(line)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.batch_stats))
    everything = merged | objectives
    emas = run.phases[0].learner.emas
    return state._replace(
        params=jax.device_put(everything, shardings[0]),
        batch_stats=jax.device_put(loaded.batch_stats or state.batch_stats, shardings[1]),
        # Copies: the step donates the state, and a donated buffer has one owner.
        ema={
            name: jax.device_put(matching(everything, ema.of), matching(shardings[0], ema.of), may_alias=False)
            for name, ema in emas.items()
        },
    )


def _vocabulary(run: Run, preset: presets.Preset, loaded: Model) -> dict[str, str]:
    """Two SentencePiece vocabularies learned from different captions give the same ids to other words."""
    if not preset.tokenizer == loaded.preset.tokenizer == "sentencepiece":
        return {}
    try:
        theirs = loaded.tokenizer.codec
    except UserError:  # nothing beside the weights says what their ids mean
        theirs = None
    ours = run.tokenizer.codec.processor.serialized_model_proto()
    if isinstance(theirs, Pieces) and theirs.processor.serialized_model_proto() == ours:
        return {}
    return {"tokenizer": "another vocabulary than that of the weights, which an empty --config.tokenizer.vocab= takes"}


def _limited_scale(run: Run, params: Params) -> str:
    """A line if the first step would change the loaded logit scale, whatever the gradient; else nothing."""
    limited = params
    for objective in run.phases[0].learner.objectives.values():
        limited = objective.constrain(limited)
    loaded, after = (float(jnp.exp(tree["logit_scale"])) for tree in (params, limited))
    if math.isclose(loaded, after, rel_tol=1e-5):
        return ""
    return (
        f"logit scale: {loaded:.4g} in the weights, {after:.4g} from the first step on "
        "(config.objectives.contrastive.max_logit_scale; 0: no limit)"
    )


def _describe(run: Run, source: str, report: Report) -> None:
    print(f"{source}: " + "; ".join(report.lines()))
    write_text(run.workdir / INIT_FROM_FILE, "\n".join([source, *report.every()]) + "\n")
