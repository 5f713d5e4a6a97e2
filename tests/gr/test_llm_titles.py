"""Titles as token sequences: shared, empty, long and foreign ones; cutting histories; documents from the catalogue alone."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data.dataset import ITEMS_SCHEMA
from gr.errors import UserError
from gr.llm.documents import Walks
from gr.llm.sequences import pack, prompts, training_sequences, windows
from gr.llm.titles import Titles, TitleTrie, title_texts
from gr.llm.tokenizer import frame_of
from gr.text import train_tokenizer

TITLES = ["Red Lamp", "Red Lamp", "", "Red  Lamp\nTall", "灯 красный", "", "Blue <end> Lamp", "qwertzuiopasdfghjkly" * 2]


def catalogue(titles: list[str], attributes: list[list[str]] | None = None) -> pa.Table:
    rows = [
        {"item": i, "key": f"k{i}", "title": t, "attributes": attributes[i] if attributes else []} for i, t in enumerate(titles)
    ]
    return pa.Table.from_pylist(rows, ITEMS_SCHEMA)


@pytest.fixture(scope="module")
def items() -> pa.Table:
    return catalogue(TITLES, [[], [], ["Acme", "Lamps"], [], [], [], [], []])


@pytest.fixture(scope="module")
def titles(items: pa.Table) -> Titles:
    tokenizer = train_tokenizer(title_texts(items)[0][:7], 280)  # the last is unknown to it, and so many bytes long
    popularity = np.array([1, 5, 0, 0, 0, 0, 0, 0])
    return Titles.build(items, tokenizer, frame_of(tokenizer), "expand", popularity, max_title_tokens=32)


def test_counts_and_placeholders(items: pa.Table, titles: Titles) -> None:
    texts, empty = title_texts(items)
    assert texts[2] == "untitled Acme Lamps" and texts[5] == "item k5" and texts[3] == "Red Lamp Tall" and empty == 2
    assert titles.counts == {
        "shared_titles": 1,
        "items_with_shared_title": 2,
        "empty_titles": 2,
        "truncated_titles": 1,
        "distinct_titles": 7,
    }


def test_every_title_ends_once_and_none_begins_another(titles: Titles) -> None:
    sequences = titles.sequences()
    assert all(s.count(titles.frame.end) == 1 and s[-1] == titles.frame.end for s in sequences)
    assert max(map(len, sequences)) == 33
    TitleTrie(titles, "vocabulary")  # Trie.build refuses prefixes


def test_truncation_may_make_titles_shared_and_is_counted() -> None:
    items = catalogue(["same long beginning of a title, one", "same long beginning of a title, two"])
    tokenizer = train_tokenizer(title_texts(items)[0], 259)
    titles = Titles.build(items, tokenizer, frame_of(tokenizer), max_title_tokens=20)
    assert titles.counts["shared_titles"] == 1 and titles.counts["truncated_titles"] == 2


def test_expand_ranks_items_by_popularity_and_merge_ranks_titles(items: pa.Table, titles: Titles) -> None:
    shared, other = titles.of_item[0], titles.of_item[3]
    ranked = np.array([[other, shared, -1], [shared, -1, -1]])
    assert titles.ranked_items(ranked, 4).tolist() == [[3, 1, 0, -1], [1, 0, -1, -1]]
    assert titles.stand_in(0) == 0
    tokenizer = train_tokenizer(title_texts(items)[0][:7], 280)
    merged = Titles.build(items, tokenizer, frame_of(tokenizer), "merge", np.array([1, 5, 0, 0, 0, 0, 0, 0]))
    assert merged.ranked_items(ranked, 3).tolist() == [[3, 1, -1], [1, -1, -1]]
    assert merged.stand_in(0) == merged.stand_in(1) == 1


def test_trie_nodes_follow_every_title_and_search_ends_at_the_last_choice(titles: Titles) -> None:
    trie = TitleTrie(titles, "catalogue")
    first, token, below = trie.trie.first_edge, trie.trie.edge_token, trie.trie.edge_node
    for number, sequence in enumerate(titles.sequences()):
        node = 0
        for place, t in enumerate(sequence):
            assert trie.node[titles.offsets[number] + place] == node
            children = token[first[node] : first[node + 1]].tolist()
            assert trie.branches[titles.offsets[number] + place] == (len(children) > 1)
            node = int(below[first[node] + children.index(t)])
        assert trie.trie.leaf[node] == number
    assert len(trie.search.edge_token) < len(trie.trie.edge_token)
    assert sorted(trie.search.leaf[trie.search.leaf >= 0].tolist()) == list(range(titles.counts["distinct_titles"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 8), st.integers(18, 60))
def test_windows_make_every_later_title_a_target_once(lengths: list[int], max_history: int, max_tokens: int) -> None:
    runs = windows(np.array(lengths, dtype=np.int64), max_history, max_tokens)
    targets = sorted(t for start, stop in runs for t in range(start + 1, stop))
    assert targets == list(range(1, len(lengths)))
    assert all(stop - start <= max_history + 1 and sum(lengths[start:stop]) <= max_tokens for start, stop in runs)
    if runs:
        start, stop = runs[0]
        assert stop == len(lengths)
        full = stop - start == max_history + 1 or start == 0 or sum(lengths[start - 1 : stop]) > max_tokens
        assert full, "the newest run holds as much history as fits"


def test_prompts_and_sequences_cut_whole_titles_from_the_old_end(titles: Titles) -> None:
    history = np.array([7, 0, 3, 4, 0])
    short = prompts(titles, [history], 2, 10**4)[0]
    whole = np.concatenate([titles.sequences()[titles.of_item[i]] for i in (4, 0)])
    assert short.tolist() == [*titles.frame.bos, *whole]
    tight = prompts(titles, [history], 20, 1 + titles.longest + len(whole) + 1)[0]
    assert tight.tolist() == short.tolist()
    packed = training_sequences(titles, [history, np.array([3])], 20, 10**4)
    assert len(packed) == 1 and packed[0].context == 1 + titles.lengths[titles.of_item[7]]
    with pytest.raises(UserError, match=r"max_tokens is 50; .* take 67"):
        titles.check_fits(50)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), max_size=7), max_size=6), st.integers(1, 6))
def test_sequences_of_a_batch_are_those_of_each_of_its_users(
    titles: Titles, histories: list[list[int]], max_history: int
) -> None:
    some = [np.array(h, dtype=np.int32) for h in histories]
    room = len(titles.frame.bos) + 2 * titles.longest
    together = training_sequences(titles, some, max_history, room)
    each = [
        pack(titles, titles.of_item[h[start:stop]], 1)
        for h in some
        for start, stop in windows(titles.lengths[titles.of_item[h]], max_history, room - len(titles.frame.bos))
    ]
    for own, packed in zip(each, together, strict=True):
        for name in ("tokens", "at", "targets", "places"):
            assert np.array_equal(getattr(own, name), getattr(packed, name)), name


def test_documents_are_related_repeatable_and_know_no_interactions() -> None:
    names = [f"{brand} {kind} {n}" for brand in ("acme", "zenith", "orion") for kind in ("lamp", "chair") for n in range(10)]
    walks = Walks(catalogue(names, [[name.split()[0]] for name in names]))
    runs = walks.sample(np.random.default_rng((0, 1)), 200, 8)
    assert np.array_equal(runs, walks.sample(np.random.default_rng((0, 1)), 200, 8))
    assert not np.array_equal(runs, walks.sample(np.random.default_rng((0, 2)), 200, 8))
    brand = runs // 20
    same = (brand[:, 1:] == brand[:, :-1]).mean()
    assert same > 0.6, "unrelated runs would share the brand in a third"
    assert all(len(set(run)) == 8 for run in runs.tolist())
    assert set(runs.ravel()) == set(range(60))


def test_walks_over_items_that_share_nothing() -> None:
    runs = Walks(catalogue([f"word{chr(97 + i) * 3}" for i in range(5)])).sample(np.random.default_rng(0), 50, 3)
    assert set(runs.ravel()) == set(range(5))


def test_disambiguate_gives_every_item_a_title_of_its_own_from_its_attributes() -> None:
    names = ["red lamp", "red lamp", "red lamp", "blue chair", "blue chair", "red lamp", "sofa", "blue chair #1"]
    attributes = [["Lighting", "Acme"], ["Lighting", "Zenith"], ["Lighting"], [], [], ["Lighting", "Zenith"], ["Acme"], []]
    items = catalogue(names, attributes)
    tokenizer = train_tokenizer(names, 300)
    popularity = np.arange(8)
    titles = Titles.build(items, tokenizer, frame_of(tokenizer), "disambiguate", popularity)
    read = [tokenizer.decode(titles.sequences()[t][:-1]).strip() for t in titles.of_item]
    assert read == [
        "red lamp (Acme)",
        "red lamp (Zenith) #1",
        "red lamp #2",
        "blue chair #2",  # the name of another item's title is taken
        "blue chair #3",
        "red lamp (Zenith) #3",
        "sofa",
        "blue chair #1",
    ]
    assert titles.counts["shared_titles"] == 2 and titles.counts["items_with_shared_title"] == 6
    assert titles.counts["distinct_titles"] == 8 and titles.counts["numbered_titles"] == 5
    ranked = titles.ranked_items(titles.of_item[[4, 0, 7]][None], 5)
    assert ranked.tolist() == [[4, 0, 7, -1, -1]], "one title is one item"
    assert [titles.stand_in(i) for i in range(8)] == list(range(8))
    target = training_sequences(titles, [np.array([3, 1])], 20, 10**4)[0]
    assert tokenizer.decode(target.targets[:-1]).strip() == "red lamp (Zenith) #1", "trained on is what is generated"


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_disambiguated_titles_are_distinct_whatever_the_catalogue(data: st.DataObject) -> None:
    """Of few words and attributes, so that they collide, cut to few tokens, and repeatable."""
    few = st.sampled_from(["", "a", "b", "a #1", "a (x)", "灯 ランプ", "a long title of many words that are cut"])
    names = data.draw(st.lists(few, min_size=1, max_size=12))
    attributes = data.draw(st.lists(st.lists(st.sampled_from("xyz"), max_size=3), min_size=len(names), max_size=len(names)))
    most = data.draw(st.integers(6, 48))
    tokenizer = train_tokenizer(["a b"], 259)
    items = catalogue(names, attributes)
    titles = Titles.build(items, tokenizer, frame_of(tokenizer), "disambiguate", max_title_tokens=most)
    assert sorted(titles.of_item.tolist()) == list(range(len(names)))
    assert titles.longest <= most + 1
    again = Titles.build(items, tokenizer, frame_of(tokenizer), "disambiguate", max_title_tokens=most)
    assert np.array_equal(titles.tokens, again.tokens)
    TitleTrie(titles, "vocabulary")
