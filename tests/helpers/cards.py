"""Small random test data: cards, window columns, datasets on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.digests import compute_data_digest, input_digests
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.schema import SPLITS, Feature
from a2gen_rec.data.vectors import VectorTable
from a2gen_rec.models.embedding_tables import EmbeddingTables
from tests.helpers.random_card import ACTIONS, make_card, make_rich_card  # noqa: F401  -- re-exported


def make_columns(card: DatasetCard, windows: int, rng: np.random.Generator, max_length: int = 10) -> WindowColumns:
    """Return random valid windows with overlapping impressions, missing times and windows without history."""
    lengths = rng.integers(1, max_length + 1, windows)
    total = int(lengths.sum())
    window = np.repeat(np.arange(windows), lengths)
    first_target = np.array([rng.integers(0, n) for n in lengths], dtype=np.int64)
    step = rng.integers(0, 30_000, total)
    ts_ms = np.cumsum(step) + window * 10**9
    actions, offsets, dwell = [], [], []
    for _ in range(total):
        codes = np.flatnonzero(rng.random(len(card.actions) - 2) < 0.4) + 1
        rng.shuffle(codes)
        times = np.sort(rng.random(len(codes)) * 10)
        times[np.array([card.actions[a] not in card.timed_actions for a in codes], dtype=bool)] = np.nan
        dwell.append(10 + rng.random() * 20 if rng.random() < 0.9 else np.nan)
        actions.append(np.concatenate([[0], codes, [len(card.actions) - 1]]))
        offsets.append(np.concatenate([[0.0], times, [dwell[-1]]]))
    action_lengths = np.array([len(a) for a in actions], dtype=np.int64)
    last_offset_s = np.array([np.nanmax(o) for o in offsets])
    user = {f.name: rng.integers(0, f.cardinality, windows) for f in card.features_at("user") if not f.multi_valued}
    impression_features = [*card.features_at("item"), *card.features_at("context")]
    ids = {f.name: rng.integers(0, f.cardinality, total) for f in impression_features if not f.multi_valued}
    labels = (rng.random((total, len(card.labels))) < 0.5).astype(np.float32)
    (derived_rng,) = rng.spawn(1)
    objectives = derived_rng.choice(np.array([0, 1, np.nan], np.float32), (total, len(card.objectives)))
    num_targets = lengths - first_target
    return WindowColumns(
        user_key=rng.integers(0, 2**40, windows),
        first_target=first_target,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        user_ids=user,
        impression_ids=ids,
        session={f.name: derived_rng.integers(0, f.cardinality, total) for f in card.features_at("session")},
        outcome={f.name: derived_rng.integers(0, f.cardinality, total) for f in card.features_at("outcome")},
        ts_ms=ts_ms,
        end_ms=ts_ms + np.rint(1000 * last_offset_s).astype(np.int64),
        labels=labels,
        objectives=objectives,
        oracle=np.zeros((total, 0), np.float32),
        action_starts=np.cumsum(action_lengths) - action_lengths,
        action_lengths=action_lengths,
        action=np.concatenate(actions).astype(np.int64),
        offset_s=np.concatenate(offsets).astype(np.float32),
        target_starts=np.cumsum(num_targets) - num_targets,
        statistics=derived_rng.normal(size=(int(num_targets.sum()), len(card.statistics))).astype(np.float16),
        user_bags={f.name: random_bags(f, windows, derived_rng) for f in card.bags_at("user")},
        impression_bags={f.name: random_bags(f, total, derived_rng) for f in card.bags_at("item", "context")},
        item_index=derived_rng.integers(0, NUM_VECTORS, total) if card.vectors else np.full(total, -1),
        user_numbers=random_numbers(windows, len(card.numbers_at("user")), derived_rng),
        numbers=random_numbers(total, len(card.numbers_at("item", "context")), derived_rng),
    )


NUM_VECTORS = 20
"""Number of items with vectors."""


def random_vectors(card: DatasetCard, rng: np.random.Generator) -> dict[str, VectorTable]:
    """Return vectors, of which some are missing."""
    tables = {}
    for vector in card.vectors:
        values = rng.normal(size=(NUM_VECTORS, vector.width)).astype(np.float16)
        values[::7] = np.nan
        tables[vector.name] = VectorTable(values)
    return tables


def random_bags(feature: Feature, count: int, rng: np.random.Generator) -> Bags:
    """Return bags of 1 to 3 distinct rows."""
    lengths = rng.integers(1, 4, count)
    ids = [np.sort(rng.choice(feature.cardinality, length, replace=False)) for length in lengths]
    weights = rng.uniform(0.5, 2, lengths.sum()) if feature.weighted else np.ones(lengths.sum())
    return Bags(lengths, np.concatenate(ids), weights.astype(np.float32))


def random_numbers(rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return [rows, count] standardized numbers, of which some are missing."""
    values = rng.normal(size=(rows, count)).astype(np.float32)
    return np.where(rng.random(values.shape) < 0.2, np.float32(np.nan), values)


def small_config(**model: object) -> Config:
    return Config(model=ModelConfig(**{"dim": 8, "num_heads": 2, "time_buckets": 8, "wide_dim": 4, **model}))


SMALL_MODEL_OPTIONS = [
    "--model.dim",
    "8",
    "--model.num-heads",
    "2",
    "--model.time-buckets",
    "8",
    "--model.wide-dim",
    "4",
]
"""Options of the model of :func:`small_config`."""


def short_training(steps: int, **model: object) -> Config:
    """Return :func:`small_config` for a training of some steps, without prefetching and logs of steps."""
    config = small_config(**model)
    config.train.max_steps, config.loader.prefetch, config.train.log_interval = steps, False, 0
    return config


def full_tables(card: DatasetCard, config: Config) -> dict[str, int]:
    return EmbeddingTables.from_card(card, config.model).full_tables


def write_dataset(folder: Path, card: DatasetCard, windows: int = 60, files: int = 3, seed: int = 0) -> Path:
    """Write a dataset of random windows, with equally distributed splits; its card has the digest of its files."""
    rng = np.random.default_rng(seed)
    columns_by_split = {split: [make_columns(card, windows, rng) for _ in range(files)] for split in SPLITS}
    for split, parts in columns_by_split.items():
        (folder / split).mkdir(parents=True)
        for file, columns in enumerate(parts):
            pq.write_table(to_table(columns, card), folder / split / f"part-{file:05d}.parquet", row_group_size=20)
    pq.write_table(items(card, rng), folder / "items.parquet")
    pq.write_table(item_statistics(columns_by_split["train"], card), folder / "item_statistics.parquet")
    save_card(folder, card)
    return folder


def save_card(folder: Path, card: DatasetCard, **vocabularies: str) -> None:
    """Save the card of a dataset with its identity as the data of a single log.

    Args:
        folder: folder of the dataset.
        card: card of the dataset.
        vocabularies: feature -> digest of its vocabulary, which random datasets lack; equal in all by default.
    """
    identity = DataIdentity([compute_data_digest(folder)], input_digests(card, vocabularies))
    replace(card, identity=identity).save(str(folder))


def items(card: DatasetCard, rng: np.random.Generator) -> pa.Table:
    """Return every item of the table except row 0, named "item-ROW", with random other features."""
    features = {feature.name: feature.cardinality for feature in card.features_at("item") if not feature.multi_valued}
    rows = np.arange(1, features["item_id"])
    table = {name: rng.integers(0, size, len(rows)) for name, size in features.items()}
    for number, values in zip(
        card.numbers_at("item"), random_numbers(len(rows), len(card.numbers_at("item")), rng).T, strict=True
    ):
        table[number.name] = values
    statistics = [list(values) for values in rng.normal(size=(len(rows), len(card.statistics))).astype(np.float32)]
    table["statistics"] = pa.array(statistics, pa.list_(pa.float32()))
    return pa.table({"item": [f"item-{row}" for row in rows]} | table | {"item_id": rows})


def item_statistics(parts: list[WindowColumns], card: DatasetCard) -> pa.Table:
    """Return targets and positives per row of the item table with targets."""
    names = [*card.actions[1:-1], *card.labels, *card.objectives]
    item, counts = [], []
    for columns in parts:
        window = np.repeat(np.arange(len(columns)), columns.lengths)
        target = np.arange(len(window)) - columns.starts[window] >= columns.first_target[window]
        occurred = np.zeros((len(window), len(card.actions)), np.int64)
        occurred[np.repeat(np.arange(len(window)), columns.action_lengths), columns.action] = 1
        positives = np.concatenate([occurred[:, 1:-1], columns.labels == 1, columns.objectives == 1], axis=1)
        item.append(columns.impression_ids["item_id"][target])
        counts.append(np.insert(positives[target], 0, 1, axis=1))
    rows, row_index = np.unique(np.concatenate(item), return_inverse=True)
    sums = np.zeros((len(rows), 1 + len(names)), np.int64)
    np.add.at(sums, row_index, np.concatenate(counts))
    return pa.table({"item_id": rows} | dict(zip(["impressions", *names], sums.T, strict=True)))


def to_table(columns: WindowColumns, card: DatasetCard) -> pa.Table:
    offsets = np.append(columns.starts, columns.lengths.sum())
    inner = np.append(columns.action_starts, columns.action_lengths.sum())

    def per_impression(values: np.ndarray | pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))

    def per_token(values: np.ndarray) -> pa.Array:
        return per_impression(pa.ListArray.from_arrays(pa.array(inner, pa.int32()), pa.array(values)))

    last = columns.action_starts + columns.action_lengths - 1
    data = {
        "user": pa.array([str(key) for key in columns.user_key]),
        "user_key": columns.user_key,
        "first_target": columns.first_target.astype(np.int32),
        "ts_ms": per_impression(columns.ts_ms),
        "dwell_s": per_impression(columns.offset_s[last]),
        "action": per_token(columns.action.astype(np.int8)),
        "action_offset_s": per_token(columns.offset_s),
    }
    data |= columns.user_ids
    for rows in (columns.impression_ids, columns.session, columns.outcome):
        data |= {name: per_impression(values) for name, values in rows.items()}
    for index, number in enumerate(card.numbers_at("user")):
        data[number.name] = columns.user_numbers[:, index]
    for index, number in enumerate(card.numbers_at("item", "context")):
        data[number.name] = per_impression(columns.numbers[:, index])
    data |= {f"objective_{name}": per_impression(columns.objectives[:, i]) for i, name in enumerate(card.objectives)}
    data |= {f"label_{name}": per_impression(columns.labels[:, i]) for i, name in enumerate(card.labels)}
    ends = np.append(columns.target_starts, len(columns.statistics)) * len(card.statistics)
    data["statistics"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(columns.statistics.ravel()))
    return pa.table(data)


def checkpoint_tensors(checkpoint: str | Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return all full tensors of a checkpoint by name; ``scratch`` is a temporary file."""
    dcp_to_torch_save(str(checkpoint), str(scratch))
    flat: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                walk(f"{prefix}/{name}", part)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", torch.load(scratch, weights_only=False))
    return flat
