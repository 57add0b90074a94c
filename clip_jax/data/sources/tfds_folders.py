"""Where TFDS keeps a prepared dataset: ``root/name[/config]/version``, on disk or in a bucket.

``tfds.data_source(name)`` is not used to find it: for a catalog name without a version that call runs the dataset's
own code, and the code of coco_captions needs TensorFlow.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clip_jax.errors import UserError, nearest
from clip_jax.storage import remote

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_DATA = re.compile(r"\.(array_record|tfrecord|riegeli|parquet)\b|\.(array_record|tfrecord|riegeli)-\d")
THREADS = 16


def find(where: str, data_dir: str) -> str:
    """The folder ``data_dir/name[/config]/version`` for ``where``, the newest version by default. Raises UserError."""
    import tensorflow_datasets as tfds

    named = _NAME.fullmatch(where)
    if named is None:
        raise UserError(f"tfds:{where}: write name, name/config or name/config:1.2.3, such as tfds:coco_captions")
    name, config, version = named["name"], named["config"], named["version"]
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = root.rstrip("/") if remote.is_remote(root) else str(Path(root).expanduser())
    try:
        prepared = _subfolders(root)
        if name not in prepared:
            catalog = tfds.list_builders(with_community_datasets=False)
            if name not in catalog:
                hint = nearest(name, [*prepared, *catalog])
                raise UserError(f"tfds:{where}: {name} is neither in {root} nor in the TFDS catalog{hint}")
            raise UserError(f"tfds:{where}: {name} is not in {root}; {how_to_prepare(where, data_dir)}")
        folder = f"{root}/{name}"
        inside = _subfolders(folder)
        configs = [i for i in inside if not _VERSION.fullmatch(i)]
        if config is None and len(configs) == len(inside):
            config = _default_config(folder) or (configs[0] if len(configs) == 1 else None)
            if config is None and configs:
                choices = ", ".join(f"tfds:{name}/{c}" for c in configs)
                raise UserError(f"tfds:{where}: {folder} has several configs; name one: {choices}")
        if config is not None:
            if config not in configs:
                raise UserError(
                    f"tfds:{where}: config {config} is not in {folder}; there is {', '.join(configs) or 'none'}: name "
                    f"that, or {how_to_prepare(where, data_dir)}"
                )
            folder = f"{folder}/{config}"
        versions = [v for v in _subfolders(folder) if _VERSION.fullmatch(v)]
    except (OSError, ValueError) as error:
        raise UserError(f"tfds:{where}: cannot read {root}: {first_line(error)}") from error
    if not versions:
        raise UserError(f"tfds:{where}: {folder} has no finished version; {how_to_prepare(where, data_dir)}")
    if version and version not in versions:
        raise UserError(
            f"tfds:{where}: version {version} is not in {folder}; there is {', '.join(versions)}: name that, or "
            f"{how_to_prepare(where, data_dir)}"
        )
    return f"{folder}/{version or max(versions, key=lambda v: tuple(map(int, v.split('.'))))}"


def files(folder: str) -> list[str]:
    """The names of the files in a folder. Raises OSError, or UserError for a bucket."""
    return remote.children(folder)[1] if remote.is_remote(folder) else sorted(os.listdir(folder))


@contextlib.contextmanager
def metadata(folder: str) -> Iterator[str]:
    """A local folder with the dataset's metadata: the folder itself, or a copy of the small files in a bucket."""
    if not remote.is_remote(folder):
        yield folder
        return
    names = [name for name in files(folder) if not _DATA.search(name)]
    with tempfile.TemporaryDirectory() as copy:
        with ThreadPoolExecutor(THREADS) as pool:
            contents = pool.map(lambda name: remote.fetch(f"{folder}/{name}"), names)
            for name, content in zip(names, contents, strict=True):
                Path(copy, name).write_bytes(content)
        yield copy


def how_to_prepare(where: str, data_dir: str) -> str:
    """The way out of a message: a command that prepares the dataset."""
    argument = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        "prepare it once, in an environment of its own: pip install 'clip-jax-tpu[tfds-build]' && python -c "
        f'"import tensorflow_datasets as tfds; '
        f"tfds.builder('{where}'{argument}, file_format='array_record').download_and_prepare()\""
    )


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _subfolders(folder: str) -> list[str]:
    """Names, sorted; without TFDS's own ``.config`` and ``downloads``, and without interrupted builds."""
    if remote.is_remote(folder):
        names = remote.children(folder)[0]
    else:
        names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir()) if Path(folder).exists() else []
    return [n for n in names if not n.startswith((".", "incomplete.")) and n != "downloads"]


def _default_config(folder: str) -> str | None:
    """The name in TFDS's own metadata about the configs of a dataset; None if there is none."""
    metadata = f"{folder}/.config/metadata.json"
    try:
        content = remote.fetch(metadata) if remote.is_remote(metadata) else Path(metadata).read_bytes()
    except (FileNotFoundError, remote.RefusedError):
        return None
    return json.loads(content).get("default_config_name")
