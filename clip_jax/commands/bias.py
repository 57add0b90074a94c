"""``clip-jax bias --model=runs/demo --data=fairface_label_val.csv --target=gender --groups=race,age --output=DIR``."""

import argparse
import json
from pathlib import Path

from clip_jax.errors import UserError

HELP = (
    "Audit a model on a table of images with label columns: accuracy, harmful labels, retrieval, association by group."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument("--data", required=True, help="a CSV file with a column of image paths and columns of labels")
    parser.add_argument("--target", required=True, help="the column that is classified, such as gender")
    parser.add_argument("--groups", required=True, help="columns by which results are split, such as race,age")
    parser.add_argument(
        "--template", default="a photo of a {} person.", help="a prompt with {} for a value of --target"
    )
    parser.add_argument("--names", default="", help="how prompts name the values of --target: Male=male,Female=female")
    parser.add_argument("--query", action="append", help="a text to rank images by; may be repeated")
    parser.add_argument("-k", type=int, default=100, help="hits of a query that are compared with the table's shares")
    parser.add_argument("--output", required=True, help="a folder for bias.html and bias.json")
    parser.add_argument("--batch-size", type=int, default=64)


def run(arguments: argparse.Namespace) -> None:
    from clip_jax.commands.evaluate import open_subject  # after parsing: JAX takes a second to import
    from clip_jax.data import templates
    from clip_jax.evaluation import audit
    from clip_jax.evaluation.results import strict
    from clip_jax.reports import bias as page
    from clip_jax.storage import atomic

    if arguments.k < 1 or arguments.batch_size < 1:
        raise UserError("-k and --batch-size: at least 1")
    templates.check("--template", (arguments.template,))
    groups = tuple(filter(None, (name.strip() for name in arguments.groups.split(","))))
    queries = tuple(arguments.query or audit.QUERIES)
    wanted = audit.Wanted(arguments.target, groups, arguments.template, _names(arguments.names), queries, arguments.k)
    source = audit.open_labeled(Path(arguments.data).expanduser())
    audit.check(source, wanted)
    subject = open_subject(arguments.model, arguments.batch_size)
    found = strict(audit.audit(source, subject.embed(source, texts=False), subject.texts, wanted))
    output = Path(arguments.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    record = {"model": arguments.model, "source": source.name, "fingerprint": source.fingerprint} | found
    atomic.write_text(output / "bias.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    atomic.write_text(output / "bias.html", page.render(f"{arguments.model} on {source.name}", found))
    print(f"{found['target']}  accuracy {found['accuracy']:.4f}  ({found['images']} images)")
    for name, split in found["by"].items():
        print(f"{name}  worst {split['worst']:.4f} ({split['worst_group']})  gap {split['gap']:.4f}")
    print(f"{output}/bias.html, bias.json")


def _names(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals and name.strip() for _, equals, name in pairs):
        raise UserError(f"--names={text}: pairs such as Male=male,Female=female")
    return {value.strip(): name.strip() for value, _, name in pairs}
