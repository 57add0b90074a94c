"""``clip-jax caption --model=runs/coca --image=PATH``."""

import argparse

from clip_jax.commands.paths import find_images

HELP = "Print a caption for each image, from a model with a decoder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a run folder, a folder of weights, or hf://org/name")
    parser.add_argument(
        "--image", required=True, action="append", help="a file, folder or pattern ('photos/*.jpg'); may be repeated"
    )
    parser.add_argument("--method", choices=("beam", "greedy", "top_p"), default="beam")
    parser.add_argument("--beams", type=int, default=6, help="beam: captions that are followed at the same time")
    parser.add_argument("--top-p", type=float, default=0.9, help="top_p: probability of the tokens drawn from")
    parser.add_argument("--temperature", type=float, default=1.0, help="top_p: divides the logits")
    parser.add_argument("--seed", type=int, default=0, help="top_p: of the random numbers")
    parser.add_argument("--max-tokens", type=int, default=30, help="of a caption, with its end token")
    parser.add_argument("--min-tokens", type=int, default=0, help="before the end token")


def run(arguments: argparse.Namespace) -> None:
    images = find_images(arguments.image)
    from clip_jax.model import load  # after parsing: JAX takes a second to import

    names = ("method", "beams", "top_p", "temperature", "seed", "max_tokens", "min_tokens")
    captions = load(arguments.model).generate(images, **{name: getattr(arguments, name) for name in names})
    for image, caption in zip(images, captions, strict=True):
        print(f"{image}\t{caption}")
