"""The five files keep to the size that README promises, and no file grows too long to read."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("data", "model", "prune", "train", "eval")
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstrings_in(source):
    """The places (line, column) where docstrings begin."""
    places = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                places.add((node.body[0].lineno, node.body[0].col_offset))
    return places


def count_tokens(source):
    """The number of names, numbers, strings and operators, without docstrings.

    An f-string is one token. Since Python 3.12 `tokenize` splits it into parts, which are not
    counted here.
    """
    docstrings = docstrings_in(source)
    names = tokenize.tok_name
    inside = 0  # of how many f-strings
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = names[token.type]
        if kind == "FSTRING_END":
            inside -= 1
        elif inside == 0 and token.type not in LAYOUT and token.start not in docstrings:
            count += 1
        if kind == "FSTRING_START":
            inside += 1
    return count


def functions_in(source):
    """{name: number of lines} of the functions and methods."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node.end_lineno - node.lineno + 1
    return found


def test_tokens_are_counted_without_layout_comments_and_docstrings():
    source = '"""Doc."""\n\n\ndef f(x):  # comment\n    """Doc."""\n    return f"{x + 1} {x!r}"\n'
    assert count_tokens(source) == 8  # def f ( x ) : return and the f-string


def test_budget():
    """The five files have at most 24,500 tokens, and prune.py at most 4,800 of them."""
    sources = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in FILES}
    tokens = {name: count_tokens(source) for name, source in sources.items()}
    assert sum(tokens.values()) <= 24_500, (sum(tokens.values()), tokens)
    assert tokens["prune"] <= 4_800, tokens
    for name, source in sources.items():
        assert source.count("\n") <= 950, name
        assert max(functions_in(source).values()) <= 80, name


def test_budget_of_what_they_share():
    """The two files that every program needs have at most 4,000 tokens, as README says about."""
    sources = [(ROOT / "tools" / name).read_text() for name in ("common.py", "fetch.py")]
    assert sum(count_tokens(source) for source in sources) <= 4_000
    assert count_tokens((ROOT / "tools" / "selection.py").read_text()) <= 1_450
