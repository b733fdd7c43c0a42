"""The compiled library: each variant's hot loops have the instructions that it is for, and keep sums in registers.

Results and speed do not show these faults at once: a compiler may drop a prefetch, take an instruction of another
encoding, or keep sums in memory, and the answers stay the same.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.machine_code import Function, Loop, functions, has_symbols, parse

# Of each variant: the dot product of its loops, and what an instruction must not have for such a CPU to know it.
VARIANTS = {
    "avx2": (r"vpmadd(?:ubsw|wd)\s.*%ymm", r"vpdp|%zmm|%[xy]mm(?:1[6-9]|[23]\d)|%k\d|^t(?:dp|ile)"),
    "avx2vnni": (r"\{vex\} vpdpbusd\s.*%ymm", r"(?<!\{vex\} )vpdp|%zmm|%[xy]mm(?:1[6-9]|[23]\d)|%k\d|^t(?:dp|ile)"),
    "avx512vnni": (r"vpdpbusd\s.*%zmm", r"\{vex\} vpdp|^t(?:dp|ile)"),
    "amx": (r"vpdpbusd\s.*%zmm|^tdpb(?:us|ss)d", r"\{vex\} vpdp"),
}
# The microkernels of csrc/kernels_impl.h.
FEW_UP, FEW_DOWN, MANY = "packed_group", "down_few", "from_bytes"
DECODING = ("up_many", "down_many")
# The most sums that GCC 12 keeps on the stack in a loop of a kernel. The aim is none; nothing may be added.
SPILLED: dict[str, dict[str, int]] = {
    "avx2": {FEW_UP: 2, FEW_DOWN: 3, MANY: 5},
    "avx2vnni": {FEW_UP: 1},
    "avx512vnni": {FEW_UP: 1, FEW_DOWN: 1},
    "amx": {FEW_UP: 1, FEW_DOWN: 1},
}


@pytest.fixture(scope="module")
def compiled(library: Path) -> list[Function]:
    """The functions of the installed library."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("these variants are for x86, and objdump reads them where it is the system's own")
    if shutil.which("objdump") is None:
        pytest.skip("objdump is missing, so nothing is known of the compiled kernels; install it with: make tools")
    if not has_symbols(library):
        pytest.fail(f"{library} was stripped, so its kernels cannot be told apart; install.strip must be false")
    return functions(library)


def of_variant(compiled: list[Function], variant: str) -> list[Function]:
    found = [each for each in compiled if each.source == f"kernels_{variant}.cpp"]
    assert found, f"the library has no {variant} kernels; the compiler lacks their flags"
    return found


def loops(compiled: list[Function], variant: str, *names: str) -> list[Loop]:
    of_names = [each for each in of_variant(compiled, variant) if each.name.startswith(names or "")]
    return [loop for function in of_names for loop in function.hot_loops()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_hot_loops_have_the_variant_s_dot_product(compiled: list[Function], variant: str) -> None:
    dot, _ = VARIANTS[variant]
    kernels = (FEW_UP, FEW_DOWN) if variant == "amx" else (FEW_UP, FEW_DOWN, MANY)
    for kernel in kernels:
        hot = loops(compiled, variant, kernel)
        assert len(hot) >= 4, f"{variant} has {len(hot)} loops with dot products in {kernel}"
        assert [loop.function.name for loop in hot if not loop.all_of(dot)] == []
    if variant == "amx":
        tiles = [loop for loop in loops(compiled, variant) if loop.all_of(r"^tdp")]
        assert any(loop.all_of("^tdpbusd") for loop in tiles)
        assert any(loop.all_of("^tdpbssd") for loop in tiles)
        # Four tiles of sums for each that is loaded; more loads than products would wait for memory.
        assert all(len(loop.all_of("^tdp")) >= 4 for loop in tiles)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_instruction_is_one_that_such_a_cpu_lacks(compiled: list[Function], variant: str) -> None:
    _, foreign = VARIANTS[variant]
    found = {
        f"{function.name}: {instruction}"
        for function in of_variant(compiled, variant)
        for instruction in function.text
        if re.search(foreign, instruction)
    }
    assert found == set()


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_fetched_ahead(compiled: list[Function], variant: str) -> None:
    bare = [loop.function.name for loop in loops(compiled, variant, FEW_UP) if not loop.all_of("^prefetcht0")]
    assert bare == [], "loops that read packed weights and look not ahead"
    deaf = [
        each.name
        for each in of_variant(compiled, variant)
        if each.name.startswith(DECODING) and not any(text.startswith("prefetcht0") for text in each.text)
    ]
    assert deaf == [], "kernels that decode weights for many tokens and look not ahead"
    few = [each for each in of_variant(compiled, variant) if each.name.startswith((FEW_UP, FEW_DOWN))]
    without = [each.name for each in few if not any(text.startswith("prefetcht1") for text in each.text)]
    assert without == [], "kernels that fetch nothing for the phase after theirs"


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_stay_in_registers(compiled: list[Function], variant: str) -> None:
    spilled = {
        (loop.function.name, len(places))
        for loop in loops(compiled, variant)
        if (places := loop.spilled_sums())
        and len(places) > SPILLED[variant].get(loop.function.name.partition("<")[0], 0)
    }
    assert spilled == set(), "kernels with so many sums on the stack, which each pass of the loop reads and writes"


LISTING = """
0000000000000010 <f>:
  10:\tpush   %rbp
  11:\tvmovdqu (%rdi),%ymm0
  15:\tprefetcht0 0x1000(%rdi)
  1a:\tvpmaddwd (%rsi),%ymm0,%ymm1
  20:\tvpaddd {sum},%ymm1,%ymm1
  28:\tvmovdqa %ymm1,{sum}
  30:\tvmovdqa %ymm0,0x60(%rsp)
  38:\tvpaddd 0x60(%rsp),%ymm2,%ymm2
  40:\tadd    $0x40,%rdi
  44:\tjne    11 <f+0x1>
  46:\tjmp    10 <f>
  48:\tret
"""
TABLE = """
0000000000000000 l    df *ABS*\t0000000000000000 kernels_avx2.cpp
0000000000000010 l     F .text\t0000000000000039 void (anonymous namespace)::f<(anonymous namespace)::Avx2, 4>(int)
0000000000000060 g     F .text\t0000000000000004 exported
"""


@pytest.mark.parametrize(("place", "spilled"), [("0x40(%rsp)", {"0x40(%rsp)"}), ("-0x20(%rbp)", set())])
def test_the_test_sees_a_loop_and_a_sum_on_the_stack(place: str, spilled: set[str]) -> None:
    (function,) = parse(TABLE, LISTING.format(sum=place))
    assert (function.source, function.name) == ("kernels_avx2.cpp", "f<Avx2, 4>")
    (loop,) = function.hot_loops()
    assert loop.text[0].startswith("vmovdqu")
    assert loop.text[-1].startswith("jne")
    # What is written before it is read lives in one pass only.
    assert loop.spilled_sums() == spilled
    # With a frame pointer, that register reaches the stack, too.
    framed = LISTING.format(sum=place).replace("push   %rbp", "mov    %rsp,%rbp")
    assert parse(TABLE, framed)[0].hot_loops()[0].spilled_sums() == {place}
