"""Repairs: against a plain rereading of the rules, on random interactions."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data.clean import clean, clean_text, k_core_rows
from gr.data.dataset import Item
from gr.data.readers import UNKNOWN_TIME, Source
from gr.errors import UserError

ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.one_of(st.integers(0, 6), st.just(UNKNOWN_TIME))), min_size=1, max_size=60
)


def source(rows: list[tuple[int, int, int]], keep_unused: bool = True) -> Source:
    users, codes, times = (np.array(column) for column in zip(*rows, strict=True))
    items = [Item(f"i{i}") for i in range(6)]
    return Source(items, [f"u{u}" for u in range(6)], users.astype(np.int32), codes.astype(np.int32), times, keep_unused)


def plain(rows: list[tuple[int, int, int]]) -> dict[str, list[tuple[str, int]]]:
    """The rules without numpy, up to the dropping of short users."""
    seen, users = set(), {}
    for user, item, time in rows:
        if time == UNKNOWN_TIME or (user, item, time) not in seen:
            seen.add((user, item, time))
            users.setdefault(user, []).append((f"i{item}", time))
    return {
        f"u{user}": row if any(t == UNKNOWN_TIME for _, t in row) else sorted(row, key=lambda pair: pair[1])
        for user, row in sorted(users.items())
    }


def sequences(cleaned) -> dict[str, list[tuple[str, int]]]:
    result = {}
    for u, key in enumerate(cleaned.user_keys):
        rows = slice(cleaned.offsets[u], cleaned.offsets[u + 1])
        names = [cleaned.items[code].key for code in cleaned.codes[rows]]
        result[key] = list(zip(names, cleaned.times[rows].tolist(), strict=True))
    return result


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.booleans())
def test_sequences_follow_the_rules(rows: list, least: int, keep_unused: bool) -> None:
    expected = {user: row for user, row in plain(rows).items() if len(row) >= least}
    if not expected:
        with pytest.raises(UserError, match=f"no user has {least} items"):
            clean(source(rows), min_user_items=least)
        return
    cleaned = clean(source(rows, keep_unused), min_user_items=least)
    assert sequences(cleaned) == expected
    everybody = plain(rows)
    kept, repairs = sum(map(len, everybody.values())), cleaned.repairs
    assert repairs["duplicate_rows"] == len(rows) - kept
    assert repairs["short_user_rows"] == kept - sum(map(len, expected.values()))
    assert repairs["short_users"] == 6 - len(expected)
    used = {item for row in expected.values() for item, _ in row}
    assert {item.key for item in cleaned.items} == ({f"i{i}" for i in range(6)} if keep_unused else used)
    assert repairs["unused_items_kept" if keep_unused else "unused_items_dropped"] == 6 - len(used)
    assert repairs["users_with_unknown_times"] == sum(any(t == UNKNOWN_TIME for _, t in row) for row in expected.values())


def test_order_is_counted_and_ties_keep_it() -> None:
    rows = [(0, 0, 5), (1, 3, 1), (0, 1, 5), (1, 2, 1), (0, 2, 4), (1, 4, 0)]
    cleaned = clean(source(rows))
    assert sequences(cleaned) == {"u0": [("i2", 4), ("i0", 5), ("i1", 5)], "u1": [("i4", 0), ("i3", 1), ("i2", 1)]}
    assert (cleaned.repairs["out_of_order_rows"], cleaned.repairs["out_of_order_users"]) == (2, 2)


@settings(deadline=None)
@given(ROWS, st.integers(0, 3))
def test_shuffled_ties_change_nothing_but_the_order_within_a_time(rows: list, seed: int) -> None:
    kept, shuffled = (clean(source(rows), min_user_items=1, shuffle_ties=s) for s in (None, seed))
    before, after = sequences(kept), sequences(shuffled)
    tied = 0
    for user, row in before.items():
        assert sorted(row) == sorted(after[user])
        assert [time for _, time in row] == [time for _, time in after[user]]
        if all(time != UNKNOWN_TIME for _, time in row):
            tied += sum(count for count in Counter(time for _, time in row).values() if count > 1)
        else:
            assert row == after[user]
    assert shuffled.repairs["shuffled_tied_rows"] == tied
    assert "shuffled_tied_rows" not in kept.repairs


def test_shuffled_ties_come_in_every_order_by_seed_alone() -> None:
    rows = [(0, i, 7) for i in range(3)]
    orders = [tuple(sequences(clean(source(rows), shuffle_ties=seed))["u0"]) for seed in range(40)]
    assert len(set(orders)) == 6
    assert orders == [tuple(sequences(clean(source(rows), shuffle_ties=seed))["u0"]) for seed in range(40)]


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(1, 4))
def test_k_core_is_the_largest(rows: list, user_min: int, item_min: int) -> None:
    users, items, _ = (np.array(column, dtype=np.int32) for column in zip(*[(u, i, 0) for u, i, _ in rows], strict=True))
    left = list(range(len(rows)))
    while True:  # one row at a time, in another order than the code: the core does not depend on it
        n_user, n_item = Counter(users[r] for r in left), Counter(items[r] for r in left)
        rare = [r for r in left if n_user[users[r]] < user_min or n_item[items[r]] < item_min]
        if not rare:
            break
        left.remove(rare[-1])
    assert k_core_rows(users, items, user_min, item_min).tolist() == left


def test_k_core_is_counted() -> None:
    rows = [(u, i, 10 * u + i) for u in range(3) for i in range(3)] + [(3, 3, 1), (3, 0, 2), (3, 1, 3), (4, 4, 9)]
    cleaned = clean(source(rows), k_core=2, min_user_items=3)
    assert [item.key for item in cleaned.items] == ["i0", "i1", "i2"]
    assert cleaned.user_keys == ["u0", "u1", "u2"]
    expected = {
        "short_users": 2,
        "short_user_rows": 1,
        "k_core_users": 1,
        "k_core_items": 1,
        "k_core_rows": 3,
        "unused_items_dropped": 2,
    }
    assert {key: cleaned.repairs[key] for key in expected} == expected
    with pytest.raises(UserError, match=r"the 4-core is empty \(4 users, 4 items, 12 interactions before it\)"):
        clean(source(rows), k_core=4)


def test_bad_numbers() -> None:
    with pytest.raises(UserError, match="k-core must be at least 0"):
        clean(source([(0, 0, 1)]), k_core=-1)
    with pytest.raises(UserError, match="shuffle-ties must be at least 0"):
        clean(source([(0, 0, 1)]), shuffle_ties=-1)
    with pytest.raises(UserError, match="milliseconds"):
        clean(source([(0, 0, 1_400_000_000_000)]))


@settings(deadline=None)
@given(st.text(st.characters(), max_size=30))
def test_clean_text_is_plain(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned == " ".join(cleaned.split())
    cleaned.encode()
    if "&" not in text:
        assert clean_text(cleaned) == cleaned


def test_clean_text() -> None:
    assert clean_text(" a&amp;b\t &quot;c&quot;\n&nbsp;d ") == 'a&b "c" d'
    assert clean_text("half \ud83d pair") == "half ? pair"
