"""YAML with the line of every key, so that a mistake can be shown where it is."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from gr.errors import UserError

Loc = tuple[str | int, ...]


def load(path: Path) -> tuple[Any, dict[Loc, int]]:
    """The document, and the 1-based line of each key and list element by its path.

    UserError for a file that is missing or not YAML, for a key written twice, and for a key that is a list or a mapping.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        loader = yaml.SafeLoader(path.read_text())
        node = loader.get_single_node()
        lines: dict[Loc, int] = {}
        if node is None:
            raise UserError(f"{path}: empty")
        _walk(node, (), lines, path)
        return loader.construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not YAML: not UTF-8 text") from None


def _walk(node: yaml.Node, loc: Loc, lines: dict[Loc, int], path: Path) -> None:
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                raise UserError(f"{path}:{line}: {dotted(loc) + ': ' if loc else ''}a key is a {kind}; it must be a word")
            if key.value in seen:
                raise UserError(f"{path}:{line}: {dotted((*loc, key.value))}: written twice, first on line {seen[key.value]}")
            seen[key.value] = line
            lines[(*loc, key.value)] = line
            _walk(value, (*loc, key.value), lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*loc, i), lines, path)


def dotted(loc: Loc) -> str:
    """``("sid", "ladder", 2, "d_model")`` -> ``sid.ladder[2].d_model``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def apply_override(raw: dict[str, Any], override: str) -> Loc:
    """Sets one key of the document, given as ``key.path=value``; returns where. UserError when there is no such place."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*", key):
        raise UserError(f"--set {override}: write key.path=value, such as sid.train.optimizer.steps=100 or seeds=[0]")
    loc: Loc = tuple(int(part[1:-1]) if part.startswith("[") else part for part in re.findall(r"\[\d+\]|[^.\[\]]+", key))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not YAML") from None
    at: Any = raw
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(part, int):
            if not isinstance(at, list) or part >= len(at):
                size = f"a list of {len(at)}" if isinstance(at, list) else "no list"
                raise UserError(f"--set {override}: {dotted(loc[:i])} is {size}, so there is no {dotted(loc[: i + 1])}")
        elif not isinstance(at, dict):
            raise UserError(f"--set {override}: {dotted(loc[:i])} has no keys")
        elif not last and at.get(part) is None:
            at[part] = {}  # the key may be left out of the file; whether it exists at all is checked with the rest
        if last:
            at[part] = value
        else:
            at = at[part]
    return loc


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known word that is most like it; empty where none is."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
