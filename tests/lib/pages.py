"""What README and docs show: their blocks, commands with what these print, and settings to be pasted."""

import re
from pathlib import Path
from typing import Any

HASH = re.compile(r"\b[0-9a-f]{64}\b")


def rounded(value: Any, digits: int = 9) -> Any:
    """Round the floats in a JSON value: their last digits are the processor's."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def console_steps(text: str) -> list[tuple[str, str]]:
    """Return the commands of the console blocks, each with what stands below it."""
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)
    return [
        (command, shown.strip())
        for block in blocks
        for command, shown in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n|\n(?!\$))*)", block, re.M)
    ]


def named_files(text: str) -> list[tuple[str, str]]:
    """Return the name and text of each block whose first line is a comment with a file's name."""
    return [(name, block) for block, name in re.findall(r"^```\w+\n((?:#|//) (\S+\.\w+)\n.*?)^```$", text, re.M | re.S)]


def paste(tables: str, file: Path) -> None:
    """Replace the tables of a settings file by those of the same names, as one does by hand."""
    text = file.read_text()
    for name in ("model", "features"):
        table = re.compile(rf"^\[{name}\]\n(?:(?!\[).*\n)*", re.M)
        (old,), (new,) = table.findall(text), table.findall(tables)
        text = text.replace(old, f"{new}\n")
    file.write_text(text)
