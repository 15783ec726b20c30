"""README's cover states a budget of lines; it is kept."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path):
    """Lines that hold code: not blank, not comment, not docstring."""
    source = path.read_text(encoding="utf-8")
    documented = {ast.Module, ast.ClassDef, ast.FunctionDef}
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if type(node) in documented and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def test_line_budget():
    counts = {name: lines_of_code(ROOT / f"{name}.py") for name in ("data", "model", "prune", "train", "eval")}
    assert sum(counts.values()) <= 1850 and counts["prune"] <= 450, counts
