"""Stored tables: how far they are from what they were, and how many bytes they take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from a2gen_rec.artifact.quantized_tables import QuantizedEmbeddings, quantize_rows


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), scale=st.sampled_from([1e-3, 0.05, 1.0, 100.0]), seed=st.integers(0, 2**31))
def test_int8_is_off_by_half_a_step_at_most(rows: int, scale: float, seed: int) -> None:
    weight = scale * torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    table = quantize_rows(weight, "int8")
    largest = weight.abs().amax(1, keepdim=True)
    # Half a step of the scale as rounded to float16, whose last bits clip the largest value by an eighth of a step.
    coarse = 2**-25 * 127  # of scales too small for float16 to tell well
    assert ((table(torch.arange(rows)) - weight).abs() <= 0.63 * largest / 127 + coarse).all()
    assert not table(torch.zeros(1, dtype=torch.long)).any()


def test_bytes_of_a_table() -> None:
    weight = torch.randn(1000, 32)
    size = {
        dtype: sum(part.nbytes for part in quantize_rows(weight, dtype).buffers()) for dtype in ("int8", "fp16", "fp32")
    }
    assert size == {"int8": 34_000, "fp16": 64_000, "fp32": 128_000}
    assert size["int8"] <= 0.3 * size["fp32"]


@pytest.mark.parametrize("dtype", ["int8", "fp16", "fp32"])
def test_rows_are_those_of_their_ids(dtype: str) -> None:
    weight, small = {"item.id": torch.randn(20, 4), "tab": torch.randn(5, 4)}, torch.randn(3, 4)
    rows = {name: len(table) for name, table in weight.items()}
    tables = QuantizedEmbeddings(rows, lambda name: quantize_rows(weight[name], dtype), {"small": small})  # type: ignore[arg-type]
    ids = {"tab": torch.tensor([4, 0]), "small": torch.arange(3), "item.id": torch.tensor([3, 19, 3, 0])}
    lengths = torch.tensor([len(each) for each in ids.values()])
    found = tables(KeyedJaggedTensor([*ids], torch.cat([*ids.values()]), lengths=lengths))
    for name, table in weight.items():
        expected = table[ids[name]]
        torch.testing.assert_close(found[name].values(), expected, rtol=0, atol=0.03 if dtype != "fp32" else 0)
        assert found[name].lengths().tolist() == [len(expected)]
    assert torch.equal(found["small"].values(), small)


@pytest.mark.parametrize("dtype", ["int8", "fp16", "fp32"])
def test_renumbered_rows_are_found_by_their_new_numbers(dtype: str) -> None:
    weight = {"user": torch.randn(5, 4), "item": torch.randn(20, 4), "tab": torch.randn(3, 4)}
    rows = {name: len(table) for name, table in weight.items()}
    stored = {name: quantize_rows(table, dtype) for name, table in weight.items()}  # type: ignore[arg-type]
    tables, becomes = QuantizedEmbeddings(rows, lambda name: stored[name], {}), torch.randperm(20)
    tables.permute_rows("item", becomes)
    asked = {name: becomes if name == "item" else torch.arange(size) for name, size in rows.items()}
    lengths = torch.tensor([*rows.values()])
    found = tables(KeyedJaggedTensor([*asked], torch.cat([*asked.values()]), lengths=lengths))
    for name, size in rows.items():
        assert torch.equal(found[name].values(), stored[name](torch.arange(size))), name


def test_tables_that_are_not_stored_alike_are_refused() -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(ValueError, match="different storage formats"):
        QuantizedEmbeddings({"a": 3, "b": 3}, lambda name: quantize_rows(weight, "int8" if name == "a" else "fp16"), {})
