"""Files of torch -> safetensors with a config: what ``clip-jax import`` does, and the only use of ``torch_files``.

Names, types and bits of the tensors stay as they are.
"""

import shutil
from pathlib import Path

from clip_jax import presets
from clip_jax.errors import UserError
from clip_jax.interop import (
    export,
    files,
    folders,
    huggingface_config,
    open_clip,
    open_clip_config,
    openai,
    torch_files,
)
from clip_jax.interop.state import State
from clip_jax.models.resnet import ResNetTower
from clip_jax.presets import Preset

WEIGHTS = {"openclip": "open_clip_model.safetensors", "huggingface": "model.safetensors"}


def convert(source: Path, to: Path, model: str | None) -> list[str]:
    """Writes the folder ``to``; lines for the user say what was found. Raises UserError."""
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to}: not empty; give a new folder")
    file = _pickle_in(source) if source.is_dir() else source
    state = files.read_shards(file, torch_files.read) if file.name.endswith(files.INDEX) else torch_files.read(file)
    layout = folders.layout_of(list(state), str(file))
    state = State(state.source, {name: x for name, x in state.entries.items() if name not in open_clip.IGNORED})
    beside = file.parent / folders.CONFIGS[layout]
    lines = [f"{file}: {len(state)} tensors with {layout}'s names, read without running anything in the file"]
    to.mkdir(parents=True, exist_ok=True)
    if model is not None:
        lines.append(f"config: of {model}, as given")
        _write_config(to, layout, presets.preset(model))
    elif beside.is_file():
        lines.append(f"config: copied from {beside}")
        for path in sorted(file.parent.iterdir()):
            if path.suffix in (".json", ".txt", ".model") and not path.name.endswith(files.INDEX):
                shutil.copyfile(path, to / path.name)
    elif torch_files.is_torchscript(file):
        preset = openai.preset(state)
        lines.append(f"config: an archive of OpenAI's; by its shapes {_name(preset)}")
        _write_config(to, layout, preset)
    else:
        to.rmdir()
        raise UserError(f"{file}: does not say which model it is, and {beside} is not there; add --model=NAME")
    files.write_safetensors(to / WEIGHTS[layout], state)
    lines.append(f"{to / WEIGHTS[layout]}: clip_jax.load({str(to)!r}) reads it")
    return lines


def _pickle_in(folder: Path) -> Path:
    names = [name for layout in folders.WEIGHTS.values() for name in layout if files.is_pickled(Path(name))]
    present = [folder / name for name in names if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: has none of {', '.join(names)}; give the file itself")
    return present[0]


def _write_config(to: Path, layout: str, preset: Preset) -> None:
    if layout == "openclip":
        export.write_json(to / "open_clip_config.json", open_clip_config.from_preset(preset))
        return
    config, preprocessor = huggingface_config.from_preset(preset)
    export.write_json(to / "config.json", config)
    export.write_json(to / "preprocessor_config.json", preprocessor)


def _name(preset: Preset) -> str:
    image = preset.architecture.image
    known = [name for name, other in presets.PRESETS.items() if other.architecture == preset.architecture]
    if known:
        return known[0]
    if isinstance(image, ResNetTower):
        return f"a ResNet of {list(image.stages)} blocks and {image.width} features"
    return f"a ViT of {image.layers} layers and {image.width} features"
