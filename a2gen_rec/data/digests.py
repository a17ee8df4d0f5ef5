"""Digests of a prepared dataset: of its files, and of the encoding of every model input. Files are streamed."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.schema import CARD_FILE, FEEDBACK, FEEDBACK_LEVELS, PREVIOUS_FEEDBACK, VOCABULARY_DIR, Feature
from a2gen_rec.data.sql import STABLE_HASH_SQL
from a2gen_rec.utils.digest import hex_digest

INPUT_DIGITS = 16
BATCH_ROWS = 65_536


def identify_dataset(card: DatasetCard, folder: Path, earlier: Sequence[str] = ()) -> DataIdentity:
    """Return the identity of a local dataset, from its card and all its other files.

    Args:
        card: dataset card.
        folder: directory of the dataset.
        earlier: lineage of the dataset that it continues.
    """
    vocabularies = {
        feature.name: vocabulary_digest(folder / VOCABULARY_DIR / f"{feature.name}.parquet")
        for feature in card.features
        if feature.kind == "vocabulary"
    }
    return DataIdentity([*earlier, compute_data_digest(folder)], input_digests(card, vocabularies))


def compute_data_digest(folder: Path) -> str:
    """Return 32 hexadecimal digits that identify names and content of all files of a local dataset except its card.

    They depend neither on the folder's name nor on the machine. Files are read in blocks.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if name != CARD_FILE:
            with (folder / name).open("rb") as file:
                digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def vocabulary_digest(file: Path) -> str:
    """Return a digest of value and row of a vocabulary file, which is sorted by row.

    It depends neither on the encoding and batches of the file nor on its other columns.
    """
    texts, lengths, rows = (hashlib.blake2b(digest_size=16) for _ in range(3))
    with pq.ParquetFile(file) as parquet:
        for batch in _batches(parquet):
            values = pa.array(batch.column("value"), pa.large_string())
            _, offsets_buffer, texts_buffer = values.buffers()
            offsets = np.frombuffer(offsets_buffer, np.int64)[values.offset : values.offset + len(values) + 1]
            if texts_buffer is not None:
                texts.update(memoryview(texts_buffer)[offsets[0] : offsets[-1]])
            lengths.update(np.diff(offsets).astype("<i8").tobytes())
            rows.update(batch.column("row").to_numpy().astype("<i8").tobytes())
    return hex_digest(b"".join(part.digest() for part in (texts, lengths, rows)), INPUT_DIGITS)


def _batches(parquet: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Yield batches of value and row. PyArrow 26 keeps the read bytes of all row groups of an iteration in memory."""
    for group in range(parquet.num_row_groups):
        yield from parquet.iter_batches(BATCH_ROWS, [group], ["value", "row"], use_threads=False)


def input_digests(card: DatasetCard, vocabularies: Mapping[str, str]) -> dict[str, str]:
    """Return model input -> digest of its encoding.

    Args:
        card: dataset card.
        vocabularies: vocabulary feature -> digest of its vocabulary.
    """
    encodings: dict[str, Any] = {}
    for feature in card.features:
        encodings[feature.name] = _encoding(feature, card, vocabularies.get(feature.name, ""))
    encodings |= {number.name: asdict(number) for number in card.numbers}
    encodings |= {vector.name: asdict(vector) for vector in card.vectors}
    for statistic in card.statistics:
        encodings.setdefault(f"statistics of {statistic.feature}", []).append(asdict(statistic))
    return {name: hex_digest(json.dumps(value, sort_keys=True), INPUT_DIGITS) for name, value in encodings.items()}


def _encoding(feature: Feature, card: DatasetCard, vocabulary: str) -> dict[str, Any]:
    """Return all that determines the row of a value; not measurements such as ``mean_values``."""
    encoding: dict[str, Any] = {
        name: getattr(feature, name) for name in ("level", "kind", "multi_valued", "weighted", "boundaries")
    }
    if feature.kind == "vocabulary":
        encoding["vocabulary"] = vocabulary
    else:
        encoding["rows"] = feature.cardinality
    if feature.kind == "hash":
        encoding["hash"] = STABLE_HASH_SQL
    if feature.name in card.time_features:
        encoding["time_zone"] = [card.time_zone, card.utc_offset_hours]
    if feature.level == "session":
        encoding["session_gap_s"] = card.session_gap_s
    if feature.name in (FEEDBACK, PREVIOUS_FEEDBACK) and card.feedback is not None:
        encoding |= {"levels": FEEDBACK_LEVELS, "rule": asdict(card.feedback)}
    return encoding
