"""Imports run one way: data, then model and prune, then eval, then train, then tools."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What each file may import of ours. prune.py knows none of the others.
MAY_IMPORT = {
    "data": set(),
    "model": {"data"},
    "prune": set(),
    "eval": {"data", "model", "prune"},
    "train": {"data", "model", "prune", "eval"},
    "tools/timing": set(),
    "tools/report": {"data", "model", "prune", "eval"},
    "tools/masks": {"data", "model", "prune", "eval", "train"},
    "tools/deploy": {"data", "model", "prune", "eval", "train", "tools.timing", "tools.masks"},
    "tools/bench": {"data", "model", "prune", "eval", "train", "tools.timing", "tools.deploy"},
}


def imports(path):
    """The modules that a file imports: at its top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way():
    ours = {name.replace("/", ".") for name in MAY_IMPORT}
    for name, allowed in MAY_IMPORT.items():
        used = imports(ROOT / f"{name}.py") & ours
        assert used <= allowed, (name, used - allowed)


def test_every_file_is_in_the_table():
    files = {path.stem for path in ROOT.glob("*.py")}
    files |= {f"tools/{path.stem}" for path in (ROOT / "tools").glob("*.py")}
    assert files - {"tools/__init__"} == MAY_IMPORT.keys()


def test_prune_knows_nothing_of_bert():
    """prune.py asks a model for its layers and matrices, and never walks into BERT itself."""
    source = (ROOT / "prune.py").read_text(encoding="utf-8")
    for name in ("bert.", "encoder[", ".config", "attention.", "hidden_size"):
        assert name not in source, name
