"""Prompt templates: one check for recipes, commands and the API. ``a photo of a {}.`` has exactly one ``{}``."""

from collections.abc import Sequence

from clip_jax.errors import UserError


def check(where: str, templates: Sequence[str]) -> None:
    """Raises UserError, beginning with ``where``, for a template without exactly one ``{}`` and for other braces."""
    if isinstance(templates, str) or not templates:
        raise UserError(f"{where}: give a list with at least one template, such as ('a photo of a {{}}.',)")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
            raise UserError(f"{where}: {template!r}: write {{}} once, for the class name, and no other braces")


def fill(template: str, name: str) -> str:
    """The prompt for a class; braces in its name are only characters."""
    return template.replace("{}", name)
