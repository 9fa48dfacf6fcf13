"""Reads the responses in a damaged SQLite file without SQLite, which gives up at a damaged page.

The rows of a table without rowids lie in the leaves and in the interior pages of a B-tree, see
https://www.sqlite.org/fileformat2.html. Every page of the file is tried by itself, so that only the
rows of damaged pages are lost, whichever these are.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_HEADER_BYTES = {0x0A: 8, 0x02: 12}  # of the pages with rows: leaves, interior pages
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_FLOAT, _ZERO, _ONE, _FIRST_BLOB = 7, 8, 9, 12
_NUM_COLUMNS = (10, 11)  # of a response: with and without a checksum
_COST_COLUMN = 6


def salvage_rows(path: Path, page_bytes: int) -> Iterator[Sequence[object]]:
    """The RESPONSE_COLUMNS and the checksum of every row that can be read, texts as bytes, in no
    order. Rows with damaged content are among them, and a row may come twice."""
    with path.open("rb") as file:
        for number in range(1, path.stat().st_size // page_bytes):
            page = _read_page(file, number, page_bytes)
            header_bytes = _HEADER_BYTES.get(page[0], 0)
            num_cells = int.from_bytes(page[3:5], "big") if header_bytes else 0
            for cell in range(num_cells):
                place = header_bytes + 2 * cell
                start = int.from_bytes(page[place : place + 2], "big")
                start += 4 if header_bytes == 12 else 0  # the number of the child page
                try:
                    values = _decode_record(_read_payload(file, page, start))
                except (IndexError, ValueError, struct.error):
                    continue
                if len(values) in _NUM_COLUMNS:
                    cost_usd = values[_COST_COLUMN]
                    if isinstance(cost_usd, int):  # SQLite stores 2.0 as 2
                        values[_COST_COLUMN] = float(cost_usd)
                    yield [*values[:9], values[10] if len(values) == 11 else None]


def _read_page(file: BinaryIO, number: int, page_bytes: int) -> bytes:
    file.seek(number * page_bytes)
    return file.read(page_bytes)


def _read_payload(file: BinaryIO, page: bytes, start: int) -> bytes:
    """The content of the cell that begins at `start`, with the part on overflow pages."""
    size, start = _read_varint(page, start)
    usable = len(page)
    max_local, min_local = (usable - 12) * 64 // 255 - 23, (usable - 12) * 32 // 255 - 23
    if size <= max_local:
        return page[start : start + size]
    local = min_local + (size - min_local) % (usable - 4)
    local = local if local <= max_local else min_local
    payload = bytearray(page[start : start + local])
    pointer = page[start + local : start + local + 4]
    while len(payload) < size:
        overflow = _read_page(file, int.from_bytes(pointer, "big") - 1, usable)
        if len(overflow) < usable:
            raise ValueError("the overflow page is missing")
        pointer = overflow[:4]
        payload += overflow[4 : 4 + size - len(payload)]
    return bytes(payload)


def _decode_record(payload: bytes) -> list[bytes | int | float | None]:
    """The values of a record: its header lists their types, then the values follow."""
    header_end, position = _read_varint(payload, 0)
    types: list[int] = []
    while position < header_end:
        kind, position = _read_varint(payload, position)
        types.append(kind)
    values: list[bytes | int | float | None] = []
    place = header_end
    for kind in types:
        size = (kind - _FIRST_BLOB) // 2 if kind >= _FIRST_BLOB else _INTEGER_BYTES.get(kind, 0)
        size = 8 if kind == _FLOAT else size
        content = payload[place : place + size]
        if len(content) < size:
            raise ValueError("the record is longer than its cell")
        place += size
        if kind in _INTEGER_BYTES:
            values.append(int.from_bytes(content, "big", signed=True))
        elif kind == _FLOAT:
            values.append(struct.unpack(">d", content)[0])
        elif kind in (_ZERO, _ONE):
            values.append(kind - _ZERO)
        else:
            values.append(content if kind >= _FIRST_BLOB else None)
    return values


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer of at most nine bytes, and where it ends."""
    value = 0
    for position in range(place, place + 8):
        value = value << 7 | data[position] & 0x7F
        if data[position] < 0x80:
            return value, position + 1
    return value << 8 | data[place + 8], place + 9
