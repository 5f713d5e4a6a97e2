"""`grscale data FORMAT ... --out DIR`: reads a data set, cleans it, writes a dataset folder."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gr.data.amazon import read_amazon
from gr.data.clean import Sequences, clean
from gr.data.dataset import Dataset, DatasetWriter, User
from gr.data.movielens import read_movielens
from gr.data.planted import WORLD_FILE
from gr.data.readers import UNKNOWN_TIME, Source, read_jsonl
from gr.data.tables import COLUMNS, read_table
from gr.errors import UserError
from gr.files import read_object, sha256, usable

FORMATS = ("jsonl", "amazon", "movielens", "table")


def import_dataset(
    format: str,
    paths: Sequence[Path],
    out: Path,
    *,
    name: str | None = None,
    k_core: int = 0,
    min_user_items: int = 3,
    shuffle_ties: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Reads ``paths`` in ``format``, cleans them (`gr.data.clean`), writes the dataset folder ``out``; returns its manifest.

    ``paths``: jsonl [sequences, items]; amazon [reviews, metadata]; movielens [folder]; table [interactions] or
    [interactions, items], whose column names ``columns`` gives (`gr.data.tables.COLUMNS`). ``k_core`` 0 filters nothing.
    A fault in the input is a UserError and leaves ``out`` as it was.
    """
    paths = [Path(path) for path in paths]
    with usable(out):
        _check_out(out)
    source = _read(format, paths, columns)
    sequences = clean(source, k_core=k_core, min_user_items=min_user_items, shuffle_ties=shuffle_ties)
    options: dict[str, Any] = {"k_core": k_core, "min_user_items": min_user_items}
    if shuffle_ties is not None:
        options["shuffle_ties"] = shuffle_ties
    origin = {
        "format": format,
        "files": [{"name": file.name, "sha256": sha256(file)} for file in _files(format, paths)],
        "options": options | ({"columns": dict(columns)} if columns else {}),
    }
    _check_keys(sequences)
    with DatasetWriter(out, name or out.resolve().name, origin, sequences.items, sequences.repairs) as writer:
        for user in _users(sequences):
            writer.add(user)
    return read_object(out / "manifest.json")


def _read(format: str, paths: Sequence[Path], columns: Mapping[str, str] | None) -> Source:
    if columns and format != "table":
        raise UserError(f"format '{format}' has fixed columns; only 'table' takes their names")
    match format, paths:
        case "jsonl", [sequences, items]:
            return read_jsonl(sequences, items)
        case "amazon", [reviews, meta]:
            return read_amazon(reviews, meta)
        case "movielens", [folder]:
            return read_movielens(folder)
        case "table", [interactions]:
            return read_table(interactions, None, columns)
        case "table", [interactions, items]:
            return read_table(interactions, items, columns)
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'; formats: {', '.join(FORMATS)}")
    raise UserError(f"format '{format}' does not take {len(paths)} paths")


def _files(format: str, paths: Sequence[Path]) -> list[Path]:
    return [paths[0] / "ratings.dat", paths[0] / "movies.dat"] if format == "movielens" else list(paths)


def _check_out(out: Path) -> None:
    """A finished import replaces ``out``, so it must be a dataset folder, empty, or not there: never somebody's other files."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; give --out a folder")
    if out.samefile("."):
        raise UserError(f"{out}: is the current folder, which would be replaced; give --out another")
    others = sorted({path.name for path in out.iterdir()} - _dataset_files(out))
    if others:
        raise UserError(f"{out}: holds something else than a dataset ({others[0]}); give --out a new folder")


def _dataset_files(out: Path) -> set[str]:
    """The names of the files that a dataset folder may hold; none where ``out`` is no dataset's, but say a split's."""
    try:
        manifest = Dataset(out).manifest
        listed = {str(entry["file"]) for entry in (manifest["items"], *manifest["shards"])}
    except (UserError, KeyError, TypeError):
        return set()
    return set() if "protocol" in manifest else {"manifest.json", WORLD_FILE} | listed


def _check_keys(sequences: Sequences) -> None:
    for key in (*sequences.user_keys, *(item.key for item in sequences.items)):
        try:
            key.encode()
        except UnicodeEncodeError:
            raise UserError(f"key {key!r} is not valid Unicode; keys of users and items must be") from None


def _users(sequences: Sequences) -> Iterator[User]:
    offsets = sequences.offsets.tolist()
    for u, key in enumerate(sequences.user_keys):
        rows = slice(offsets[u], offsets[u + 1])
        times = [None if t == UNKNOWN_TIME else t for t in sequences.times[rows].tolist()]
        yield User(key, sequences.codes[rows].tolist(), times)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares one subcommand per format, for `run`."""
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    jsonl = formats.add_parser("jsonl", help="JSON lines: one line per user, one per item")
    jsonl.add_argument("paths", nargs=2, type=Path, metavar=("SEQUENCES", "ITEMS"), help="plain or .gz")
    amazon = formats.add_parser("amazon", help="public Amazon files of 2014 or 2018")
    amazon.add_argument("paths", nargs=2, type=Path, metavar=("REVIEWS", "META"), help=".json.gz")
    movielens = formats.add_parser("movielens", help="MovieLens-1M")
    movielens.add_argument("paths", nargs=1, type=Path, metavar="FOLDER", help="with ratings.dat and movies.dat")
    table = formats.add_parser("table", help="CSV, TSV or Parquet with named columns")
    table.add_argument("paths", nargs=1, type=Path, metavar="INTERACTIONS", help="one row per interaction")
    table.add_argument("--items", type=Path, metavar="ITEMS", help="one row per item: key, title, attributes")
    for role, default in COLUMNS.items():
        where = "ITEMS" if role in {"key", "title", "attributes"} else "INTERACTIONS"
        table.add_argument(f"--{role}-column", metavar="NAME", help=f"column of {where} (default: {default})")
    for each in (jsonl, amazon, movielens, table):
        each.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset folder to write")
        each.add_argument("--name", help="the data set's name (default: the folder's)")
        each.add_argument("--k-core", type=int, default=0, metavar="K", help="keep users and items with K interactions or more")
        each.add_argument(
            "--min-user-items", type=int, default=3, metavar="N", help="drop users with fewer items (default: %(default)s)"
        )
        each.add_argument(
            "--shuffle-ties", type=int, metavar="SEED", help="put a user's items of one time in a random order, not the file's"
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`import_dataset` on parsed arguments; returns the manifest."""
    paths, columns = list(args.paths), {}
    if args.format == "table":
        given = {role: getattr(args, f"{role}_column") for role in COLUMNS}
        columns = {role: column for role, column in given.items() if column is not None}
        paths += [args.items] if args.items else []
    return import_dataset(
        args.format,
        paths,
        args.out,
        name=args.name,
        k_core=args.k_core,
        min_user_items=args.min_user_items,
        shuffle_ties=args.shuffle_ties,
        columns=columns,
    )
