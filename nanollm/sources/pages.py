"""How large are the pages of a Parquet file, before one is unpacked?

Arrow unpacks a page whole, and a page is at least as large as its largest text. Only the header before each page says
how large it is, in Thrift's compact protocol.
Source: https://github.com/apache/parquet-format, src/main/thrift/parquet.thrift, PageHeader;
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import BinaryIO

UNPACKED, PACKED = 2, 3  # fields of PageHeader: bytes of the page
BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12  # types of fields
DEEPEST = 8  # a page header has 3 structs in each other


def largest_page(file: BinaryIO, start: int, length: int) -> int:
    """Bytes of the largest page of a column chunk, unpacked. OSError where there is no chain of pages."""
    at, largest = start, 0
    if start < 0:
        raise OSError(f"there is no page at byte {start:,}")
    while at < start + length:
        file.seek(at)
        header = _read_struct(file)
        packed, unpacked = header.get(PACKED, -1), header.get(UNPACKED, -1)
        if packed < 0 or unpacked < 0:
            raise OSError(f"there is no page at byte {at:,}")
        at, largest = file.tell() + packed, max(largest, unpacked)
    return largest


def _read_struct(file: BinaryIO, depth: int = 0) -> dict[int, int]:
    """The whole numbers among the fields of a struct, by their numbers."""
    found, number = dict[int, int](), 0
    while head := _read_byte(file):
        number = number + (head >> 4) if head >> 4 else _read_integer(file)
        if (value := _read_value(file, head & 15, depth)) is not None:
            found[number] = value
    return found


def _read_value(file: BinaryIO, kind: int, depth: int) -> int | None:
    """A whole number, or None: another value, which is passed over."""
    if kind in INTEGERS:
        return _read_integer(file)
    if kind == BYTE:
        _read_byte(file)
    elif kind == DOUBLE:
        file.seek(8, 1)
    elif kind == BINARY:
        file.seek(_read_varint(file), 1)
    elif kind == STRUCT and depth < DEEPEST:
        _read_struct(file, depth + 1)
    elif kind not in BOOLEANS:  # no page header has a list
        raise OSError(f"there is no page header at byte {file.tell():,}")
    return None


def _read_integer(file: BinaryIO) -> int:
    zigzag = _read_varint(file)
    return (zigzag >> 1) ^ -(zigzag & 1)


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = _read_byte(file)
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
        if shift > 35:  # nothing in a page header has more than 32 bits
            raise OSError(f"there is no page header at byte {file.tell():,}")


def _read_byte(file: BinaryIO) -> int:
    if not (byte := file.read(1)):
        raise EOFError("the file ends inside a page header")
    return byte[0]
