"""List the questions and answer them: `python -m bench [NAME] [options of that question]`.

A question is a module of this folder whose docstring has a line that starts with "Question".
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def questions() -> dict[str, str]:
    """Names of the questions and the first line of each, read without importing any of them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if any(line.startswith("Question ") for line in text.splitlines()):
            found[path.stem] = text.splitlines()[0]
    return found


def answer(name: str, options: Sequence[str]) -> None:
    """Run one question as if it had been called by its own name."""
    sys.argv = [f"bench {name}", *options]
    importlib.import_module(f"bench.{name}").main()


def main() -> None:
    """Answer the question named, or list all of them and answer each."""
    known = questions()
    name, *options = sys.argv[1:] or [""]
    if name in known:
        answer(name, options)
    elif not name or name in {"--list", "--verbose"}:
        width = max(map(len, known), default=0)
        for question, line in known.items():
            print(f"{question:{width}}  {line}", flush=True)
        for question in () if name == "--list" else known:
            answer(question, sys.argv[1:])
    else:
        print(f"no question {name!r}; there are: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
