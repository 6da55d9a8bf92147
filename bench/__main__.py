"""List the questions and answer them: `python -m bench [NAME] [options of that question]`.

A question is a module of this folder whose docstring has a line that starts with "Question".
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import BenchError


def questions() -> dict[str, str]:
    """Names of the questions and the first line of each, read without importing any of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if any(line.startswith("Question ") for line in text.splitlines()):
            found[path.stem] = text.splitlines()[0]
    return found


def answer(name: str, options: Sequence[str]) -> bool:
    """Run one question as if it had been called by its own name; whether it gave an answer."""
    sys.argv = [f"bench {name}", *options]
    try:
        importlib.import_module(f"bench.{name}").main()
    except BenchError as error:
        print(f"{name}: no answer: {error}", file=sys.stderr)
        return False
    return True


def main() -> None:
    """Answer the question named, or list all of them and answer each."""
    known = questions()
    first, *rest = sys.argv[1:] or [""]
    if first in known:
        sys.exit(0 if answer(first, rest) else 1)
    if first not in {"", "--list", "--verbose"}:
        print(f"no question {first!r}; there are: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    width = max(map(len, known))
    for name, line in known.items():
        print(f"{name:{width}}  {line}", flush=True)
    if first != "--list":
        options = [first] if first else []
        answered = [answer(name, options) for name in known]  # Each, also after one that failed.
        sys.exit(0 if all(answered) else 1)


if __name__ == "__main__":
    main()
