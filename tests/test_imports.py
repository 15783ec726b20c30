"""Imports run one way: tools/common, data, then model and prune, eval, train, the other tools."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What each file may import of ours. prune.py knows none of the others.
BASE = {"tools.common", "tools.fetch"}
ALL = {"data", "model", "prune", "eval", "train", "tools.sizes", *BASE}
MAY_IMPORT = {
    "tools/common": set(),
    "tools/fetch": {"tools.common"},
    "tools/sizes": {"prune"},
    "tools/timing": set(),
    "tools/selection": set(),
    "tools/cost": set(),
    "data": BASE,
    "model": {"data", *BASE},
    "prune": {"tools.selection"},
    "eval": {"data", "model", "prune", "tools.sizes", *BASE},
    "train": {"data", "model", "prune", "eval", *BASE},
    "tools/record": {"tools.common"},
    "tools/report": {"tools.record", *ALL} - {"train"},
    "tools/compare": {"tools.common", "tools.report"},
    "tools/grid": {"tools.common", "tools.record"},  # and the module of --program
    "tools/gradients": {"data", "model", "tools.common", "train"},
    "tools/variants": {"tools.selection", "prune", "train"},
    "tools/masks": ALL,
    "tools/deploy": {"tools.timing", "tools.masks", *ALL},
    "tools/bench": {"tools.timing", "tools.deploy", "tools.selection", "tools.cost", *ALL},
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
