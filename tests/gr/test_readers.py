"""Readers and the importer: each format read right, each fault named once, nothing half-written."""

import argparse
import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.data.importer import add_arguments, import_dataset, run
from gr.data.split import LeaveOneOut, prepare_split
from gr.errors import UserError

BEAUTY = Path(__file__).resolve().parents[3] / "shared" / "data" / "amazon-beauty"
ITEMS = [
    {"item": 10, "asin": "A", "title": " Tom &amp;  Co ", "attributes": ["Nails", "Nails", ""]},
    {"item": 20, "asin": "B", "title": "B title", "attributes": []},
    {"item": 5, "asin": "C", "title": None, "attributes": None},
    {"item": 7, "asin": "D", "title": "never bought", "attributes": []},
]
USERS = [
    {"user": "u1", "items": [20, 5, 10], "timestamps": [1, 2, 2]},
    {"user": 2, "items": [10, 20, 10, 5], "timestamps": [3, None, 1, 2]},
]


def jsonl(path: Path, rows: list) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def imported(format: str, paths: list[Path], out: Path, **options) -> tuple[Dataset, dict, dict]:
    """The dataset, its items by key, its users' item keys and times by key."""
    manifest = import_dataset(format, paths, out, **options)
    dataset = Dataset(out)
    assert dataset.manifest == manifest
    dataset.verify()
    items = dataset.items().to_pylist()
    assert [row["item"] for row in items] == list(range(len(items)))
    users = {u.key: [(items[i]["key"], t) for i, t in zip(u.items, u.timestamps, strict=True)] for u in dataset.users()}
    return dataset, {row["key"]: (row["title"], row["attributes"]) for row in items}, users


def fault(format: str, paths: list[Path], out: Path, **options) -> str:
    """The one line of the UserError, after checking that nothing was left behind."""
    with pytest.raises(UserError) as error:
        import_dataset(format, paths, out, **options)
    assert not out.exists()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    paths = [jsonl(tmp_path / f"s{suffix}", USERS), jsonl(tmp_path / f"i{suffix}", ITEMS)]
    dataset, items, users = imported("jsonl", paths, tmp_path / "out", name="mine")
    assert items == {"A": ("Tom & Co", ["Nails"]), "B": ("B title", []), "C": ("", []), "D": ("never bought", [])}
    assert users["u1"] == [("B", 1), ("C", 2), ("A", 2)]
    assert users["2"] == [("A", 3), ("B", None), ("A", 1), ("C", 2)], "an unknown time keeps the file's order"
    repairs = dataset.manifest["repairs"]
    assert (repairs["titles_cleaned"], repairs["attributes_cleaned"]) == (1, 1)
    assert (repairs["unused_items_kept"], repairs["users_with_unknown_times"]) == (1, 1)
    assert dataset.manifest["name"] == "mine"
    assert dataset.counts == {"users": 2, "items": 4, "interactions": 7}


def test_jsonl_faults(tmp_path: Path) -> None:
    def message(users: list, items: list = ITEMS) -> str:
        return fault("jsonl", [jsonl(tmp_path / "s.jsonl", users), jsonl(tmp_path / "i.jsonl", items)], tmp_path / "out")

    good = USERS[0]
    assert "s.jsonl:2: 1 items but 2 timestamps" in message([good, {"user": "v", "items": [5], "timestamps": [1, 2]}])
    line = message([good, {"user": "v", "items": [5]}])
    assert "s.jsonl:2: no column 'timestamps'" in line
    assert "columns there: items, user" in line
    assert "s.jsonl:1: item 99 is not in" in message([{"user": "v", "items": [99], "timestamps": [1]}])
    assert "s.jsonl:1: item True is not in" in message(
        [{"user": "v", "items": [True], "timestamps": [1]}], [{**ITEMS[0], "item": 1}]
    )
    assert "s.jsonl:2: user 'u1' appears a second time" in message([good, good])
    assert "s.jsonl:1: column 'timestamps' must be Unix seconds" in message([{"user": "v", "items": [5], "timestamps": ["x"]}])
    assert "s.jsonl:1: columns 'items' and 'timestamps' must be lists" in message([{"user": "v", "items": 5, "timestamps": [1]}])
    assert "s.jsonl:1: column 'user' must be a non-empty string" in message([{**good, "user": None}])
    assert "s.jsonl:1: expected a JSON object, found list" in message([[1]])
    assert "i.jsonl:5: asin 'A' appears a second time (first on line 1)" in message([good], [*ITEMS, {**ITEMS[0], "item": 11}])
    assert "i.jsonl:5: item 20 appears a second time (first on line 2)" in message([good], [*ITEMS, {**ITEMS[1], "asin": "Z"}])
    assert "i.jsonl:1: no column 'title'" in message([good], [{"item": 1, "asin": "A", "attributes": []}])
    assert "i.jsonl:1: column 'attributes' must be a list of strings" in message([good], [{**ITEMS[0], "attributes": "Nails"}])
    assert "milliseconds" in message([{**good, "timestamps": [1400000000000] * 3}])
    assert "not valid Unicode" in message([{**good, "user": "\ud800"}])
    assert "no interactions" in message([])


def test_malformed_line_is_named(tmp_path: Path) -> None:
    items = jsonl(tmp_path / "i.jsonl", ITEMS)
    sequences = tmp_path / "s.jsonl"
    for bad in (b'{"user": "v", "ite', b"\xff\xfe", b"[" * 100_000):
        sequences.write_bytes(json.dumps(USERS[0]).encode() + b"\n\n" + bad)
        assert "s.jsonl:3: not a JSON object" in fault("jsonl", [sequences, items], tmp_path / "out")
    assert "nowhere.jsonl: No such file" in fault("jsonl", [tmp_path / "nowhere.jsonl", items], tmp_path / "out")


def test_truncated_and_damaged_gzip(tmp_path: Path) -> None:
    items = jsonl(tmp_path / "i.jsonl", ITEMS)
    many = [{**USERS[0], "user": f"user {i * i}"} for i in range(5000)]
    sequences = jsonl(tmp_path / "s.jsonl.gz", many)
    whole = sequences.read_bytes()
    sequences.write_bytes(whole[: len(whole) // 2])
    line = fault("jsonl", [sequences, items], tmp_path / "out")
    assert "s.jsonl.gz: truncated gzip file" in line
    number = int(line.split("after about line ")[1].split(";")[0])
    assert 500 < number < 4500
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    sequences.write_bytes(damaged)
    line = fault("jsonl", [sequences, items], tmp_path / "out")
    assert "s.jsonl.gz" in line
    damaged = bytearray(whole)
    damaged[-8] ^= 1  # the checksum at the end: only a reader that goes to the end sees it
    sequences.write_bytes(damaged)
    assert "s.jsonl.gz: damaged gzip file after about line 5000 (CRC" in fault("jsonl", [sequences, items], tmp_path / "out")


REVIEWS = [
    {"reviewerID": "r1", "asin": "X", "unixReviewTime": 30, "overall": 5.0},
    {"reviewerID": "r1", "asin": "Y", "unixReviewTime": 10, "overall": 1.0},
    {"reviewerID": "r1", "asin": "Y", "unixReviewTime": 10, "overall": 1.0},
    {"reviewerID": "r1", "asin": "Y", "unixReviewTime": 20, "overall": 1.0},
    {"reviewerID": "r2", "asin": "Q", "unixReviewTime": 1, "overall": 1.0},
]


@pytest.mark.parametrize("year", [2014, 2018])
def test_amazon(tmp_path: Path, year: int) -> None:
    if year == 2014:
        meta = [
            {
                "asin": "X",
                "title": "O'Hara &quot;X&quot;",
                "brand": "Bee",
                "categories": [["Beauty", "Hair"], ["Beauty", "Gifts"]],
            },
            {"asin": "Y", "price": 3.5},
            {"asin": "unread", "title": "t"},
        ]
        (tmp_path / "meta.json").write_text("".join(f"{row!r}\n" for row in meta))
        assert (tmp_path / "meta.json").read_text().startswith("{'asin'")
    else:
        meta = [
            {"asin": "X", "title": 'O\'Hara "X"', "brand": "Bee", "category": ["Beauty", "Hair", "Gifts", "</span></span>"]},
            {"asin": "Y", "category": [], "brand": ""},
            {"asin": "unread", "title": "t"},
            {"asin": "X", "title": "again"},
        ]
        jsonl(tmp_path / "meta.json", meta)
    zipped = tmp_path / "meta.json.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "meta.json").read_bytes()))
    reviews = jsonl(tmp_path / "reviews.json.gz", REVIEWS)
    dataset, items, users = imported("amazon", [reviews, zipped], tmp_path / "out", min_user_items=1)
    assert items == {"X": ('O\'Hara "X"', ["Bee", "Beauty", "Hair", "Gifts"]), "Y": ("", []), "Q": ("", [])}
    assert users == {"r1": [("Y", 10), ("Y", 20), ("X", 30)], "r2": [("Q", 1)]}
    repairs = dataset.manifest["repairs"]
    assert repairs["attributes_cleaned"] == int(year == 2014), "a brand left empty is no repair"
    expected = {"unknown_items_added": 1, "unused_items_dropped": 1, "duplicate_items": int(year == 2018), "duplicate_rows": 1}
    assert {key: repairs[key] for key in expected} == expected
    dataset, items, users = imported("amazon", [reviews, zipped], tmp_path / "out", min_user_items=3)
    assert set(users) == {"r1"}
    assert set(items) == {"X", "Y"}, "an item whose only user was dropped goes with it"
    assert dataset.manifest["repairs"]["unused_items_dropped"] == 2


def test_amazon_literals_run_nothing(tmp_path: Path) -> None:
    reviews = jsonl(tmp_path / "r.json", REVIEWS)
    meta = tmp_path / "m.json"
    mark = tmp_path / "mark"
    meta.write_text(f"{{'asin': 'X'}}\n{{'asin': open({str(mark)!r}, 'w')}}\n")
    assert "m.json:2: not a JSON object" in fault("amazon", [reviews, meta], tmp_path / "out")
    assert not mark.exists()
    meta.write_text("{'asin': 'X', 'x': {[1]: 2}}\n")
    assert "m.json:1: not a JSON object" in fault("amazon", [reviews, meta], tmp_path / "out")
    no_time = jsonl(tmp_path / "r2.json", [{"reviewerID": "r", "asin": "X"}])
    line = fault("amazon", [no_time, jsonl(tmp_path / "m2.json", [])], tmp_path / "out")
    assert "r2.json:1: no column 'unixReviewTime'; columns there: asin, reviewerID" in line


def movielens(folder: Path, ratings: str, movies: str = "1::Café (1995)::Comedy|Drama\n2::B (1999)::War\n3::C::War\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "ratings.dat").write_bytes(ratings.encode("latin-1"))
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    return folder


def test_movielens(tmp_path: Path) -> None:
    folder = movielens(tmp_path / "ml", "7::2::5::30\n7::1::3::10\r\n7::2::1::30\n")
    dataset, items, users = imported("movielens", [folder], tmp_path / "out", min_user_items=2)
    assert items == {"1": ("Café (1995)", ["Comedy", "Drama"]), "2": ("B (1999)", ["War"])}
    assert users == {"7": [("1", 10), ("2", 30)]}
    repairs = dataset.manifest["repairs"]
    assert (repairs["unused_items_dropped"], repairs["duplicate_rows"], repairs["out_of_order_rows"]) == (1, 1, 1)
    for ratings, line in {
        "7::2::5\n": "ratings.dat:1: 3 fields, expected user::movie::rating::timestamp",
        "7::9::5::1\n": "ratings.dat:1: movie 9 is not in",
        "7::1::5::soon\n": "ratings.dat:1: column 'timestamp' must be Unix seconds",
        "::1::5::1\n": "ratings.dat:1: no user",
    }.items():
        assert line in fault("movielens", [movielens(tmp_path / "bad", ratings)], tmp_path / "no")
    assert "ratings.dat: missing" in fault("movielens", [tmp_path / "nowhere"], tmp_path / "no")
    twice = movielens(tmp_path / "twice", "7::1::5::1\n", "1::A::X\n1::A::X\n")
    assert "movies.dat:2: movie 1 appears a second time" in fault("movielens", [twice], tmp_path / "no")


INTERACTIONS = pa.table({"who": [1, 1, 1, 2], "what": ["x", "y", "z", "x"], "when": [30, 10, 20, None], "stars": [1, 2, 3, 4]})
NAMES = {"user": "who", "item": "what", "timestamp": "when"}


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "csv.gz"])
def test_table(tmp_path: Path, kind: str) -> None:
    path, items = tmp_path / f"t.{kind}", tmp_path / f"items.{kind}"
    catalogue = pa.table({"key": ["x", "y"], "title": ['An "X", large', None], "attributes": ["a|b", ""]})
    for file, table in ((path, INTERACTIONS), (items, catalogue)):
        if kind == "parquet":
            pq.write_table(table, file)
        else:
            plain = tmp_path / "plain"
            pacsv.write_csv(table, plain, pacsv.WriteOptions(delimiter="\t" if kind == "tsv" else ","))
            file.write_bytes(gzip.compress(plain.read_bytes()) if kind.endswith("gz") else plain.read_bytes())
    dataset, found, users = imported("table", [path, items], tmp_path / "out", columns=NAMES, min_user_items=1)
    assert users == {"1": [("y", 10), ("z", 20), ("x", 30)], "2": [("x", None)]}
    assert found == {"x": ('An "X", large', ["a", "b"]), "y": ("", []), "z": ("", [])}
    assert dataset.manifest["repairs"]["unknown_items_added"] == 1
    _, found, _ = imported("table", [path], tmp_path / "out", columns=NAMES, min_user_items=1)
    assert found == {"x": ("", []), "y": ("", []), "z": ("", [])}
    line = fault("table", [path], tmp_path / "no", columns={"user": "name"})
    assert f"t.{kind}: no column 'name'; columns there: who, what, when, stars" in line


@pytest.mark.parametrize(
    "times",
    [
        pa.array([86400, 172800, 0]),
        pa.array([86400.9, 172800.0, 0.5]),
        pa.array(["86400", "172800", "0"]),
        pa.array(["86400.5", "172800", "0"]),
        pa.array(["1970-01-02", "1970-01-03", "1970-01-01"]),
        pa.array(["1970-01-02T00:00:00Z", "1970-01-03T00:00:00Z", "1970-01-01T01:00:00+01:00"]),
        pa.array(["1970-01-02T00:00:00Z", "1970-01-03 00:00:00.5", "1970-01-01"]),
        pa.array([datetime.date(1970, 1, 2), datetime.date(1970, 1, 3), datetime.date(1970, 1, 1)]),
        pa.array([86400_000, 172800_000, 500]).cast(pa.timestamp("ms")),
        pa.array([86400, 172800, 0]).cast(pa.timestamp("s", "Europe/Berlin")),
    ],
)
def test_table_times(tmp_path: Path, times: pa.Array) -> None:
    pq.write_table(pa.table({"user": ["u"] * 3, "item": ["a", "b", "c"], "timestamp": times}), tmp_path / "t.parquet")
    _, _, users = imported("table", [tmp_path / "t.parquet"], tmp_path / "out")
    assert users["u"] == [("c", 0), ("a", 86400), ("b", 172800)]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("before", [3, 70_000], ids=["in one batch", "in a later batch"])
@pytest.mark.parametrize(
    ("usual", "odd", "message"),
    [
        ("86400", "1970-01-02", "must be all Unix seconds or all dates, found '1970-01-02' after Unix seconds"),
        ("1970-01-02", "86400", "must be all Unix seconds or all dates, found '86400' after dates"),
        ("1970-01-02", "soon", "must be Unix seconds or a date and time, found 'soon'"),
    ],
)
@pytest.mark.slow
def test_table_times_that_mix(tmp_path: Path, kind: str, before: int, usual: str, odd: str, message: str) -> None:
    """The first row that doesn't fit is named, wherever the reader's batches end."""
    times = [None, *[usual] * (before - 1), odd, "never read"]
    table = pa.table({"user": ["u"] * len(times), "item": [f"item {i}" for i in range(len(times))], "timestamp": times})
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        pacsv.write_csv(table, path)
    assert f"t.{kind}: row {before + 1}: column 'timestamp' {message}" in fault("table", [path], tmp_path / "out")


def not_utf8(texts: list[bytes]) -> pa.Array:
    """A text column that arrow did not check, as a careless writer leaves it in a file."""
    return pa.array(texts).view(pa.string())


@pytest.mark.parametrize("column", ["user", "item", "timestamp", "key", "title", "attributes"])
def test_parquet_text_that_is_not_utf8(tmp_path: Path, column: str) -> None:
    bad = not_utf8([b"a", b"caf\xe9"])
    tables = {
        "t": {"user": ["u", "u"], "item": ["a", "b"], "timestamp": ["1", "2"]},
        "i": {"key": ["a", "b"], "title": ["A", "B"], "attributes": [["x"], ["y"]]},
    }
    for name, columns in tables.items():
        if column in columns:
            columns[column] = pa.ListArray.from_arrays([0, 1, 2], bad) if column == "attributes" else bad
            wrong = name
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    line = fault("table", [tmp_path / "t.parquet", tmp_path / "i.parquet"], tmp_path / "out")
    assert f"{wrong}.parquet: damaged or malformed after row 0" in line and "UTF8" in line


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_column_name_that_is_there_twice(tmp_path: Path, kind: str) -> None:
    def write(path: Path, names: list[str], row: list[str]) -> Path:
        if kind == "parquet":
            pq.write_table(pa.Table.from_arrays([pa.array([value]) for value in row], names=names), path)
        else:
            path.write_text(f"{','.join(names)}\n{','.join(row)}\n")
        return path

    out = tmp_path / "out"
    twice = write(tmp_path / f"t.{kind}", ["user", "item", "timestamp", "user"], ["u", "a", "1", "v"])
    assert f"t.{kind}: 2 columns are named 'user'; each needs its own name" in fault("table", [twice], out)
    good = write(tmp_path / f"g.{kind}", ["user", "item", "timestamp", "note", "note"], ["u", "a", "1", "", ""])
    items = write(tmp_path / f"i.{kind}", ["key", "title", "attributes", "attributes"], ["a", "A", "x", "y"])
    assert f"i.{kind}: 2 columns are named 'attributes'" in fault("table", [good, items], out)
    _, _, users = imported("table", [good], out, min_user_items=1)
    assert users == {"u": [("a", 1)]}, "other columns may have any names"


def test_a_key_that_is_nan_is_missing(tmp_path: Path) -> None:
    """pandas makes floats of integers among which one is missing."""
    path, items, out = tmp_path / "t.parquet", tmp_path / "i.parquet", tmp_path / "out"
    numbers, missing = [1.0, 2.0, 3.0], [1.0, 2.0, float("nan")]
    for column in ("user", "item"):
        pq.write_table(pa.table({"user": numbers, "item": numbers, "timestamp": numbers} | {column: missing}), path)
        assert f"t.parquet: row 3: column '{column}' is empty" in fault("table", [path], out)
    pq.write_table(pa.table({"user": [1.0] * 3, "item": numbers, "timestamp": missing}), path)
    pq.write_table(pa.table({"key": missing, "title": ["A", "B", "C"]}), items)
    assert "i.parquet: row 3: column 'key' is empty" in fault("table", [path, items], out)
    pq.write_table(pa.table({"key": numbers, "title": [float("nan")] * 3}), items)
    _, found, users = imported("table", [path, items], out)
    assert found == {"1": ("", []), "2": ("", []), "3": ("", [])} and users == {"1": [("1", 1), ("2", 2), ("3", None)]}


def test_table_faults(tmp_path: Path) -> None:
    path, out = tmp_path / "t.csv", tmp_path / "out"
    for text, line in {
        "": "t.csv: empty",
        "user,item,timestamp\na,b,1\n,b,2\n": "t.csv: row 2: column 'user' is empty",
        "user,item,timestamp\na,b,1\na,b,soon\n": "t.csv: row 2: column 'timestamp' must be Unix seconds or a date",
        "user,item,timestamp\na,b,1\na,b\n": "t.csv: damaged or malformed",
        "user,item,timestamp\n": "no interactions",
    }.items():
        path.write_text(text)
        assert line in fault("table", [path], out)
    path.write_text("user,item,timestamp\na,x,1\n")
    items = tmp_path / "items.csv"
    items.write_text("key,title\nx,X\ny,Y\nx,Z\n")
    assert "items.csv: row 3: item 'x' appears a second time (first in row 1)" in fault("table", [path, items], out)
    assert "items.csv: no column 'genre'" in fault("table", [path, items], out, columns={"attributes": "genre"})
    assert "unknown column role 'usr'" in fault("table", [path], out, columns={"usr": "who"})
    assert "must end in .parquet" in fault("table", [jsonl(tmp_path / "t.json", [])], out)
    damaged = tmp_path / "t.parquet"
    pq.write_table(INTERACTIONS, damaged)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert "t.parquet: not a readable Parquet file" in fault("table", [damaged], out)
    zipped = tmp_path / "u.csv.gz"
    body = "user,item,timestamp\n" + "".join(f"u{i},i{i * i},{i}\n" for i in range(20000))
    whole = gzip.compress(body.encode())
    zipped.write_bytes(whole[: len(whole) // 2])
    assert "u.csv.gz" in fault("table", [zipped], out)


def test_importer_refuses(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / "s.jsonl", USERS), jsonl(tmp_path / "i.jsonl", ITEMS)]
    out = tmp_path / "out"
    assert "unknown format 'xml'; formats: jsonl, amazon" in fault("xml", paths, out)
    assert "'jsonl' does not take 1 paths" in fault("jsonl", paths[:1], out)
    assert "fixed columns" in fault("jsonl", paths, out, columns={"user": "u"})
    assert "no user has 9 items or more (the longest sequence has 4)" in fault("jsonl", paths, out, min_user_items=9)
    assert "min-user-items at least 1" in fault("jsonl", paths, out, min_user_items=0)
    out.mkdir()
    (out / "thesis.tex").write_text("dear to somebody")
    with pytest.raises(UserError, match="holds something else"):
        import_dataset("jsonl", paths, out)
    assert (out / "thesis.tex").exists()


def test_importer_replaces_nothing_but_a_dataset(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / "s.jsonl", USERS), jsonl(tmp_path / "i.jsonl", ITEMS)]
    out, split = tmp_path / "out", tmp_path / "split"
    import_dataset("jsonl", paths, out)
    (out / "world.json").write_text("{}")
    import_dataset("jsonl", paths, out)
    assert not (out / "world.json").exists()
    with DatasetWriter(tmp_path / "d", "d", {}, [Item("a")]) as writer:
        for user in range(9):
            writer.add(User(str(user), [0] * 5, [1] * 5))
    split.mkdir()
    prepare_split(Dataset(tmp_path / "d"), LeaveOneOut(), split)
    (out / "thesis.tex").write_text("dear to somebody")
    for folder, name in ((out, "thesis.tex"), (split, "items.parquet")):
        with pytest.raises(UserError, match=rf"holds something else than a dataset \({name}\); give --out a new folder"):
            import_dataset("jsonl", paths, folder)
        assert (folder / name).exists()
    (out / "thesis.tex").unlink()
    (out / "manifest.json").write_text('{"schema": 1, ')
    with pytest.raises(UserError, match="holds something else"):
        import_dataset("jsonl", paths, out)


def test_command_line_arguments(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    pq.write_table(INTERACTIONS, tmp_path / "t.parquet")
    pq.write_table(pa.table({"sku": ["x"], "title": ["X"], "attributes": [["a"]]}), tmp_path / "i.parquet")
    words = [
        "table",
        tmp_path / "t.parquet",
        "--items",
        tmp_path / "i.parquet",
        "--out",
        tmp_path / "out",
        "--min-user-items",
        "1",
    ]
    names = ["--user-column", "who", "--item-column", "what", "--timestamp-column", "when", "--key-column", "sku"]
    manifest = run(parser.parse_args([*map(str, words), *names]))
    assert manifest["name"] == "out"
    assert manifest["counts"] == {"users": 2, "items": 3, "interactions": 4}
    assert [file["name"] for file in manifest["source"]["files"]] == ["t.parquet", "i.parquet"]
    paths = [jsonl(tmp_path / "s.jsonl", USERS), jsonl(tmp_path / "i.jsonl", ITEMS)]
    first = run(parser.parse_args(["jsonl", *map(str, paths), "--out", str(tmp_path / "out"), "--k-core", "2"]))
    again = run(parser.parse_args(["jsonl", *map(str, paths), "--out", str(tmp_path / "out"), "--k-core", "2"]))
    assert first == again, "the same input gives the same dataset"
    assert first["counts"] == {"users": 2, "items": 3, "interactions": 7}


def test_beauty(tmp_path: Path) -> None:
    if not BEAUTY.is_dir():
        pytest.skip(f"{BEAUTY} is not there")
    manifest = import_dataset("jsonl", [BEAUTY / "sequences.jsonl.gz", BEAUTY / "items.jsonl.gz"], tmp_path / "beauty")
    assert manifest["counts"] == {"users": 22363, "items": 12101, "interactions": 198502}
    repairs = manifest["repairs"]
    assert (repairs["duplicate_rows"], repairs["short_users"], repairs["unused_items_kept"]) == (0, 0, 0)
    assert (repairs["out_of_order_users"], repairs["out_of_order_rows"], repairs["users_with_unknown_times"]) == (6, 8, 197)
    dataset = Dataset(tmp_path / "beauty")
    assert sum(not title for title in dataset.items()["title"].to_pylist()) == 7
    published = {}
    with gzip.open(BEAUTY / "sequences.jsonl.gz") as file:
        for row in map(json.loads, file):
            published[row["user"]] = [item - 1 for item in row["items"]]
    users = list(dataset.users())
    assert sum(t is None for user in users for t in user.timestamps) == 540
    assert sum(published[user.key] != user.items for user in users) == 6, "published order stays but for those 6"
