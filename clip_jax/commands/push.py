"""``clip-jax push exports/tuned --to=org/name``: an exported model on the Hugging Face hub."""

import argparse
import json
from pathlib import Path

from clip_jax.errors import UserError

HELP = "Upload an exported model, with its model card, to the Hugging Face hub."

OPEN_CLIP = "open_clip_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a folder that `clip-jax export` wrote")
    parser.add_argument("--to", required=True, help="the repository, org/name; created where it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--dry-run", action="store_true", help="check and list the files, upload nothing")


def run(arguments: argparse.Namespace) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    folder, to = Path(arguments.folder).expanduser(), arguments.to.removeprefix("hf://")
    files = _files(folder)
    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise UserError(f"--to={arguments.to}: not the name of a repository, org/name") from error
    _name_tokenizer(folder, to, write=not arguments.dry_run)
    for file in files:
        print(f"{file.relative_to(folder)}  {file.stat().st_size / 1e6:.1f} MB")
    if arguments.dry_run:
        print(f"dry run: {len(files)} files would be uploaded to https://huggingface.co/{to}")
        return
    api = HfApi()
    try:
        api.create_repo(to, private=arguments.private, exist_ok=True)
        address = api.upload_folder(repo_id=to, folder_path=folder, commit_message="Upload a model of clip_jax")
    except LocalTokenNotFoundError as error:
        raise UserError("no token of the Hugging Face hub on this machine; run `hf auth login`") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{to}: cannot be uploaded ({str(error).splitlines()[0]}); run `hf auth login`") from error
    print(address)


def _files(folder: Path) -> list[Path]:
    """The files to upload. Raises UserError for a folder that is no export."""
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder}: has no model card (README.md); give a folder that `clip-jax export` wrote")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(path.suffix in (".safetensors", ".npz") for path in files):
        raise UserError(f"{folder}: has no weights; give a folder that `clip-jax export` wrote")
    return files


def _name_tokenizer(folder: Path, to: str, *, write: bool) -> None:
    """On the hub OpenCLIP looks for a tokenizer by its repository, which is this one where the model has its own."""
    file = folder / OPEN_CLIP
    if not file.is_file() or not (folder / "sentencepiece.model").is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = to
    print(f"{OPEN_CLIP}: hf_tokenizer_name = {to}")
    if write:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
