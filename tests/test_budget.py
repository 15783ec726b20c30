"""The files keep to the sizes that README promises, and no function grows too long to read."""

import ast
import io
import tokenize

from conftest import ROOT

FIVE = {"train": 575, "prune": 600, "model": 340, "data": 450, "eval": 340}  # lines at most
LARGE = {"tools/deploy": 850, "tools/report": 600, "tools/bench": 600}
FOLDERS = ("kinds", "models", "support", "tools")
TOTAL = 12_316  # lines of Python outside tests/ and demo/
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def sources():
    """{name: text} of all files of Python outside tests/ and demo/."""
    paths = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        paths += ROOT.glob(f"{folder}/*.py")
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix() for path in paths}
    return {name: path.read_text(encoding="utf-8") for path, name in names.items()}


def docstrings_in(source):
    """{place (line, column) where a docstring begins: its last line}."""
    places = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                places[first.lineno, first.col_offset] = first.end_lineno
    return places


def tokens_of(source):
    """The names, numbers, strings and operators, without docstrings.

    An f-string is one token. Since Python 3.12 `tokenize` splits it into parts, of which only the
    first is counted here.
    """
    docstrings = docstrings_in(source)
    names = tokenize.tok_name
    inside = 0  # of how many f-strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        part = names[token.type]
        if part == "FSTRING_END":
            inside -= 1
        elif inside == 0 and token.type not in LAYOUT and token.start not in docstrings:
            yield token
        if part == "FSTRING_START":
            inside += 1


def count_tokens(source):
    return len(list(tokens_of(source)))


def count_lines_of_code(source):
    """The number of lines with code: without blank lines, comments and docstrings."""
    lines = set()
    for token in tokens_of(source):
        lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def functions_in(source):
    """{name: number of lines} of the functions and methods."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node.end_lineno - node.lineno + 1
    return found


def test_what_is_counted():
    source = '"""Doc."""\n\n\ndef f(x):  # comment\n    """Doc."""\n    return f"{x + 1} {x!r}"\n'
    assert count_tokens(source) == 8  # def f ( x ) : return and the f-string
    assert count_lines_of_code(source) == 2


def test_the_five_files():
    """Each of the five files has its bound of lines, and all have at most 14,500 tokens."""
    found = sources()
    for name, most in FIVE.items():
        assert found[name].count("\n") <= most, name
    tokens = {name: count_tokens(found[name]) for name in FIVE}
    assert sum(tokens.values()) <= 14_500, (sum(tokens.values()), tokens)
    assert tokens["prune"] <= 4_300, tokens
    code = sum(count_lines_of_code(found[name]) for name in FIVE)
    said = f"about {round(code, -1):,} lines of code"
    assert said in " ".join((ROOT / "README.md").read_text().split()), said


def test_the_other_files():
    """A file has at most 350 lines, but three programs have more; so has the whole its bound."""
    found = sources()
    for name, source in found.items():
        if name not in FIVE:
            assert source.count("\n") <= LARGE.get(name, 350), name
    total = sum(source.count("\n") for source in found.values())
    assert total <= TOTAL, total


def test_functions_fit_one_screen():
    for name, source in sources().items():
        for function, lines in functions_in(source).items():
            assert lines <= 60, (name, function, lines)
