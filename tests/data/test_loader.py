"""Batches cover every window once on any number of ranks; a loader state resumes with exactly the remaining batches."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.config import LoaderConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.errors import DataError
from a2gen_rec.models.embedding_tables import EmbeddingTables
from tests.helpers.cards import full_tables, make_card, make_columns, small_config, to_table
from tests.helpers.properties import examples

CARD = make_card()
FULL_TABLES = full_tables(CARD, small_config())
FILES, WINDOWS, GROUP_SIZE = 3, 44, 12  # four row groups per file, the last with eight windows
SMALL = LoaderConfig(max_impressions_per_batch=48, max_windows_per_batch=7, shuffle_buffer_size=20, prefetch=False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Windows with user keys 0, 1, 2, .. in file order."""
    folder = tmp_path_factory.mktemp("loader") / "train"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file in range(FILES):
        columns = make_columns(CARD, WINDOWS, rng)
        columns = dataclasses.replace(columns, user_key=np.arange(WINDOWS) + file * WINDOWS)
        pq.write_table(to_table(columns, CARD), folder / f"part-{file}.parquet", row_group_size=GROUP_SIZE)
    return str(folder.parent)


def make_dataset(dataset: str, config: LoaderConfig = SMALL, **options: object) -> WindowDataset:
    return WindowDataset(Dataset(dataset, CARD), "train", config, FULL_TABLES, **options)


def with_state(window_dataset: WindowDataset, state: LoaderState) -> WindowDataset:
    window_dataset.state = state
    return window_dataset


def windows(batches: Iterable[WindowBatch]) -> list[list[int]]:
    return [batch.user_key.tolist() for batch in batches]


def flat(batches: Iterable[WindowBatch]) -> list[int]:
    return list(itertools.chain.from_iterable(windows(batches)))


ALL_WINDOWS = list(range(FILES * WINDOWS))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_cover_every_window_once(world_size: int, shuffle: bool, dataset: str) -> None:
    ranks = [
        flat(make_dataset(dataset, rank=rank, world_size=world_size, shuffle=shuffle)) for rank in range(world_size)
    ]
    assert sorted(itertools.chain.from_iterable(ranks)) == ALL_WINDOWS
    groups = len(make_dataset(dataset).groups)
    assert groups == 12
    assert sum(not rank for rank in ranks) == max(0, world_size - groups)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        LoaderConfig(max_impressions_per_batch=1, max_windows_per_batch=50, shuffle_buffer_size=1000),
        LoaderConfig(max_impressions_per_batch=10_000, max_windows_per_batch=5, shuffle_buffer_size=30),
        LoaderConfig(max_impressions_per_batch=30, max_windows_per_batch=1000, shuffle_buffer_size=1),
        LoaderConfig(max_impressions_per_batch=10_000, max_windows_per_batch=1000, shuffle_buffer_size=1000),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_respect_and_use_their_limits(config: LoaderConfig, shuffle: bool, dataset: str) -> None:
    batches = list(make_dataset(dataset, config, shuffle=shuffle))
    assert sorted(flat(batches)) == ALL_WINDOWS
    for batch in batches:
        size, max_length = len(batch.lengths), int(batch.lengths.max())
        assert size <= config.max_windows_per_batch
        assert size * max_length <= config.max_impressions_per_batch or size == 1
    if config.max_impressions_per_batch == config.max_windows_per_batch * 10:
        assert len(batches) == 1
    if config.max_impressions_per_batch == 1:
        assert len(batches) == len(ALL_WINDOWS)
    if config is SMALL:
        assert any(len(batch.lengths) > 1 for batch in batches)


def test_batches_are_maximal(dataset: str) -> None:
    config = LoaderConfig(max_impressions_per_batch=40, max_windows_per_batch=9, shuffle_buffer_size=10_000)
    batches = list(make_dataset(dataset, config, shuffle=False))
    full = set()
    for batch, next_batch in itertools.pairwise(batches):
        size, next_length = len(batch.lengths), int(next_batch.lengths.min())
        full.add(size * int(batch.lengths.max()) == 40)
        assert size == 9 or (size + 1) * next_length > 40
    assert full == {True, False}, "some batches reach the limit exactly"


def test_batches_hold_windows_of_similar_length(dataset: str) -> None:
    """Lengths of a buffer's batches do not overlap, which limits padding."""
    config = LoaderConfig(max_impressions_per_batch=60, max_windows_per_batch=100, shuffle_buffer_size=10_000)
    spans = sorted((int(b.lengths.min()), int(b.lengths.max())) for b in make_dataset(dataset, config))
    assert len(spans) > 5
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start


def test_order_depends_on_seed_and_epoch_only(dataset: str) -> None:
    def order(seed: int, epoch: int, rank: int = 0) -> list[list[int]]:
        window_dataset = make_dataset(dataset, seed=seed, rank=rank, world_size=2)
        return windows(with_state(window_dataset, LoaderState(epoch=epoch, world_size=2)))

    torch.manual_seed(1)
    first = order(0, 0)
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002
    assert order(0, 0) == first
    others = [order(1, 0), order(0, 1), order(0, 2), order(1, 1), order(0, 0, rank=1)]
    for left, right in itertools.combinations([first, *others], 2):
        assert left != right
        assert sorted(itertools.chain.from_iterable(left)) != left
    assert {tuple(o[0]) for o in others} != {tuple(first[0])}


def test_windows_within_a_row_group_are_shuffled(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    columns = make_columns(CARD, 40, np.random.default_rng(0))
    pq.write_table(to_table(columns, CARD), tmp_path / "train" / "part.parquet")
    orders = [
        windows(with_state(make_dataset(str(tmp_path), seed=seed), LoaderState(epoch=epoch)))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for left, right in itertools.combinations(orders, 2):
        assert left != right
        assert {frozenset(batch) for batch in left} != {frozenset(batch) for batch in right}, (
            "batches differ in content, not only in order"
        )


def test_row_groups_change_ranks_between_epochs(dataset: str) -> None:
    """The assignment of windows to ranks differs by epoch, not only their order."""
    rank_windows = [
        set(flat(with_state(make_dataset(dataset, world_size=3), LoaderState(epoch=epoch, world_size=3))))
        for epoch in range(3)
    ]
    assert rank_windows[0] != rank_windows[1] != rank_windows[2]


def test_without_shuffling_buffers_come_in_file_order(dataset: str) -> None:
    for epoch in (0, 1):
        keys = flat(with_state(make_dataset(dataset, shuffle=False), LoaderState(epoch=epoch)))
        # Row groups of 12, 12, 12, 8 windows: a buffer ends after the row group with the 20th, 40th, .. window.
        buffers: dict[int, list[int]] = {}
        for group, end in enumerate(np.cumsum([12, 12, 12, 8] * FILES)):
            first = group // 4 * WINDOWS + group % 4 * 12
            buffers.setdefault((end - 1) // 20, []).extend(range(first, first + (8 if group % 4 == 3 else 12)))
        start = 0
        for members in buffers.values():
            assert sorted(keys[start : start + len(members)]) == members
            start += len(members)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (0, 2)])
def test_resumes_exactly_after_any_batch(rank: int, world_size: int, dataset: str) -> None:
    window_dataset = make_dataset(dataset, rank=rank, world_size=world_size, seed=4)
    start = LoaderState(epoch=2, world_size=world_size)
    batches = list(with_state(window_dataset, start))
    assert len(batches) > 10
    assert windows(with_state(make_dataset(dataset, rank=rank, world_size=world_size, seed=4), start)) == windows(
        batches
    )
    for done in range(len(batches)):
        state = LoaderState(**batches[done].loader_state)
        rest = list(with_state(make_dataset(dataset, rank=rank, world_size=world_size, seed=4), state))
        assert windows(rest) == windows(batches[done + 1 :])
        for again, before in zip(rest, batches[done + 1 :], strict=True):
            assert again.loader_state == before.loader_state
            assert torch.equal(again.action, before.action)
            assert torch.equal(again.sparse.values(), before.sparse.values())
    assert len({tuple(batch.loader_state.items()) for batch in batches}) == len(batches)


@pytest.mark.parametrize("prefetch", [True, False])
def test_resumes_exactly_after_prefetching(prefetch: bool, dataset: str) -> None:
    expected = list(with_state(make_dataset(dataset, seed=1), LoaderState(epoch=1)))
    loader = WindowDataLoader(make_dataset(dataset, seed=1), prefetch)
    assert windows(loader.iter_epoch(LoaderState(epoch=1))) == windows(expected)
    for done in (1, 6, len(expected)):
        interrupted = loader.iter_epoch(LoaderState(epoch=1))
        taken = list(itertools.islice(interrupted, done))
        assert windows(taken) == windows(expected[:done])
        state = LoaderState(**taken[-1].loader_state)
        del interrupted  # discards prefetched batches
        rest = list(WindowDataLoader(make_dataset(dataset, seed=1), prefetch).iter_epoch(state))
        assert windows(rest) == windows(expected[done:])
        for again, before in zip(rest, expected[done:], strict=True):
            assert again.loader_state == before.loader_state
            assert torch.equal(again.offset_s.nan_to_num(-1), before.offset_s.nan_to_num(-1))


@pytest.mark.parametrize("prefetch", [True, False])
def test_loading_does_not_change_the_global_random_state(prefetch: bool, dataset: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(WindowDataLoader(make_dataset(dataset), prefetch).iter_epoch(LoaderState()))
    assert torch.equal(torch.rand(3), expected)


# Change of the number of ranks ----------------------------------------------------------------------------------------


def take_batches(ranks: list[Iterator[WindowBatch]], starts: list[LoaderState], counts: list[int]) -> tuple[list, list]:
    """Take some batches on each rank; return their windows and each rank's loader state."""
    taken, states = [], []
    for rank, start, count in zip(ranks, starts, counts, strict=True):
        batches = list(itertools.islice(rank, count))
        taken += flat(batches)
        states.append(LoaderState(**batches[-1].loader_state) if batches else start)
    return taken, states


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(0, 30), min_size=4, max_size=4), st.integers(0, 9))
@examples(10, thorough=100)
def test_no_window_is_lost_when_ranks_change(
    dataset: str, before: int, after: int, batches: list[int], seed: int
) -> None:
    def ranks(world_size: int, states: list[LoaderState]) -> list[Iterator[WindowBatch]]:
        return [
            iter(with_state(make_dataset(dataset, rank=rank, world_size=world_size, seed=seed), state))
            for rank, state in enumerate(states)
        ]

    start = [LoaderState(epoch=1, world_size=before)] * before
    taken, saved = take_batches(ranks(before, start), start, batches[:before])
    merged = LoaderState.reshard(saved, after)
    assert len(merged) == after
    rest = flat(itertools.chain.from_iterable(ranks(after, merged)))
    assert set(taken) | set(rest) == set(ALL_WINDOWS)
    assert len(rest) == len(set(rest)), "no window repeats after the change"
    if before == after:
        assert sorted(taken + rest) == ALL_WINDOWS
        return
    assert all(state.world_size == after and state.epoch == 1 for state in merged)

    # A second change in the middle of the remaining windows.
    more, saved = take_batches(ranks(after, merged), merged, [4] * after)
    rest = flat(itertools.chain.from_iterable(ranks(before, LoaderState.reshard(saved, before))))
    assert set(taken) | set(more) | set(rest) == set(ALL_WINDOWS)


def test_consumed_row_groups_are_not_read_again(dataset: str) -> None:
    start = [LoaderState(world_size=2)] * 2
    ranks = [make_dataset(dataset, rank=rank, world_size=2) for rank in range(2)]
    counts = [len(windows(rank)) - 1 for rank in ranks]
    taken, saved = take_batches([iter(rank) for rank in ranks], start, counts)
    [merged] = LoaderState.reshard(saved, 1)
    # A buffer has at most two of the twelve row groups, and each rank has started its last buffer.
    assert merged.groups_consumed >= 8
    rest = flat(with_state(make_dataset(dataset), merged))
    assert len(rest) <= 4 * GROUP_SIZE
    assert set(taken) | set(rest) == set(ALL_WINDOWS)


def test_reshard_keeps_states_of_the_same_ranks() -> None:
    saved = [LoaderState(2, 2, 4, 1, 3, 2), LoaderState(2, 2, 4, 2, 0, 4)]
    assert LoaderState.reshard(saved, 2) == saved
    assert LoaderState.reshard(saved, 3) == [LoaderState(epoch=2, world_size=3, groups_consumed=8)] * 3


# Other behavior --------------------------------------------------------------------------------------------


def test_empty_batch_has_all_features_and_no_targets(dataset: str) -> None:
    for rank in (0, 14):
        batch = make_dataset(dataset, rank=rank, world_size=15).empty_batch
        assert not len(batch.target)
        assert not batch.counts.any()
        assert batch.sparse.keys() == list(EmbeddingTables.from_card(CARD, small_config().model).rows)


def test_applies_the_configuration(dataset: str) -> None:
    deduplicated, full = (
        next(iter(make_dataset(dataset, dataclasses.replace(SMALL, deduplicate_ids=dedup)))) for dedup in (True, False)
    )
    assert torch.equal(deduplicated.user_key, full.user_key)
    assert len(deduplicated.sparse.values()) < len(full.sparse.values())


@pytest.mark.parametrize("content", ["nothing", "other files", "no folder", "no windows"])
def test_reports_empty_splits(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    if content != "no folder":
        folder.mkdir()
    if content == "other files":
        (folder / "README.md").write_text("no data\n")
    if content == "no windows":
        table = to_table(make_columns(CARD, 2, np.random.default_rng(0)), CARD)
        pq.write_table(table.slice(0, 0), folder / "part.parquet")
    with pytest.raises(DataError, match="has no windows") as caught:
        make_dataset(str(tmp_path))
    assert str(caught.value) == f"{folder}: split 'train' has no windows"


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "bad id"])
def test_reports_invalid_data_with_and_without_prefetching(prefetch: bool, damage: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "part.parquet"
    columns = make_columns(CARD, 60, np.random.default_rng(0))
    columns.user_ids["group"][33] = 4 if damage == "bad id" else 0
    pq.write_table(to_table(columns, CARD), file, row_group_size=20)
    config = LoaderConfig(max_windows_per_batch=5, shuffle_buffer_size=1)
    loader = WindowDataLoader(make_dataset(str(tmp_path), config, shuffle=False), prefetch)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    taken = []
    with pytest.raises(DataError) as caught:
        taken.extend(loader.iter_epoch(LoaderState()))
    if damage == "bad id":
        assert str(caught.value) == f"{file}, row 33, field 'group': id is not in [0, 4)"
    else:
        assert str(caught.value).startswith(f"{file}: not a readable Parquet file")
    assert type(caught.value) is DataError


# --- replay -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Windows with user keys from 1000 on; items 1 to 3 are new rows."""
    folder = tmp_path_factory.mktemp("earlier") / "train"
    folder.mkdir()
    columns = make_columns(CARD, 60, np.random.default_rng(1))
    columns = dataclasses.replace(columns, user_key=np.arange(60) + 1000)
    pq.write_table(to_table(columns, CARD), folder / "part-0.parquet", row_group_size=GROUP_SIZE)
    return Dataset(str(folder.parent), CARD, new_rows=NewRows({"item_id": np.array([1, 2, 3])}))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.05, 12), (0.2, 36), (9.0, 60)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_replayed_windows_come_first(
    share: float, expected: int, world_size: int, earlier: Dataset, dataset: str
) -> None:
    """Each epoch has all windows, and whole row groups of the earlier dataset up to the share."""
    options = {"replay": earlier, "replay_share": share, "world_size": world_size}
    for epoch in (0, 1):
        keys = []
        for rank in range(world_size):
            stream = make_dataset(dataset, rank=rank, **options)
            of_rank = flat(with_state(stream, LoaderState(epoch=epoch, world_size=world_size)))
            replayed = [key >= 1000 for key in of_rank]
            assert replayed == sorted(replayed, reverse=True)
            assert stream.num_windows == len(ALL_WINDOWS) + expected
            keys += of_rank
        assert sorted(keys)[: len(ALL_WINDOWS)] == ALL_WINDOWS
        assert len(set(keys)) == len(keys) == len(ALL_WINDOWS) + expected


def test_replayed_windows_do_not_have_rows_of_retired_values(earlier: Dataset, dataset: str) -> None:
    """Only windows of the earlier dataset have row 0 in place of its new rows; a loader state resumes among them."""
    batches = list(make_dataset(dataset, replay=earlier, replay_share=9.0))
    items: dict[bool, set[int]] = {True: set(), False: set()}
    for batch in batches:
        items[bool(batch.user_key[0] >= 1000)].update(batch.sparse["item_id"].values().tolist())
    assert not items[True] & {1, 2, 3}
    assert items[True] & {0}
    assert items[False] >= {1, 2, 3}
    for index in (1, len(batches) // 2):
        state = LoaderState(**batches[index - 1].loader_state)
        rest = make_dataset(dataset, replay=earlier, replay_share=9.0)
        assert windows(with_state(rest, state)) == windows(batches[index:])
