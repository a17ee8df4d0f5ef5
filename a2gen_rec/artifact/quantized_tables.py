"""Embedding tables for serving: quantised by rows, of which a batch dequantises those that it looks up.

A row of int8 codes has one float16 scale and no offset: rows of an embedding are about symmetric, and an offset in
float16 would make a table of width 32 larger by 6 %. With fbgemm's two float32 (``FloatToFused8BitRowwiseQuantized``)
it would be 31 % of the float32 table instead of 27 %.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor

TableDtype = Literal["int8", "fp16", "fp32"]
_CHUNK = 2**18
"""Rows quantised at a time, so that a huge table needs no second one in float32."""


class QuantizedTable(nn.Module):
    """One table, as it is stored.

    Args:
        values: [rows, dim] int8 codes, float16 or float32.
        scale: [rows] float16 of int8 codes, else None.
    """

    values: Tensor
    scale: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """[n, dim] float32 of the rows ``ids`` [n]."""
        rows = self.values.index_select(0, ids).float()
        return rows if self.scale is None else rows.mul_(self.scale.index_select(0, ids).float()[:, None])

    def empty(self, rows: int) -> "QuantizedTable":
        """One of ``rows`` rows, stored as this one, to be :meth:`put` into."""
        values = self.values.new_empty(rows, self.values.shape[1])
        return QuantizedTable(values, None if self.scale is None else self.scale.new_empty(rows))

    def set_rows(self, first: int, end: int, rows: "QuantizedTable") -> None:
        """Let rows ``first`` up to ``end`` be those of another table.

        Raises:
            ValueError: it is not stored as this one.
        """
        if rows.values.dtype != self.values.dtype or (rows.scale is None) != (self.scale is None):
            raise ValueError("tables are not stored alike")
        self.values[first:end] = rows.values
        if self.scale is not None and rows.scale is not None:
            self.scale[first:end] = rows.scale


def quantize_rows(weight: Tensor, dtype: TableDtype) -> QuantizedTable:
    """A table [rows, dim] of float values, stored as ``dtype``.

    Codes are -127 .. 127 times a scale that makes the row's largest magnitude 127, so that no value is off by more
    than about half of that magnitude's 127th part.
    """
    if dtype == "fp32":
        return QuantizedTable(weight.float().contiguous())
    if dtype == "fp16":
        return QuantizedTable(weight.half().contiguous())
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float16)
    for first in range(0, len(weight), _CHUNK):
        part = weight[first : first + _CHUNK].float()
        # Rounded first, so that codes make up for it; a row of zeros, or of less than float16 tells, has scale 0.
        scale = (part.abs().amax(1) / 127).half()
        steps = part / scale.float().clamp(min=torch.finfo(torch.float16).smallest_normal / 2**10)[:, None]
        codes[first : first + _CHUNK] = steps.round().clamp(-127, 127).to(torch.int8)
        scales[first : first + _CHUNK] = scale
    return QuantizedTable(codes, scales)


class QuantizedEmbeddings(nn.Module):
    """All tables of a model, in the place of its ``EmbeddingCollection``: one after another as one, so that a batch
    looks up all of its ids at once.

    Args:
        rows: of each table that is looked up by id; at least one.
        read: called with the name of each, gives the table. All are stored alike and as wide.
        whole: name -> [rows, dim] of those that every batch looks up whole.

    Raises:
        ValueError: they are not stored alike.
    """

    def __init__(
        self, rows: Mapping[str, int], read: Callable[[str], QuantizedTable], whole: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        ends = list(itertools.accumulate(rows.values()))
        self.first = dict(zip(rows, [0, *ends[:-1]], strict=True))
        for name, end in zip(rows, ends, strict=True):  # one at a time in memory, beside what becomes of all
            part = read(name)
            if not self.first[name]:
                self.table = part.empty(ends[-1])
            self.table.set_rows(self.first[name], end, part)
        self.whole = {name: JaggedTensor(table, lengths=torch.tensor([len(table)])) for name, table in whole.items()}

    def permute_rows(self, name: str, rows: Tensor) -> None:
        """Let each row of a table be row ``rows`` [its rows] of it, which is a permutation."""
        first = self.first[name]
        for stored in (self.table.values, self.table.scale):
            if stored is not None:
                part = stored[first : first + len(rows)]
                part[rows] = part.clone()

    def forward(self, sparse: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looked-up rows of every table, one after another as their ids are."""
        counts = sparse.length_per_key()
        parts = zip(sparse.keys(), counts, sparse.values().split(counts), sparse.lengths().split(1), strict=True)
        asked = [part for part in parts if part[0] in self.first]
        first = np.repeat([self.first[name] for name, *_ in asked], [count for _, count, *_ in asked])
        rows = self.table(torch.cat([ids for _, _, ids, _ in asked]) + torch.from_numpy(first))
        found = dict(self.whole)
        for (name, _, _, length), values in zip(asked, rows.split([count for _, count, *_ in asked]), strict=True):
            found[name] = JaggedTensor(values, lengths=length)
        return found
