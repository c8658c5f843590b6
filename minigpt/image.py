"""An ELF object made into one piece of code that runs wherever it lies, so that loading it is mapping a file.

LLVM's own loader does the same work in every process, and its library takes 41 MB. Kernels refer to nothing outside
themselves and to what is inside by distance; once their sections have places in one image, all distances are known.
Sources: System V ABI, "ELF for the Arm 64-bit Architecture", "AMD64 Architecture Processor Supplement".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

PAGE = 4096  # images begin on one: Arm's code counts pages
ALLOCATED, NO_BITS, RELOCATIONS, SYMBOLS = 2, 8, 4, 2  # of a section: its flag, and types


class Section(NamedTuple):
    """A section header of ELF64, in the file's order."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


def flatten(elf: bytes, symbol: str, begin: int = 0) -> tuple[bytes, int]:
    """Return the image of a relocatable object, to stand `begin` bytes after a page begins, and where `symbol` is then.

    Raises
    ------
    ValueError
        If it is no object of a machine in `MACHINES`, or holds what an image cannot: a reference to the outside, or of
        a kind that is not known here.
    """
    if elf[:6] != b"\x7fELF\x02\x01" or (machine := struct.unpack_from("<H", elf, 18)[0]) not in MACHINES:
        raise ValueError("not an object of ELF for x86-64 or 64-bit Arm")
    (table,), (n_sections, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 60)
    sections = [Section(*struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * i)) for i in range(n_sections)]
    image, places = bytearray(begin), {}
    for i, section in enumerate(sections):
        if section.flags & ALLOCATED and _text(elf, sections[names], section.name) != ".eh_frame":
            image += bytes(-len(image) % max(section.align, 1))
            places[i] = len(image)
            data = elf[section.offset : section.offset + section.size]
            image += bytes(section.size) if section.type == NO_BITS else data
    values, entry = _symbols(elf, sections, places, symbol)
    for section in sections:
        if section.type == RELOCATIONS and section.info in places:
            for at in range(section.offset, section.offset + section.size, 24):
                offset, info, addend = struct.unpack_from("<QQq", elf, at)
                if (patch := MACHINES[machine].get(info & 0xFFFFFFFF)) is None or values[info >> 32] is None:
                    raise ValueError(f"relocation {info & 0xFFFFFFFF} of {_text_of(elf, sections, info >> 32)}")
                place = places[section.info] + offset
                (word,) = struct.unpack_from("<I", image, place)
                struct.pack_into("<I", image, place, patch(word, values[info >> 32] + addend, place) & 0xFFFFFFFF)
    if entry is None:
        raise ValueError(f"no function {symbol}")
    return bytes(image[begin:]), entry


def _symbols(
    elf: bytes, sections: list[Section], places: dict[int, int], wanted: str
) -> tuple[list[int | None], int | None]:
    """Return the place of every symbol, None outside the image, and that of the wanted one."""
    (table,) = (section for section in sections if section.type == SYMBOLS)
    values: list[int | None] = []
    entry = None
    for at in range(table.offset, table.offset + table.size, 24):
        name, _, _, index, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
        values.append(places[index] + value if index in places else None)
        if _text(elf, sections[table.link], name) == wanted:
            entry = values[-1]
    return values, entry


def _text(elf: bytes, strings: Section, offset: int) -> str:
    begin = strings.offset + offset
    return elf[begin : elf.index(b"\0", begin)].decode()


def _text_of(elf: bytes, sections: list[Section], symbol: int) -> str:
    (table,) = (section for section in sections if section.type == SYMBOLS)
    (name,) = struct.unpack_from("<I", elf, table.offset + 24 * symbol)
    return _text(elf, sections[table.link], name) or "a section"


# What to put into a word of the image: (the word, the target's place, the word's own place) -> the word


def _distance(word: int, target: int, place: int) -> int:
    return target - place


def _branch(word: int, target: int, place: int) -> int:
    return word & 0xFC000000 | (target - place) >> 2 & 0x03FFFFFF


def _pages(word: int, target: int, place: int) -> int:
    n = target // PAGE - place // PAGE
    return word & 0x9F00001F | (n & 3) << 29 | (n >> 2 & 0x7FFFF) << 5


def _within_page(shift: int) -> Callable[[int, int, int], int]:
    return lambda word, target, place: word & ~(0xFFF << 10) | target % PAGE >> shift << 10


MACHINES: dict[int, dict[int, Callable[[int, int, int], int]]] = {
    62: {2: _distance, 4: _distance},  # x86-64: PC32, PLT32
    183: {  # 64-bit Arm: PREL32, ADR_PREL_PG_HI21, JUMP26, CALL26, ADD and LDST8..128_ABS_LO12_NC
        261: _distance,
        275: _pages,
        282: _branch,
        283: _branch,
        **{277: _within_page(0), 278: _within_page(0), 284: _within_page(1)},
        **{285: _within_page(2), 286: _within_page(3), 299: _within_page(4)},
    },
}
