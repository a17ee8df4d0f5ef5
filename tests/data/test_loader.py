"""The stream of batches: every window once, on any number of ranks, and from any position on exactly the rest."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from a2gen_rec.config import LoaderConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import LoaderState, WindowDataLoader, WindowDataset
from a2gen_rec.errors import DataError
from a2gen_rec.models.embedding_tables import EmbeddingTables
from tests.helpers.cards import full_tables, make_card, make_columns, small_config, to_table

CARD = make_card()
WHOLE = full_tables(CARD, small_config())
FILES, WINDOWS, GROUP = 3, 44, 12  # four row groups a file, the last of eight windows
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
        pq.write_table(to_table(columns, CARD), folder / f"part-{file}.parquet", row_group_size=GROUP)
    return str(folder.parent)


def stream(dataset: str, config: LoaderConfig = SMALL, **options: object) -> WindowDataset:
    return WindowDataset(Dataset(dataset, CARD), "train", config, WHOLE, **options)


def at(made: WindowDataset, position: LoaderState) -> WindowDataset:
    made.state = position
    return made


def windows(batches: Iterable[WindowBatch]) -> list[list[int]]:
    return [batch.user_key.tolist() for batch in batches]


def flat(batches: Iterable[WindowBatch]) -> list[int]:
    return list(itertools.chain.from_iterable(windows(batches)))


ALL = list(range(FILES * WINDOWS))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_window_once_and_ranks_disjoint(world: int, shuffle: bool, dataset: str) -> None:
    ranks = [flat(stream(dataset, rank=rank, world_size=world, shuffle=shuffle)) for rank in range(world)]
    assert sorted(itertools.chain.from_iterable(ranks)) == ALL
    groups = len(stream(dataset).groups)
    assert groups == 12
    assert sum(not rank for rank in ranks) == max(0, world - groups)


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
def test_batches_keep_their_bounds_and_fill_them(config: LoaderConfig, shuffle: bool, dataset: str) -> None:
    batches = list(stream(dataset, config, shuffle=shuffle))
    assert sorted(flat(batches)) == ALL
    for batch in batches:
        many, longest = len(batch.lengths), int(batch.lengths.max())
        assert many <= config.max_windows_per_batch
        assert many * longest <= config.max_impressions_per_batch or many == 1
    if config.max_impressions_per_batch == config.max_windows_per_batch * 10:
        assert len(batches) == 1
    if config.max_impressions_per_batch == 1:
        assert len(batches) == len(ALL)
    if config is SMALL:
        assert any(len(batch.lengths) > 1 for batch in batches)


def test_no_batch_could_have_been_larger(dataset: str) -> None:
    config = LoaderConfig(max_impressions_per_batch=40, max_windows_per_batch=9, shuffle_buffer_size=10_000)
    batches = list(stream(dataset, config, shuffle=False))
    full = set()
    for batch, after in itertools.pairwise(batches):
        many, next_length = len(batch.lengths), int(after.lengths.min())
        full.add(many * int(batch.lengths.max()) == 40)
        assert many == 9 or (many + 1) * next_length > 40
    assert full == {True, False}, "some batches reach the bound exactly"


def test_batches_hold_windows_of_similar_length(dataset: str) -> None:
    """Within a buffer batches do not overlap in length, so that padding is small."""
    config = LoaderConfig(max_impressions_per_batch=60, max_windows_per_batch=100, shuffle_buffer_size=10_000)
    spans = sorted((int(b.lengths.min()), int(b.lengths.max())) for b in stream(dataset, config))
    assert len(spans) > 5
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin


def test_order_is_of_seed_and_epoch_alone(dataset: str) -> None:
    def order(seed: int, epoch: int, rank: int = 0) -> list[list[int]]:
        made = stream(dataset, seed=seed, rank=rank, world_size=2)
        return windows(at(made, LoaderState(epoch=epoch, world_size=2)))

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


def test_windows_of_one_row_group_are_shuffled_too(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    columns = make_columns(CARD, 40, np.random.default_rng(0))
    pq.write_table(to_table(columns, CARD), tmp_path / "train" / "part.parquet")
    orders = [
        windows(at(stream(str(tmp_path), seed=seed), LoaderState(epoch=epoch)))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for left, right in itertools.combinations(orders, 2):
        assert left != right
        assert {frozenset(batch) for batch in left} != {frozenset(batch) for batch in right}, "not batches alone"


def test_row_groups_change_places_between_epochs(dataset: str) -> None:
    """Which rank sees a window differs by epoch, not only when."""
    seen = [set(flat(at(stream(dataset, world_size=3), LoaderState(epoch=epoch, world_size=3)))) for epoch in range(3)]
    assert seen[0] != seen[1] != seen[2]


def test_without_shuffling_buffers_come_in_file_order(dataset: str) -> None:
    for epoch in (0, 1):
        keys = flat(at(stream(dataset, shuffle=False), LoaderState(epoch=epoch)))
        # Row groups of 12, 12, 12, 8 windows: a buffer ends where the 20th, 40th, .. window has been passed.
        buffers: dict[int, list[int]] = {}
        for group, end in enumerate(np.cumsum([12, 12, 12, 8] * FILES)):
            first = group // 4 * WINDOWS + group % 4 * 12
            buffers.setdefault((end - 1) // 20, []).extend(range(first, first + (8 if group % 4 == 3 else 12)))
        place = 0
        for members in buffers.values():
            assert sorted(keys[place : place + len(members)]) == members
            place += len(members)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (0, 2)])
def test_restarting_after_any_batch_gives_exactly_the_rest(rank: int, world: int, dataset: str) -> None:
    made = stream(dataset, rank=rank, world_size=world, seed=4)
    begin = LoaderState(epoch=2, world_size=world)
    batches = list(at(made, begin))
    assert len(batches) > 10
    assert windows(at(stream(dataset, rank=rank, world_size=world, seed=4), begin)) == windows(batches)
    for done in range(len(batches)):
        position = LoaderState(**batches[done].loader_state)
        rest = list(at(stream(dataset, rank=rank, world_size=world, seed=4), position))
        assert windows(rest) == windows(batches[done + 1 :])
        for again, before in zip(rest, batches[done + 1 :], strict=True):
            assert again.loader_state == before.loader_state
            assert torch.equal(again.action, before.action)
            assert torch.equal(again.sparse.values(), before.sparse.values())
    assert len({tuple(batch.loader_state.items()) for batch in batches}) == len(batches)


@pytest.mark.parametrize("background", [True, False])
def test_a_loader_restarts_exactly_though_it_had_prefetched(background: bool, dataset: str) -> None:
    expected = list(at(stream(dataset, seed=1), LoaderState(epoch=1)))
    loader = WindowDataLoader(stream(dataset, seed=1), background)
    assert windows(loader.iter_epoch(LoaderState(epoch=1))) == windows(expected)
    for done in (1, 6, len(expected)):
        interrupted = loader.iter_epoch(LoaderState(epoch=1))
        taken = list(itertools.islice(interrupted, done))
        assert windows(taken) == windows(expected[:done])
        position = LoaderState(**taken[-1].loader_state)
        del interrupted  # batches made in advance are lost with it
        rest = list(WindowDataLoader(stream(dataset, seed=1), background).iter_epoch(position))
        assert windows(rest) == windows(expected[done:])
        for again, before in zip(rest, expected[done:], strict=True):
            assert again.loader_state == before.loader_state
            assert torch.equal(again.offset_s.nan_to_num(-1), before.offset_s.nan_to_num(-1))


@pytest.mark.parametrize("background", [True, False])
def test_loading_leaves_the_random_numbers_of_the_model_alone(background: bool, dataset: str) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(WindowDataLoader(stream(dataset), background).iter_epoch(LoaderState()))
    assert torch.equal(torch.rand(3), expected)


# Another number of ranks --------------------------------------------------------------------------------------------


def consume(streams: list[Iterator[WindowBatch]], starts: list[LoaderState], batches: list[int]) -> tuple[list, list]:
    """Take so many batches on each rank: the windows taken, and each rank's position after them."""
    taken, positions = [], []
    for batches_of, start, many in zip(streams, starts, batches, strict=True):
        own = list(itertools.islice(batches_of, many))
        taken += flat(own)
        positions.append(LoaderState(**own[-1].loader_state) if own else start)
    return taken, positions


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(0, 30), min_size=4, max_size=4), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_no_window_is_lost_when_ranks_change(
    dataset: str, before: int, after: int, batches: list[int], seed: int
) -> None:
    def ranks(world: int, positions: list[LoaderState]) -> list[Iterator[WindowBatch]]:
        return [
            iter(at(stream(dataset, rank=rank, world_size=world, seed=seed), position))
            for rank, position in enumerate(positions)
        ]

    begin = [LoaderState(epoch=1, world_size=before)] * before
    taken, saved = consume(ranks(before, begin), begin, batches[:before])
    merged = LoaderState.reshard(saved, after)
    assert len(merged) == after
    rest = flat(itertools.chain.from_iterable(ranks(after, merged)))
    assert set(taken) | set(rest) == set(ALL)
    assert len(rest) == len(set(rest)), "no window twice after the change"
    if before == after:
        assert sorted(taken + rest) == ALL
        return
    assert all(position.world_size == after and position.epoch == 1 for position in merged)

    # A second change, in the middle of what was left over.
    more, saved = consume(ranks(after, merged), merged, [4] * after)
    rest = flat(itertools.chain.from_iterable(ranks(before, LoaderState.reshard(saved, before))))
    assert set(taken) | set(more) | set(rest) == set(ALL)


def test_what_all_ranks_have_finished_is_not_read_again(dataset: str) -> None:
    begin = [LoaderState(world_size=2)] * 2
    streams = [stream(dataset, rank=rank, world_size=2) for rank in range(2)]
    nearly_all = [len(windows(own)) - 1 for own in streams]
    taken, saved = consume([iter(own) for own in streams], begin, nearly_all)
    [merged] = LoaderState.reshard(saved, 1)
    # A buffer has at most two of the twelve row groups here, and each rank had begun its last one.
    assert merged.groups_consumed >= 8
    rest = flat(at(stream(dataset), merged))
    assert len(rest) <= 4 * GROUP
    assert set(taken) | set(rest) == set(ALL)


def test_the_same_ranks_go_on_as_they_are() -> None:
    saved = [LoaderState(2, 2, 4, 1, 3, 2), LoaderState(2, 2, 4, 2, 0, 4)]
    assert LoaderState.reshard(saved, 2) == saved
    assert LoaderState.reshard(saved, 3) == [LoaderState(epoch=2, world_size=3, groups_consumed=8)] * 3


# What else a stream does --------------------------------------------------------------------------------------------


def test_an_empty_batch_has_no_targets_and_all_features(dataset: str) -> None:
    for rank in (0, 14):
        batch = stream(dataset, rank=rank, world_size=15).empty_batch
        assert not len(batch.target)
        assert not batch.counts.any()
        assert batch.sparse.keys() == list(EmbeddingTables.from_card(CARD, small_config().model).rows)


def test_configuration_reaches_the_batches(dataset: str) -> None:
    deduplicated, plain = (
        next(iter(stream(dataset, dataclasses.replace(SMALL, deduplicate_ids=dedup)))) for dedup in (True, False)
    )
    assert torch.equal(deduplicated.user_key, plain.user_key)
    assert len(deduplicated.sparse.values()) < len(plain.sparse.values())


@pytest.mark.parametrize("content", ["nothing", "other files", "no folder", "no windows"])
def test_an_empty_split_is_named(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    if content != "no folder":
        folder.mkdir()
    if content == "other files":
        (folder / "README.md").write_text("no data\n")
    if content == "no windows":
        table = to_table(make_columns(CARD, 2, np.random.default_rng(0)), CARD)
        pq.write_table(table.slice(0, 0), folder / "part.parquet")
    with pytest.raises(DataError, match="has no windows") as caught:
        stream(str(tmp_path))
    assert str(caught.value) == f"{folder}: split 'train' has no windows"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "bad id"])
def test_bad_data_are_named_wherever_the_batch_is_made(background: bool, damage: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "part.parquet"
    columns = make_columns(CARD, 60, np.random.default_rng(0))
    columns.user_ids["group"][33] = 4 if damage == "bad id" else 0
    pq.write_table(to_table(columns, CARD), file, row_group_size=20)
    config = LoaderConfig(max_windows_per_batch=5, shuffle_buffer_size=1)
    loader = WindowDataLoader(stream(str(tmp_path), config, shuffle=False), background)
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
