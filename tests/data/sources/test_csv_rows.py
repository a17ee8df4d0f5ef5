"""Rows in errors of CSV files: the line in which the record starts, as an editor shows it."""

import csv
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.csv_errors import STANDARD_DIALECT, CsvDialect, line_of_record
from a2gen_rec.errors import DataError
from tests.helpers.raw_logs import START_MS, read_log

HEADER = "user,item,ts,dwell,like\n"
GOOD = f"u,v,{START_MS},1,0\n"
QUOTED = f'u,"a\nb",{START_MS},1,0\n'
INVALID = {
    "too short": "u,v\n",
    "too long": GOOD.replace("\n", ",9\n"),
    "unterminated": 'u,"v,1\n',
    "number": f"u,v,{START_MS},x,0\n",
    "time": "u,v,1,1,0\n",
    "flag": f"u,v,{START_MS},1,5\n",
    "missing": f",v,{START_MS},1,0\n",
}
BEFORE = {
    "quoted newlines": QUOTED * 2,
    "empty lines": f"{GOOD}\n\n{GOOD}\n",
    "both": f"\n{QUOTED}\n\n{QUOTED}{GOOD}",
    "space before a quote": GOOD + f'u, "a\n\nb",{START_MS},1,0\n',
    "quote within a value": f'u,5" v,{START_MS},1,0\n{QUOTED}',
}


STORAGE = {
    "newline": lambda text: {"log.csv": text},
    "carriage return and newline": lambda text: {"log.csv": text.replace("\n", "\r\n")},
    "carriage return": lambda text: {"log.csv": text.replace("\n", "\r")},
    "gzip": lambda text: {"log.gz": gzip.compress(text.encode(), mtime=0)},
}


@pytest.mark.parametrize(
    ("before", "reason", "storage"),
    [
        # By default each pair of two of the three occurs.
        pytest.param(before, reason, storage, marks=[] if (x + y - z) % 4 == 0 else pytest.mark.thorough)
        for x, before in enumerate(BEFORE)
        for y, reason in enumerate(INVALID)
        for z, storage in enumerate(STORAGE)
    ],
)
def test_row_is_the_line_of_the_file(tmp_path, before, reason, storage):
    text = HEADER + BEFORE[before]
    line = text.count("\n") + 1
    files = STORAGE[storage](text + INVALID[reason] + GOOD)
    with pytest.raises(DataError, match=rf"{next(iter(files))}, row {line}\b"):
        read_log(tmp_path, files)


def test_row_after_a_header_of_two_lines(tmp_path):
    header = HEADER.replace("\n", ',"a\nb"\n')
    for number, (row, field) in enumerate(((f"u,v,{START_MS},x,0,1\n", "'dwell': 'x'"), ("u,v\n", "Expected Number"))):
        with pytest.raises(DataError, match=rf"log.csv, row 4.*{field}"):
            read_log(tmp_path / str(number), {"log.csv": header + GOOD.replace("\n", ",1\n") + row})


def test_row_that_is_not_utf8(tmp_path):
    with pytest.raises(DataError, match=r"log.csv, row 6: is not UTF-8"):
        read_log(tmp_path, {"log.csv": (HEADER + QUOTED * 2 + GOOD.replace("v", "é")).encode("latin-1")})


def test_row_of_another_dialect(tmp_path):
    text = HEADER.replace(",", ";") + f"u;'a\\'\nb';{START_MS};1;0\n\nu;v;{START_MS};x;0\n"
    with pytest.raises(DataError, match=r"log.csv, row 5, field 'dwell'"):
        read_log(tmp_path, {"log.csv": text}, delimiter=";", quote="'", escape="\\")
    text = HEADER.replace(",", "\t") + f'u\t"a\t{START_MS}\t1\t0\nu\tv\n'
    with pytest.raises(DataError, match=r"log.csv, row 3: Expected Number of Columns"):
        read_log(tmp_path / "unquoted", {"log.csv": text}, delimiter="\t", quote="", escape="")


RECORD = st.lists(st.text(st.sampled_from('ab,"\n\r '), max_size=4), min_size=2, max_size=4)


@given(st.lists(st.one_of(st.just([]), RECORD), min_size=1, max_size=9), st.sampled_from(["\n", "\r\n", "\r"]))
def test_line_of_every_record(tmp_path_factory, records, newline):
    folder = tmp_path_factory.mktemp("csv")
    text, starts = "", []
    for record in records:
        starts.append(len(io.StringIO(f"{text}x", newline="").readlines()))
        stream = io.StringIO(newline="")
        csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator=newline).writerow(record)
        text += stream.getvalue()
    file = folder / "log.csv"
    file.write_bytes(text.encode())
    numbers = range(1, len(records) + 1)
    assert [line_of_record(file, STANDARD_DIALECT, number, with_empty=True) for number in numbers] == starts
    nonempty = [start for record, start in zip(records, starts, strict=True) if record]
    numbers = range(1, len(nonempty) + 1)
    assert [line_of_record(file, STANDARD_DIALECT, number, with_empty=False) for number in numbers] == nonempty


def test_line_after_a_long_value(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text(f'a,"{"x" * 200_000}\n"\nb,c\n')
    assert line_of_record(file, CsvDialect(), 2, with_empty=True) == 3
