"""Digest of a dataset's files: equal for equal names and content, different otherwise."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.digests import compute_data_digest
from a2gen_rec.data.schema import CARD_FILE
from tests.helpers.properties import examples

names = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/".join([*parts, "file"]))
trees = st.dictionaries(names, st.binary(max_size=6), max_size=4)


def write(folder: Path, tree: dict[str, bytes]) -> Path:
    for name, content in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@examples(50)
@given(trees, trees)
def test_digests_are_equal_exactly_for_equal_files(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        one, two = Path(scratch, "one"), Path(scratch, "elsewhere", "two")
        one.mkdir()
        two.mkdir(parents=True)
        (one / CARD_FILE).write_text("command: one")
        write(one, first)
        write(two, second)
        assert (compute_data_digest(one) == compute_data_digest(two)) == (first == second)
        shutil.copytree(one, Path(scratch, "copy"))
        assert compute_data_digest(Path(scratch, "copy")) == compute_data_digest(one)


def test_moving_bytes_or_names_between_files_changes_the_digest(tmp_path: Path) -> None:
    variants = [{"a": b"xy", "b": b"z"}, {"a": b"x", "b": b"yz"}, {"a": b"z", "b": b"xy"}, {"a": b"xy", "c": b"z"}]
    digests = {compute_data_digest(write(tmp_path / str(n), tree)) for n, tree in enumerate(variants)}
    assert len(digests) == len(variants)
