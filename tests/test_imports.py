"""Imports go one way, in the order that CONTRIBUTING.md gives; there are no circles."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules() -> dict[str, set[str]]:
    """Module of clip_jax -> the modules of clip_jax that it imports, wherever in its file."""
    files = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("clip_jax/**/*.py")}
    names = {path: name.removesuffix(".__init__") for path, name in files.items()}
    known, graph = set(names.values()), {}
    for path, name in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imported.add(inner if inner in known else node.module)
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        graph[name] = (imported & known) - {name}
    return graph


def test_there_are_no_import_circles():
    list(graphlib.TopologicalSorter(modules()).static_order())  # raises CycleError, which names the circle


def test_each_part_imports_only_its_own_line_and_the_lines_above_it():
    block = re.search(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    lines = [line.split() for line in block.splitlines()]
    level = {name: number for number, names in enumerate(lines) for name in names}
    parts = {name: name.split(".")[1] for name in modules() if "." in name}
    wrong = [
        f"{module} imports {other}"
        for module, imported in modules().items()
        for other in imported
        if level.get(parts.get(module), 99) < level.get(parts.get(other), -1)
    ]
    assert wrong == []
    assert {"losses", "objectives", "training", "planning"} <= level.keys()
