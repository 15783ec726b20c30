"""Imports run one way: support, then prune and kinds, data, model, models, eval, train, tools."""

import ast
import subprocess
import sys

from conftest import ROOT

# The floors of the house, from the ground up. A file imports files of lower floors and, in a folder
# of several files, of its own. prune.py and kinds/ do not know each other.
FLOORS = [("support",), ("prune", "kinds"), ("data",), ("model",), ("models",), ("eval",)]
FLOORS += [("train",), ("tools",)]
NEEDS = {"prune": {"support"}, "kinds": {"support"}, "model": set()}


def files():
    """{module: path} of all files of the program."""
    found = {}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        place = path.relative_to(ROOT).with_suffix("")
        if place.parts[0] not in ("tests", "demo"):
            name = ".".join(place.parts).removesuffix(".__init__")
            found[name] = path
    return found


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


def graph():
    """{module: the modules of ours that it imports}."""
    ours = files()
    return {name: imports(path) & ours.keys() - {name} for name, path in ours.items()}


def test_imports_run_one_way():
    """No file imports one of a higher floor."""
    level = {name: i for i, names in enumerate(FLOORS) for name in names}
    for name, imported in graph().items():
        floor = name.split(".")[0]
        for other in imported:
            below = other.split(".")[0]
            assert level[below] < level[floor] or below == floor, (name, other)
            if floor in NEEDS:
                assert below in NEEDS[floor] | {floor}, (name, other)


def test_there_is_no_circle():
    """The files can be put in an order in which each imports only those before it."""
    left = graph()
    # A package imports its files, and they name the package when they import each other.
    left = {name: others - {name.split(".")[0]} for name, others in left.items()}
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        assert free, left
        left = {name: others for name, others in left.items() if name not in free}


def test_no_import_of_ours_is_hidden_in_a_function():
    for path in files().values():
        top = {id(node) for node in ast.parse(path.read_text(encoding="utf-8")).body}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in top:
                assert node.module.split(".")[0] not in {f for names in FLOORS for f in names}, path


def test_the_ground_floor_needs_no_torch():
    """The terminal, files and downloads are imported without torch."""
    files = "support.terminal, support.files, support.fetch"
    code = f"import sys, {files}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_only_a_kind_knows_its_name():
    """Outside kinds/, only the rows of TASKS and the recipes name a kind of task.

    models/ writes "score" as the name of an output, which is no kind.
    """
    names = {"classify", "score", "span", "tag", "generate"}
    for name, path in files().items():
        if name.startswith(("kinds", "models")) or name in ("data", "support.recipes"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                assert node.value not in names, (name, node.lineno)


def test_prune_knows_nothing_of_bert():
    """prune.py asks a model for its layers and matrices, and never walks into BERT itself."""
    for path in (ROOT / "prune.py", ROOT / "support/patterns.py", ROOT / "support/matrices.py"):
        source = path.read_text(encoding="utf-8")
        for name in ("bert.", "encoder[", ".config", "attention.", "hidden_size", '"Q', "QKVO"):
            assert name not in source, (path, name)
