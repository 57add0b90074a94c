"""Files of torch -> safetensors with a config: what ``clip-jax import`` does, and the only use of ``torch_files``.

Names, types and bits of the tensors do not change.
"""

import shutil
from pathlib import Path

from clip_jax import presets
from clip_jax.errors import UserError
from clip_jax.interop import (
    files,
    folders,
    huggingface_config,
    open_clip,
    open_clip_config,
    openai,
    torch_files,
)
from clip_jax.interop.tensors import Tensors
from clip_jax.models.resnet import ResNetTower
from clip_jax.presets import Preset

WEIGHTS = {"openclip": "open_clip_model.safetensors", "huggingface": "model.safetensors"}


def convert(source: Path, to: Path, model: str | None) -> list[str]:
    """Writes the folder ``to`` and returns lines for the user that describe what was found. Raises UserError."""
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to}: not empty; give a new folder")
    file = _pickle_in(source) if source.is_dir() else source
    tensors = files.read_shards(file, torch_files.read) if file.name.endswith(files.INDEX) else torch_files.read(file)
    layout = folders.layout_of(list(tensors), str(file))
    tensors = Tensors(tensors.source, {name: x for name, x in tensors.entries.items() if name not in open_clip.IGNORED})
    to.mkdir(parents=True, exist_ok=True)
    try:
        line = _write_config(to, layout, file, tensors, model)
    except UserError:
        to.rmdir()  # Nothing has been written.
        raise
    lines = [f"{file}: {len(tensors)} tensors with {layout}'s names, read without running anything in the file", line]
    files.write_safetensors(to / WEIGHTS[layout], tensors)
    lines.append(f"{to / WEIGHTS[layout]}: clip_jax.load({str(to)!r}) reads it")
    return lines


def _pickle_in(folder: Path) -> Path:
    names = [name for layout in folders.WEIGHTS.values() for name in layout if files.is_pickled(Path(name))]
    present = [folder / name for name in names if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: has none of {', '.join(names)}; give the file itself")
    return present[0]


def _write_config(to: Path, layout: str, file: Path, tensors: Tensors, model: str | None) -> str:
    """Writes the config and returns the line that says where it comes from. Raises UserError before it writes."""
    config = file.parent / folders.CONFIGS[layout]
    if model is not None:
        _write_preset(to, layout, presets.preset(model))
        return f"config: of {model}, as given"
    if config.is_file():
        for path in sorted(file.parent.iterdir()):
            if path.suffix in (".json", ".txt", ".model") and not path.name.endswith(files.INDEX):
                shutil.copyfile(path, to / path.name)
        return f"config: copied from {config}"
    if torch_files.is_torchscript(file):
        preset = openai.preset(tensors)
        _write_preset(to, layout, preset)
        return f"config: an archive of OpenAI's; by its shapes {_name(preset)}"
    raise UserError(f"{file}: does not say which model it is, and {config} does not exist; add --model=NAME")


def _write_preset(to: Path, layout: str, preset: Preset) -> None:
    if layout == "openclip":
        files.write_json(to / "open_clip_config.json", open_clip_config.from_preset(preset))
        return
    config, preprocessor = huggingface_config.from_preset(preset)
    files.write_json(to / "config.json", config)
    files.write_json(to / "preprocessor_config.json", preprocessor)


def _name(preset: Preset) -> str:
    image = preset.architecture.image
    known = [name for name, other in presets.PRESETS.items() if other.architecture == preset.architecture]
    if known:
        return known[0]
    if isinstance(image, ResNetTower):
        return f"a ResNet of {list(image.stages)} blocks and {image.width} features"
    return f"a ViT of {image.layers} layers and {image.width} features"
