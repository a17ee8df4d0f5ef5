"""Quantized tables: error bounds and sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from a2gen_rec.artifact.quantized_tables import QuantizedEmbeddings, check_representable, quantize_rows
from a2gen_rec.errors import UserError
from tests.helpers.properties import examples


@examples(50)
@given(rows=st.integers(1, 40), scale=st.sampled_from([1e-3, 0.05, 1.0, 100.0]), seed=st.integers(0, 2**31))
def test_int8_error_is_at_most_half_a_step(rows: int, scale: float, seed: int) -> None:
    weight = scale * torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    table = quantize_rows(weight, "int8")
    max_abs = weight.abs().amax(1, keepdim=True)
    # Half a step of the scale rounded to float16; this rounding clips the largest value by up to an eighth of a step.
    coarse = 2**-25 * 127  # for scales below the precision of float16
    assert ((table(torch.arange(rows)) - weight).abs() <= 0.63 * max_abs / 127 + coarse).all()
    assert not table(torch.zeros(1, dtype=torch.long)).any()


@pytest.mark.parametrize("dtype", ["int8", "fp16", "fp32"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rejects_rows_that_are_not_finite(dtype: str, value: float) -> None:
    weight = torch.randn(40, 8)
    check_representable("item_id", weight, dtype)  # type: ignore[arg-type]
    weight[[7, 30], 3] = value
    message = r"^table 'item_id': 2 of 40 rows are not finite; the training has diverged \(first: row 7\)$"
    with pytest.raises(UserError, match=message):
        check_representable("item_id", weight, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "limit"), [("int8", 8.31e6), ("fp16", 65504.0), ("fp32", 3.4e38)])
def test_rejects_values_out_of_range(dtype: str, limit: float) -> None:
    weight = torch.full((3, 2), limit)
    check_representable("t", weight, dtype)  # type: ignore[arg-type]
    stored = quantize_rows(weight, dtype)  # type: ignore[arg-type]
    torch.testing.assert_close(stored(torch.arange(3)), weight, rtol=0.01, atol=0)
    weight[2, 1] *= -1.01
    if dtype == "fp32":
        return
    with pytest.raises(UserError, match=rf"table 't': 1 of 3 rows exceed .*, the limit of {dtype}; export .* fp32"):
        check_representable("t", weight, dtype)  # type: ignore[arg-type]


def test_size_in_bytes() -> None:
    weight = torch.randn(1000, 32)
    size = {
        dtype: sum(part.nbytes for part in quantize_rows(weight, dtype).buffers()) for dtype in ("int8", "fp16", "fp32")
    }
    assert size == {"int8": 34_000, "fp16": 64_000, "fp32": 128_000}
    assert size["int8"] <= 0.3 * size["fp32"]


@pytest.mark.parametrize("dtype", ["int8", "fp16", "fp32"])
def test_looks_up_rows_by_id(dtype: str) -> None:
    weight, small = {"item.id": torch.randn(20, 4), "tab": torch.randn(5, 4)}, torch.randn(3, 4)
    rows = {name: len(table) for name, table in weight.items()}
    tables = QuantizedEmbeddings(rows, lambda name: quantize_rows(weight[name], dtype), {"small": small})  # type: ignore[arg-type]
    ids = {"tab": torch.tensor([4, 0]), "small": torch.arange(3), "item.id": torch.tensor([3, 19, 3, 0])}
    lengths = torch.tensor([len(part) for part in ids.values()])
    looked_up = tables(KeyedJaggedTensor([*ids], torch.cat([*ids.values()]), lengths=lengths))
    for name, table in weight.items():
        expected = table[ids[name]]
        torch.testing.assert_close(looked_up[name].values(), expected, rtol=0, atol=0.03 if dtype != "fp32" else 0)
        assert looked_up[name].lengths().tolist() == [len(expected)]
    assert torch.equal(looked_up["small"].values(), small)


@pytest.mark.parametrize("dtype", ["int8", "fp16", "fp32"])
def test_permuted_rows_have_their_new_ids(dtype: str) -> None:
    weight = {"user": torch.randn(5, 4), "item": torch.randn(20, 4), "tab": torch.randn(3, 4)}
    rows = {name: len(table) for name, table in weight.items()}
    stored = {name: quantize_rows(table, dtype) for name, table in weight.items()}  # type: ignore[arg-type]
    tables, permutation = QuantizedEmbeddings(rows, lambda name: stored[name], {}), torch.randperm(20)
    tables.permute_rows("item", permutation)
    ids = {name: permutation if name == "item" else torch.arange(size) for name, size in rows.items()}
    lengths = torch.tensor([*rows.values()])
    looked_up = tables(KeyedJaggedTensor([*ids], torch.cat([*ids.values()]), lengths=lengths))
    for name, size in rows.items():
        assert torch.equal(looked_up[name].values(), stored[name](torch.arange(size))), name


def test_rejects_tables_of_different_formats() -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(ValueError, match="different storage formats"):
        QuantizedEmbeddings({"a": 3, "b": 3}, lambda name: quantize_rows(weight, "int8" if name == "a" else "fp16"), {})
