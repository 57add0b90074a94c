"""A resolved config with the reason of each setting: ``clip-jax train --config=demo --print``.

The reasons are the comments beside the defaults in ``settings.py`` and in each objective: they are written once.
"""

import ast
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from clip_jax import settings
from clip_jax.config import recipes
from clip_jax.config.flat import flatten, known_settings
from clip_jax.config.resolve import resolve_preset
from clip_jax.errors import UserError
from clip_jax.objectives import OBJECTIVES
from clip_jax.storage import run_folder

COLUMN = 56
"""The column in which the reasons begin."""


def explained(recipe: str | None, overrides: Mapping[str, str], workdir: str | None = None) -> str:
    """One line per setting: its value, what an automatic value becomes, and why it exists.

    ``*`` marks the values that differ from the default. Without a recipe, the config of the run in ``workdir``. Raises
    UserError.
    """
    if recipe is not None:
        config = recipes.load(recipe, overrides)
    elif workdir:
        saved = recipes.from_json(run_folder.read(run_folder.Folder(workdir).path)["config"], workdir)
        config = recipes.override(saved, overrides, workdir)
    else:
        raise UserError("--print: give a recipe to print, as in --config=demo, or the --workdir of a run")
    names = tuple(config.eval)
    values, default, why, found = flatten(config), known_settings(names), reasons(names), automatic(config)
    lines = ["  # * differs from the default; (...) is what an automatic value becomes"]
    for key, value in values.items():
        became = f"  ({found[key]})" if key in found else ""
        line = f"{' ' if value == default[key] else '*'} {key} = {value!r}{became}"
        lines.append(f"{line:<{COLUMN}}  # {why[key]}" if key in why else line)
    return "\n".join(lines) + "\n"


def automatic(config: ConfigDict) -> dict[str, Any]:
    """The values that automatic settings stand for: the sizes of the model, as far as they are known without data."""
    preset, flat = resolve_preset(config), flatten(config)
    found: dict[str, Any] = {"tokenizer.kind": preset.tokenizer, "model.embed_dim": preset.architecture.embed_dim}
    found |= {"model.mean": preset.preprocess.mean, "model.std": preset.preprocess.std}
    for name, tower in (("image", preset.architecture.image), ("text", preset.architecture.text)):
        sizes = [key.rpartition(".")[2] for key in flat if key.startswith(f"model.{name}.")]
        found |= {f"model.{name}.{size}": getattr(tower, size) for size in sizes if hasattr(tower, size)}
    if preset.tokenizer == "sentencepiece" and flat["model.text.vocab_size"] == settings.AUTO:
        del found["model.text.vocab_size"]  # as many pieces as the captions give
    return {key: value for key, value in found.items() if flat[key] in (settings.AUTO, "", ())}


def reasons(evaluations: tuple[str, ...] = ()) -> dict[str, str]:
    """The comment of every setting that has one: ``{"seed": "order, crops and initialization", ...}``."""
    found = dict(_comments(settings.defaults))
    fields = dict(_comments(settings.evaluation))
    every = dict(_comments(settings.evaluation, "_every"))["_every"]
    for name in evaluations:
        found |= {f"eval.{name}.{field}": reason for field, reason in fields.items()}
        found |= {f"eval.{name}.every_{unit}": every for unit in settings.UNITS}
    every = dict(_comments(settings.defaults, "_every"))["checkpoint._every"]
    found |= {f"checkpoint.every_{unit}": every for unit in settings.UNITS}
    for name, kind in OBJECTIVES.items():
        module = sys.modules[kind.make.__module__]
        found[f"objectives.{name}.weight"] = "of its term in the loss; 0: it is not part of the run"
        found |= {f"objectives.{name}.{key.removeprefix('defaults.')}": text for key, text in _comments(module)}
    return found


def _comments(where: Any, call: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, comment) of the dictionary literals in a function or module: beside a key, or on the lines above it.

    With ``call``, instead the comments of ``**call()`` entries.
    """
    source = textwrap.dedent(inspect.getsource(where))
    beside, above = _comments_by_line(source)

    def of(first: int, last: int) -> str:
        lines = []
        while first - 1 in above:
            first -= 1
            lines.insert(0, above[first])
        return " ".join([*lines, beside[last]] if last in beside else lines)

    def visit(node: ast.Dict, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Dict):
                yield from visit(value, f"{prefix}{key.value}.")
            elif isinstance(key, ast.Constant) and not call and (text := of(key.lineno, value.end_lineno)):
                yield f"{prefix}{key.value}", text
            elif key is None and call and isinstance(value, ast.Call) and ast.unparse(value.func) == call:
                yield f"{prefix}{call}", of(value.lineno, value.end_lineno)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call | ast.Assign | ast.Return):
            inner = [*node.args, *(k.value for k in node.keywords)] if isinstance(node, ast.Call) else [node.value]
            for candidate in inner:
                if isinstance(candidate, ast.Dict):
                    yield from visit(candidate, "")


def _comments_by_line(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Line -> comment: (those beside code, those that have the line to themselves)."""
    beside, above = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else beside)[token.start[0]] = token.string.lstrip("# ")
    return beside, above
