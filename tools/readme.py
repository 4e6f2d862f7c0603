"""What README.md and ARCHITECTURE.md hold for programs: code blocks and commands.

python tools/readme.py command NAME     prints the command that makes the environment .venv-NAME
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
ARCHITECTURE = README.with_name("ARCHITECTURE.md")


def blocks(language: str, document: Path = README) -> list[str]:
    """The fenced code blocks of a language, in their order."""
    text = document.read_text("utf-8")
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands() -> dict[str, str]:
    """The commands that make an environment of their own, each by the name of that environment."""
    found: dict[str, str] = {}
    for line in "".join(blocks("sh")).splitlines():
        if environment := re.match(r"python3 -m venv \.venv-(\w+) ", line):
            found[environment[1]] = line
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "command" or sys.argv[2] not in commands():
        sys.exit(f"usage: readme.py command {{{','.join(commands())}}}")
    print(commands()[sys.argv[2]])
