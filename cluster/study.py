"""A study's file: read, checked against `cluster.spec`, every mistake named with its line."""

import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from cluster.spec import Study
from cluster.yaml_lines import Loc, apply_override, dotted, load, nearest
from gr.errors import UserError

BUILTIN = Path(__file__).parent / "studies" / "builtin.yaml"


@dataclass(frozen=True)
class Loaded:
    """A checked study, the document it came from (overrides applied), and where each key stands."""

    study: Study
    raw: dict[str, Any]
    path: Path
    lines: dict[Loc, int]

    def where(self, loc: Loc) -> str:
        """``study.yaml:17: sid.ladder[2]`` for the messages of later checks."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return f"{self.path}:{self.lines.get(loc, 1)}"


def load_study(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Reads and checks a study; UserError names the file, the line, the key and the nearest valid spelling."""
    raw, lines = load(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}:1: a study is a mapping of keys")
    given: dict[Loc, str] = {}
    for override in overrides:
        loc = apply_override(raw, override)
        given[loc] = f"--set {override}"
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, raw, path, lines, given)) from None
    loaded = Loaded(study, raw, path, lines)
    _check_names(loaded)
    return loaded


def _check_names(loaded: Loaded) -> None:
    """What one model cannot see: names that refer to each other."""
    study = loaded.study
    if not (study.sid or study.llm or study.cf):
        raise UserError(f"{loaded.path}:1: nothing to measure: give sid, llm or cf")
    names = {
        "sid": [rung.name for rung in study.sid.ladder] if study.sid else [],
        "llm": [rung.name for rung in study.llm.ladder] if study.llm else [],
    }
    for key, rungs in names.items():
        for i, name in enumerate(rungs):
            if name in rungs[:i]:
                raise UserError(f"{loaded.where((key, 'ladder', i, 'name'))}: {key}.ladder[{i}].name: {name!r} is there twice")
    if study.sid:
        for i, rung in enumerate(study.sid.ladder):
            for field, known in (("encoder", study.sid.encoders), ("quantizer", study.sid.quantizers)):
                value = getattr(rung, field)
                if value is not None and value not in known:
                    where = loaded.where(("sid", "ladder", i, field))
                    raise UserError(
                        f"{where}: sid.ladder[{i}].{field}: {value!r} is not among sid.{field}s{nearest(value, known)}"
                    )
    if study.llm:
        _check_llm_sids(loaded)
        for i, llm_rung in enumerate(study.llm.ladder):
            where = loaded.where(("llm", "ladder", i))
            if llm_rung.model is None and study.llm.pretrain is None:
                raise UserError(f"{where}: llm.ladder[{i}]: a fresh backbone needs llm.pretrain")
            if llm_rung.model and llm_rung.lr is None and study.llm.train.optimizer.lr_at_d_model:
                raise UserError(f"{where}: llm.ladder[{i}].lr: missing; lr_at_d_model can't be applied to a model from outside")


def _check_llm_sids(loaded: Loaded) -> None:
    """The SIDs that an LLM reads are those of the study's ``sid``."""
    study = loaded.study
    assert study.llm is not None
    train = study.llm.train
    if train.input != "titles" and not study.sid:
        where = loaded.where(("llm", "train", "input"))
        raise UserError(f"{where}: llm.train.input: {train.input} needs the SIDs of sid.encoders and sid.quantizers; give sid")
    for field in ("encoder", "quantizer"):
        value, where = getattr(train, field), loaded.where(("llm", "train", field))
        if value is not None and train.input == "titles":
            raise UserError(f"{where}: llm.train.{field}: input: titles has no SIDs; give input: sids or both, or leave it out")
        known = getattr(study.sid, f"{field}s") if study.sid else {}
        if value is not None and value not in known:
            raise UserError(f"{where}: llm.train.{field}: {value!r} is not among sid.{field}s{nearest(value, known)}")


def _explain(error: ValidationError, raw: Any, path: Path, lines: dict[Loc, int], given: dict[Loc, str]) -> str:
    # An unknown key is told first: what it should have been is then often "missing" too.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = _in_document(first["loc"], raw)
    message = _message(first, loc)
    for override_loc, override in given.items():
        if loc[: len(override_loc)] == override_loc:
            return f"{override}: {dotted(loc)}: {message}"
    line = next(lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines)
    return f"{path}:{line}: {dotted(loc) + ': ' if loc else ''}{message}"


def _message(first: Any, loc: Loc) -> str:
    kind = first["type"]
    if kind == "extra_forbidden":
        known = _keys_at(Study, loc[:-1])
        return f"unknown key{nearest(str(loc[-1]), known) or '; known: ' + ', '.join(sorted(known))}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(first["ctx"]["error"])
    text = first["msg"][0].lower() + first["msg"][1:]
    if kind in {"union_tag_invalid", "literal_error"}:
        got = first["ctx"].get("tag") or first["input"]
        expected = re.findall(r"'([^']+)'", first["ctx"].get("expected_tags") or first["ctx"]["expected"])
        return f"{got!r} is not one of {', '.join(expected)}{nearest(str(got), expected)}"
    return f"{text}, not {first['input']!r}" if not isinstance(first["input"], dict | list) else text


def _in_document(loc: Sequence[str | int], raw: Any) -> Loc:
    """The location without the names that pydantic adds for union members and keys."""
    found: list[str | int] = []
    at: Any = raw
    for i, part in enumerate(loc):
        known = range(len(at)) if isinstance(at, list) else at if isinstance(at, dict) else ()
        if part in known:
            at = at[part]
            found.append(part)
        elif i == len(loc) - 1 and part != "[key]" and isinstance(at, dict) and isinstance(part, str):
            found.append(part)  # the missing key itself
    return tuple(found)


def _keys_at(model: Any, loc: Loc) -> list[str]:
    """The valid keys of the mapping at ``loc``."""
    at: list[Any] = [model]
    for part in loc:
        following: list[Any] = []
        for annotation in at:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                if part in annotation.model_fields:
                    following += _alternatives(annotation.model_fields[str(part)].annotation)
            elif typing.get_origin(annotation) is dict:
                following += _alternatives(typing.get_args(annotation)[1])
            elif typing.get_origin(annotation) is list:
                following += _alternatives(typing.get_args(annotation)[0])
        at = following or at
    models = [a for a in at if isinstance(a, type) and issubclass(a, BaseModel)]
    return sorted({name for m in models for name in m.model_fields})


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [a for part in typing.get_args(annotation) for a in _alternatives(part)]
    return [annotation]
