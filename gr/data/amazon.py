"""The public Amazon review files of 2014 and 2018 (McAuley lab): reviews and metadata, .json.gz.

2018 and the 2014 reviews are strict JSON lines; the 2014 metadata (and the unfiltered 2014 reviews) are Python literals, one
dict per line. The metadata are several times larger than what the reviews touch, so only items that were reviewed are kept.
"""

import ast
import json
from pathlib import Path
from typing import Any

from gr.data import lines
from gr.data.dataset import Item
from gr.data.readers import Rows, Source, unix_seconds


def parse_line(line: bytes) -> Any:
    """A strict JSON line or, where it is not one, a Python literal (read by `ast.literal_eval`, which runs nothing)."""
    try:
        return json.loads(line)
    except ValueError as error:
        if line.lstrip().startswith((b"{'", b'{"', b"{u'")):
            try:
                return ast.literal_eval(line.decode())
            except (ValueError, SyntaxError, TypeError):  # TypeError: a list as a key
                raise error from None
        raise


def read_amazon(reviews: Path, meta: Path) -> Source:
    """Reviews and metadata; of the other columns none is read.

    Reviews have ``reviewerID``, ``asin`` and ``unixReviewTime``. Metadata have ``asin`` and, where known, ``title``, ``brand``
    and ``categories`` (2014) or ``category`` (2018).

    Items are numbered by their first review. A reviewed item without metadata has an empty title (counted). The 2018 metadata
    list some items twice: the first is kept (counted).
    """
    rows = Rows()
    for number, row in lines.read_objects(reviews, parse_line):
        rows.add(
            lines.text_key(lines.field(row, "reviewerID", reviews, number), "reviewerID", reviews, number),
            lines.text_key(lines.field(row, "asin", reviews, number), "asin", reviews, number),
            unix_seconds(lines.field(row, "unixReviewTime", reviews, number), "unixReviewTime", reviews, number),
        )
    found: dict[int, Item] = {}
    unused = repeated = 0
    for number, row in lines.read_objects(meta, parse_line):
        key = lines.text_key(lines.field(row, "asin", meta, number), "asin", meta, number)
        code = rows.item_of.get(key)
        if code is None:
            unused += 1
        elif code in found:
            repeated += 1
        else:
            title = lines.text(row.get("title"), "title", meta, number)
            found[code] = Item(key, title, _attributes(row, meta, number))
    users, codes, times = rows.columns()
    return Source(
        items=[found.get(code) or Item(key) for key, code in rows.item_of.items()],
        user_keys=list(rows.user_of),
        users=users,
        codes=codes,
        times=times,
        keep_unused_items=False,
        repairs={
            "unknown_items_added": len(rows.item_of) - len(found),
            "unused_items_dropped": unused,
            "duplicate_items": repeated,
        },
    )


def _attributes(row: dict[str, Any], path: Path, number: int) -> tuple[str, ...]:
    """Brand, then the categories: 2014 has a list of paths (``categories``), 2018 one path (``category``)."""
    names = [lines.text(row.get("brand"), "brand", path, number)]
    paths = row.get("categories") or [row.get("category")]
    for path_names in paths if isinstance(paths, list) else [paths]:
        names += lines.text_list(path_names, "categories", path, number)
    # The 2018 crawl left pieces of the page's markup among the categories.
    return tuple(name for name in names if name and "</span>" not in name)
