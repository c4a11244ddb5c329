"""Files become texts, and broken records are reported.

Formats: .txt (one document per file), .jsonl, .json, .csv and .parquet (one record per line, element or row), each also
.gz or .zst.
Everything is read as a stream. A broken record is never dropped silently and never stops the rest: it goes to
`on_bad` with its file, its line and the reason, and the caller decides what to do about it.
"""

import codecs
import csv
import gzip
import importlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, Protocol, TypeVar, cast

from nanollm.extras import how_to_install
from nanollm.progress import say

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PACKINGS = ("", ".gz", ".zst")
DOCUMENT_BYTES = 16 * 2**20  # a .txt file above this is read as several documents
MANY_LINES = 20  # of one row of .csv: above it a quote may have been left open
LINE_BYTES = 16 * 2**20  # a longer line of .jsonl or field of .csv is a bad record
NOT_OURS = ("__MACOSX", "__pycache__")
BETWEEN = re.compile(r"[\s,\[\]]*")  # the elements of a list
SURROGATE = re.compile("[\ud800-\udfff]")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
BATCH_ROWS = 256  # of Parquet, held in memory at once
REASON_CHARS = 300  # a reason may quote what stands in the file


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be used."""

    path: str  # of the file, or the name of the dataset
    line: int  # line (.txt, .jsonl) or row after the header (.csv, .parquet, hub), from 1; 0: the file
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


class File(Protocol):
    """What can be read: a Path, or a file elsewhere (sources/remote.py). As text it says where it is."""

    @property
    def name(self) -> str: ...

    def open(self, mode: Literal["rb"]) -> Any: ...


OnBad = Callable[[BadRecord], None]
Row = tuple[str, ...]
Parsed = TypeVar("Parsed")
Numbered = Iterator[tuple[int, Any]]  # (line, the record's values by column, or a str: why it is bad)


class _Unreadable(Exception):
    """The rest of a file cannot be read."""


def checksums(files: Sequence[Path]) -> list[list[str | int]]:
    """Name, bytes and CRC-32 of each file: enough to notice that one was changed, wherever they lie."""
    found: list[list[str | int]] = []
    sizes = [path.stat().st_size for path in files]
    if sum(sizes) >= 2**30:
        say(f"reading {sum(sizes) / 2**30:,.1f} GiB of sources once, to notice later if one has changed")
    for path, size in zip(files, sizes, strict=True):
        with path.open("rb") as file:
            crc = reduce(lambda crc, part: zlib.crc32(part, crc), iter(partial(file.read, 2**20), b""), 0)
        found.append([path.name, size, crc])
    return found


def find_files(inputs: Sequence[Path], split: str | None = None) -> list[Path]:
    """The readable files among files and folders (searched through), in order, each once.

    With `split`, a folder gives only the files with that word in their names (train.jsonl, test-00000.parquet).
    """
    found: dict[Path, None] = {}
    for given in map(Path, inputs):
        if given.is_dir():
            inside = _search(given)
            chosen = [path for path in inside if split is None or is_named(path, split)]
            if not chosen:
                wanted = "|".join(FORMATS) + ", also .gz or .zst" + (f", with {split!r} in its name" if split else "")
                raise FileNotFoundError(f"{given} holds no file to read (expected {wanted})")
            found.update(dict.fromkeys(chosen))
        elif not given.exists():
            raise FileNotFoundError(f"{given} does not exist; give a file or a folder that does")
        elif not format_of(given):
            raise ValueError(
                f"{given} is not one of {', '.join(FORMATS)} (each also .gz or .zst); convert or rename it"
            )
        else:
            found[given] = None
    return list(found)


def _search(folder: Path) -> list[Path]:
    """The readable files of a folder and those below it, in order; what is passed over is said with its number."""
    found, passed = list[Path](), Counter[str]()
    for place, folders, names in os.walk(folder):
        for name in sorted(folders):
            hidden, linked = name.startswith(".") or name in NOT_OURS, (Path(place) / name).is_symlink()
            if hidden or linked:
                folders.remove(name)
                passed["hidden folders" if hidden else "linked folders"] += 1
        for path in (Path(place) / name for name in names):
            if format_of(path) and path.is_file():
                found.append(path)
            else:
                passed["hidden files" if path.name.startswith(".") else path.suffix.lower() or "without ending"] += 1
    if passed:
        say(f"{folder}: passed over " + ", ".join(f"{number:,} {kind}" for kind, number in passed.most_common(8)))
    return sorted(found)


def is_named(path: Path, split: str) -> bool:
    """Whether the word stands in a file's name: test in test-00000.parquet, but not in latest.txt."""
    return split in re.split(r"[^a-z]+", path.name.lower())


def read_texts(paths: Iterable[File], text_column: str, on_bad: OnBad) -> Iterator[str]:
    """The text of each record. A .txt file has no columns: it is one text, whatever the column's name."""
    for (text,) in read_rows(paths, [text_column], on_bad):
        yield text


def read_rows(paths: Iterable[File], columns: Sequence[str], on_bad: OnBad) -> Iterator[Row]:
    """The values of the columns, for each record where all of them are text that is not empty."""
    return read_records(paths, columns, lambda values: problem(values, columns) or tuple(values), on_bad)


def read_records(
    paths: Iterable[File], columns: Sequence[str], parse: Callable[[list[Any]], Parsed | str], on_bad: OnBad
) -> Iterator[Parsed]:
    """What `parse` makes of the columns of each record; where that is a str, it is the reason why the record is bad."""
    for path in paths:
        records = 0
        for line, values in _read_file(path, columns):
            records += 1
            parsed = values if isinstance(values, str) else parse(values)
            if isinstance(parsed, str):
                on_bad(BadRecord(str(path), line, _in_one_line(parsed)))
            else:
                yield parsed
        if not records:
            on_bad(BadRecord(str(path), 0, "holds no records"))


def _in_one_line(reason: str) -> str:
    """Short, and without anything that a terminal or a file would take for more than characters."""
    short = reason if len(reason) <= REASON_CHARS else f"{reason[:REASON_CHARS]} ..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in short)


def problem(values: Sequence[Any], columns: Sequence[str]) -> str | None:
    """Why these values cannot be used, or None."""
    for value, column in zip(values, columns, strict=True):
        if value is None:
            return f"{column} is missing"
        if not isinstance(value, str):
            return f"{column} must be text, got {type(value).__name__}"
        if not value or value.isspace():
            return f"{column} is empty"
        if not value.isascii() and SURROGATE.search(value):
            return f"{column} is not valid Unicode (a byte that is not UTF-8, or a lone surrogate)"
    return None


def format_of(path: File) -> str | None:
    """.txt for notes.txt.gz, None for what cannot be read; hidden files are not for us."""
    name = path.name.lower()
    known = (kind for kind in FORMATS for packing in PACKINGS if name.endswith(kind + packing))
    return None if name.startswith(".") else next(known, None)


def _read_file(path: File, columns: Sequence[str]) -> Numbered:
    """Records of one file; if it breaks off, the last one says why."""
    read = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    line = 0
    with path.open("rb") as file:  # a missing or forbidden file is the caller's to hear of
        try:
            for line, values in read[str(format_of(path))](_unpack(path, file), columns):
                yield line, values
        except (_Unreadable, OSError, EOFError, zlib.error) as error:
            how_far = "any further" if line else "at all"
            yield line and line + 1, f"cannot be read {how_far}: {' '.join(str(error).split())}"


def _unpack(path: File, file: BinaryIO) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if path.name.lower().endswith(".zst"):
        arrow = need("pyarrow", "to read .zst files")
        return cast(BinaryIO, io.BufferedReader(arrow.CompressedInputStream(file, "zstd")))
    return file


def _read_txt(file: BinaryIO, columns: Sequence[str]) -> Numbered:
    """The whole file; above DOCUMENT_BYTES in parts, cut at blank lines where there are any.

    The parts joined are the text, but for a byte order mark, which is left out, and CR LF, which becomes LF.
    """
    if not columns:
        yield 0, "a .txt file holds one text, and no records"
        return
    if len(columns) != 1:
        raise ValueError(
            f"a .txt file has one text, not the columns {', '.join(columns)}; give .jsonl, .csv or .parquet"
        )
    line, part = 1, file.read(DOCUMENT_BYTES + 1)
    encoding = "utf-8-sig"  # drops a byte order mark
    while part:
        end = _end_of_part(part)
        content, part = part[:end], part[end:]
        try:
            text = content.decode(encoding)
            is_utf16 = text.count("\0") > len(text) // 4
            yield line, "UTF-16; convert the file to UTF-8" if is_utf16 else [text.replace("\r\n", "\n")]
        except UnicodeDecodeError as error:
            kind = "UTF-16" if content.startswith(UTF16_MARKS) else "not UTF-8"
            yield line + content[: error.start].count(b"\n"), f"{kind}; convert the file to UTF-8"
        line += content.count(b"\n")
        encoding = "utf-8"
        part += file.read(DOCUMENT_BYTES + 1 - len(part))


def _end_of_part(part: bytes) -> int:
    if len(part) <= DOCUMENT_BYTES:
        return len(part)
    for border in (b"\n\n", b"\n\r\n", b"\n"):
        if (at := part.rfind(border, DOCUMENT_BYTES // 2)) >= 0:
            return at + len(border)
    end = DOCUMENT_BYTES
    while end > DOCUMENT_BYTES // 2 and part[end] & 0xC0 == 0x80:  # not inside a character
        end -= 1
    return end


def _read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines, without a byte order mark; None for a line over LINE_BYTES."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) <= LINE_BYTES or line.endswith(b"\n"):
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)
        yield number, None


def _read_jsonl(file: BinaryIO, columns: Sequence[str]) -> Numbered:
    """One JSON object per line; blank lines are no records. A file that is a list after all is read as .json."""
    lines, is_first = _read_lines(file), True
    for number, line in lines:
        if line is None:
            yield number, f"the line is longer than {LINE_BYTES:,} bytes"
        elif is_first and line.lstrip()[:1] == b"[":
            yield from _elements(chain([line], _whole(lines)), columns)
        elif line.strip():
            is_first = False
            yield number, _parse_json(line, columns)


def _whole(lines: Iterable[tuple[int, bytes | None]]) -> Iterator[bytes]:
    for number, line in lines:
        if line is None:
            raise _Unreadable(f"line {number} is longer than {LINE_BYTES:,} bytes")
        yield line


def _read_json(file: BinaryIO, columns: Sequence[str]) -> Numbered:
    """The objects of a list, or one after the other; elements are counted, not lines."""
    return _elements(iter(lambda: file.read(2**20), b""), columns)


def _elements(pieces: Iterable[bytes], columns: Sequence[str]) -> Numbered:
    """Objects between brackets and commas, held one at a time.

    An element that does not end yet is tried again only when there is twice as much of it: each character is parsed a
    few times at most, however large the element and small the pieces.
    """
    decoder, number, buffer, at, wanted = json.JSONDecoder(), 0, "", 0, 0
    try:
        for piece in chain(codecs.iterdecode(pieces, "utf-8-sig"), [None]):
            buffer += piece or ""
            if piece is not None and len(buffer) < wanted:
                continue
            while (at := BETWEEN.match(buffer, at).end()) < len(buffer):  # type: ignore[union-attr]  # it matches nothing too
                try:
                    record, at = decoder.raw_decode(buffer, at)
                except ValueError as error:
                    if piece is None or len(buffer) - at > LINE_BYTES:
                        raise _Unreadable(f"malformed JSON in element {number + 1}: {error}") from error
                    break  # its end is still to come
                number += 1
                yield number, _values_of(record, columns)
            buffer, at = buffer[at:], 0
            wanted = 2 * len(buffer)
    except (UnicodeDecodeError, RecursionError) as error:
        what = "not UTF-8; convert the file" if isinstance(error, UnicodeDecodeError) else "nested too deeply"
        raise _Unreadable(f"{what} (after element {number})") from error


def _parse_json(line: bytes, columns: Sequence[str]) -> list[Any] | str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except RecursionError:
        return "malformed JSON: nested too deeply"
    except ValueError as error:
        is_utf16 = len(line) // 4 < line.count(b"\0") < 3 * len(line) // 4  # all of it NULs: a crash left those
        return "UTF-16; convert the file to UTF-8" if is_utf16 else f"malformed JSON: {error}"
    return _values_of(record, columns)


def _values_of(record: Any, columns: Sequence[str]) -> list[Any] | str:
    """The values of the columns of a JSON object; the object itself where no column is named."""
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    return _missing(columns, list(record)) or [record[column] for column in columns] or [record]


def _missing(columns: Sequence[str], present: Sequence[str]) -> str | None:
    missing = [column for column in columns if column not in present]
    return f"no {' or '.join(missing)} here, only {', '.join(present) or 'nothing'}" if missing else None


def _read_csv(file: BinaryIO, columns: Sequence[str]) -> Numbered:
    """Rows under a header; a field may hold newlines, so rows are counted, not lines."""
    csv.field_size_limit(LINE_BYTES)
    taken = list[str]()  # the lines of the row that is being read

    def lines() -> Iterator[str]:
        for line in _whole(_read_lines(file)):
            taken.append(line.decode(errors="surrogateescape"))  # only a row is bad by a byte
            yield taken[-1]

    rows = csv.reader(lines(), strict=True)
    try:
        header = next(filter(None, rows), [])
    except csv.Error as error:
        raise _Unreadable(f"malformed CSV header: {error}") from error
    if header and (missing := _missing(columns, header)):
        yield 0, missing
        return
    row = 0
    while True:
        taken.clear()
        begin = rows.line_num + 1
        try:
            fields = next(filter(None, rows))
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):  # a quote left open has taken in the rest of the file
                raise _Unreadable(f"{error}, before line {rows.line_num} (a quote left open?)") from error
            row += 1
            lost = f"; the row began in line {begin}, and {len(taken):,} lines went with it" if taken[1:] else ""
            yield row, f"malformed CSV at line {rows.line_num}: {error}{lost}"
            continue
        row += 1
        if _holds_rows(taken, len(header)):
            yield (
                row,
                f"a row of {len(taken):,} lines from line {begin}, which look like rows themselves: a quote left open?",
            )
        elif len(fields) != len(header):
            yield row, f"expected {len(header)} fields, got {len(fields)}"
        else:
            yield row, _values_of(dict(zip(header, fields, strict=True)), columns)


def _holds_rows(lines: Sequence[str], columns: int) -> bool:
    """Whether most of a row's many lines are whole rows, as when a quote was left open."""
    if len(lines) < MANY_LINES or columns < 2:
        return False
    inside = lines[1:-1]
    return 2 * sum(len(next(csv.reader([line]), [])) == columns for line in inside) > len(inside)


def _read_parquet(file: BinaryIO, columns: Sequence[str]) -> Numbered:
    """Rows, a batch at a time. Parquet is read from its end, so a packed file is unpacked (on disk) first."""
    arrow, parquet = need("pyarrow", "to read Parquet"), need("pyarrow.parquet", "to read Parquet")
    with tempfile.TemporaryFile() as unpacked:
        if not isinstance(file, io.BufferedReader) or not file.seekable():
            shutil.copyfileobj(file, unpacked)
            file = unpacked
        try:
            # With other buffers Arrow holds the whole column of a row group, as it is packed.
            options = {"buffer_size": 2**20, "pre_buffer": False, "page_checksum_verification": True}
            table = parquet.ParquetFile(file, **options)
            if missing := _missing(columns, table.schema_arrow.names):
                yield 0, missing
                return
            row = 0
            for group in range(table.num_row_groups):  # one by one, so that those before a damaged one are read
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns) or None):
                    names = columns or batch.schema.names
                    for cells in zip(*(batch.column(name) for name in names), strict=True):
                        row += 1
                        values = [_value(cell) for cell in cells]
                        yield row, values if columns else [dict(zip(names, values, strict=True))]
        except (arrow.ArrowException, UnicodeDecodeError) as error:  # the latter: in the name of a column
            raise _Unreadable(str(error)) from error


def _value(cell: Any) -> Any:
    """A cell as Python has it, or the cell itself if Python cannot, so that only its row is bad."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error.object.decode(errors="surrogateescape")
    except Exception:  # such as a date after the year 9999
        return cell


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(f"{package} is needed {purpose}; {how_to_install('data')}") from error
