"""The compiled kernels as instructions: their loops, and what each does with registers and memory.

`objdump` of binutils reads the library; a kernel belongs to the source file that the symbol table names before it,
which is how two variants that share their C++ names are told apart.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What multiplies and adds: bytes or words into 32-bit lanes, or tiles.
DOT = re.compile(r"\b(?:vpdpbusd|vpmaddubsw|vpmaddwd|tdpb\w+)\b")
SYMBOL = re.compile(r"(?P<at>[0-9a-f]+) (?P<flags>.{7}) (?P<section>\S+)\t(?P<size>[0-9a-f]+)\s+(?P<name>.*)")
INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\s+(.*)")
JUMP = re.compile(r"j\w+\s+([0-9a-f]+)\b")
STORE = re.compile(r"vmov\S*\s+%[xyz]mm\d+,")


@dataclass(frozen=True)
class Function:
    """One compiled function.

    Attributes:
        source: File that it was compiled from, such as `kernels_avx2.cpp`.
        name: Without namespaces, return type and parameters: `up_few<Avx2, 4, false, 1, 4>`.
        code: Addresses and instructions.
    """

    source: str
    name: str
    code: tuple[tuple[int, str], ...] = field(repr=False)

    @property
    def text(self) -> list[str]:
        """The instructions alone."""
        return [instruction for _, instruction in self.code]

    def hot_loops(self) -> list[Loop]:
        """The loops with dot products that have none inside that has them, too."""
        begin, dots = self.code[0][0], [at for at, instruction in self.code if DOT.search(instruction)]
        ranges = {
            (target, at)
            for at, instruction in self.code
            if (jump := JUMP.match(instruction)) and begin <= (target := int(jump[1], 16)) <= at
        }
        working = [(low, high) for low, high in ranges if any(low <= at <= high for at in dots)]
        innermost = [
            (low, high)
            for low, high in working
            if not any((low, high) != other and low <= other[0] and other[1] <= high for other in working)
        ]
        # Where the frame pointer is kept, the stack is reached by it.
        registers = "%rsp|%rbp" if any(re.match(r"mov\s+%rsp,%rbp", each) for each in self.text) else "%rsp"
        stack = re.compile(rf"(-?(?:0x)?[0-9a-f]*\((?:{registers})[,)][^,]*)")
        return [
            Loop(self, tuple(each for at, each in self.code if low <= at <= high), stack)
            for low, high in sorted(innermost)
        ]


@dataclass(frozen=True)
class Loop:
    """A loop of a function."""

    function: Function
    text: tuple[str, ...] = field(repr=False)
    stack: re.Pattern[str]

    def all_of(self, pattern: str) -> list[str]:
        """Its instructions that match."""
        return [each for each in self.text if re.search(pattern, each)]

    def spilled_sums(self) -> set[str]:
        """Places on the stack where a vector is kept from one pass of the loop to the next: read first, then written.

        In these loops only sums live on, so that each of these is a sum without a register.
        """
        read: set[str] = set()
        spilled: set[str] = set()
        for instruction in self.text:
            place = self.stack.search(instruction)
            if place is None or not re.search(r"[xyz]mm", instruction):
                continue
            if not STORE.match(instruction):
                read.add(place[1])
            elif place[1] in read:
                spilled.add(place[1])
        return spilled


def has_symbols(library: Path) -> bool:
    """Whether a library names the functions that it does not export."""
    return any(match["flags"][0] == "l" and "F" in match["flags"] for match in _symbols(_objdump("-t", library)))


def functions(library: Path) -> list[Function]:
    """All functions of a library that are local to a source file."""
    return parse(_objdump("-t", "-C", library), _objdump("-d", "--no-show-raw-insn", library))


def parse(symbols: str, disassembly: str) -> list[Function]:
    """The functions of objdump's symbol table and disassembly."""
    source, found = "", []
    named: list[tuple[int, int, str, str]] = []
    for match in _symbols(symbols):
        if "f" in match["flags"]:
            source = match["name"]
        elif "F" in match["flags"] and match["flags"][0] == "l":
            at = int(match["at"], 16)
            named.append((at, at + int(match["size"], 16), source, _short(match["name"])))
    code = [
        (int(match[1], 16), match[2].strip()) for match in map(INSTRUCTION.match, disassembly.splitlines()) if match
    ]
    position = 0
    for begin, end, file, name in sorted(named):
        while position < len(code) and code[position][0] < begin:
            position += 1
        last = position
        while last < len(code) and code[last][0] < end:
            last += 1
        if last > position:
            found.append(Function(file, name, tuple(code[position:last])))
    return found


def _symbols(text: str) -> Iterator[re.Match[str]]:
    return (match for match in map(SYMBOL.match, text.splitlines()) if match)


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\(\(anonymous namespace\)::\w+\)|relu2::", "", name)
    return name.partition("(")[0].removeprefix("void ").strip()


def _objdump(*arguments: str | Path) -> str:
    return subprocess.run(["objdump", *arguments], capture_output=True, text=True, check=True).stdout
