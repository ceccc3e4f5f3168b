"""What machine code says of a kernel: every access to global memory, where it comes from, how many are in flight.

NVIDIA: SASS as ``nvdisasm -c -gi`` prints it. AMD: the assembly that Triton keeps. Both carry the source lines, those
of inlined functions included, so an access is known by the pointer that the line names.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

#: Functions that read or write per-channel values and workspaces: a few kilobytes a program, not the tensors.
COLD = {
    "_alone", "_channel_values", "_chunk_of", "_gradient_totals", "_merge", "_origin", "_save_counts", "_save_record",
    "_save_statistics", "_save_sums", "_saved", "_store_sum", "_store_tally", "_total",
}  # fmt: skip
#: Functions that read or write the mask: a byte for eight elements.
MASK = {"_load_bits", "_store_bits"}


@dataclass(frozen=True)
class Access:
    """One load or store of global memory: ``width`` bytes a thread; ``kind`` is "tensor", "mask" or "other"."""

    store: bool
    width: int
    kind: str
    line: int  # of the machine code
    registers: frozenset[str]  # that a load fills


@dataclass(frozen=True)
class Code:
    """One kernel's machine code.

    ``in_flight``: loads of tensors that are issued before the first of their results is used, the most in any loop; for
    code without a loop that loads, in all of it. Copies to shared memory (cp.async) are used by the wait for them.
    ``bytes_in_flight``: of a thread.
    """

    accesses: tuple[Access, ...]
    spills: int  # instructions that move registers to or from local memory
    in_flight: int
    bytes_in_flight: int

    def widths(self, store: bool, kind: str = "tensor") -> list[int]:
        return sorted({a.width for a in self.accesses if a.store == store and a.kind == kind})


@functools.cache
def _source(path: str) -> tuple[list[str], dict[int, str], dict[int, str]]:
    """Lines of a file; line → the function that it is in; line → the whole simple statement that it is in."""
    text = Path(path).read_text()
    lines = text.splitlines()
    functions, statements = {}, {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                functions[line] = node.name
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return)):
            whole = " ".join(lines[node.lineno - 1 : node.end_lineno])
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                statements[line] = whole
    return lines, functions, statements


_NAME = re.compile(r"\b([a-z_]+)_ptr\b")
_BASE = re.compile(r"\bbase\b")  # of a tensor whose address comes from a table
_TENSORS = {"x", "residual", "source", "dy", "y", "dx", "dresidual", "mask"}  # source: x or residual


def kind_of(frames: Iterable[tuple[str, int]]) -> str:
    """ "tensor", "mask" or "other", from the source lines of an access, the innermost first."""
    frames = [(path, line) for path, line in frames if Path(path).exists() and line > 0]
    names = [_source(path)[1].get(line, "") for path, line in frames]
    if COLD & set(names):
        return "other"
    if MASK & set(names):
        return "mask"
    for path, line in frames:
        statement = _source(path)[2].get(line, "")
        found = set(_NAME.findall(statement))
        if found == {"mask"}:
            return "mask"
        if found:
            return "tensor" if found & _TENSORS else "other"
        if _BASE.search(statement):
            return "tensor"
    return "other"


# -- NVIDIA ------------------------------------------------------------------------------------------------------------

_SASS_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_SASS = re.compile(r"/\*[0-9a-f]+\*/\s+(@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def sass(text: str) -> Code:
    frames: list[tuple[str, int]] = []
    fresh = True
    instructions: list[tuple[str, str, bool, list[tuple[str, int]]]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith((".L_", ".text")) and line.rstrip().endswith(":"):
            labels[line.strip().rstrip(":")] = len(instructions)
        elif found := _SASS_LINE.search(line):
            if fresh:
                frames, fresh = [], False
            frames = [*frames, (found[1], int(found[2]))]
        elif found := _SASS.search(line):
            fresh = True
            instructions.append((found[2], found[3], bool(found[1]), frames))
    accesses, loops, spills = [], [], 0
    registers: list[frozenset[str]] = []
    jumps: set[int] = set()  # behind which the code goes on elsewhere
    groups: list[int] = []  # where a group of copies ends
    waits: dict[int, int] = {}  # where copies are waited for: how many groups may still be under way
    for i, (opcode, operands, guarded, where) in enumerate(instructions):
        base, *modifiers = opcode.split(".")
        registers.append(frozenset(re.findall(r"\bR\d+\b", operands)))
        if base in ("LDG", "STG"):
            width = next((_SASS_WIDTH[m] for m in modifiers if m in _SASS_WIDTH), 4)
            filled: frozenset[str] = frozenset()
            if base == "LDG":
                target = re.match(r"R(\d+)", operands)
                first = int(target[1]) if target else 0
                filled = frozenset(f"R{n}" for n in range(first, first + max(width // 4, 1)))
            accesses.append(Access(base == "STG", width, kind_of(where), i, filled))
        elif base == "LDGSTS":
            width = next((_SASS_WIDTH[m] for m in modifiers if m in _SASS_WIDTH), 4)
            accesses.append(Access(False, width, kind_of(where), i, frozenset({"copy"})))
        elif base == "LDGDEPBAR":
            groups.append(i)
        elif base == "DEPBAR" and (pending := re.search(r"SB0, (0x[0-9a-f]+)", operands)):
            waits[i] = int(pending[1], 16)
        elif base in ("LDL", "STL"):
            spills += 1
        elif base == "BRA" and (label := re.search(r"\(?(\.L_\w+)", operands)):
            start = labels.get(label[1], i)
            if start < i:
                loops.append((start, i))
            elif not guarded:
                jumps.add(i)
    code = _code(accesses, registers, loops, jumps, spills)
    copied = max((_copies_in_flight(code, groups, waits, *loop) for loop in loops), default=(0, 0))
    if copied[1] > code.bytes_in_flight:
        code = replace(code, bytes_in_flight=copied[1], in_flight=copied[0])
    return code


def _copies_in_flight(code: Code, groups: list[int], waits: dict[int, int], start: int, end: int) -> tuple[int, int]:
    """(how many, bytes) of copies to shared memory at once: the groups that a wait lets be, and one turn of a loop."""
    inside = [a for a in code.accesses if "copy" in a.registers and a.kind == "tensor" and start <= a.line <= end]
    turn = sum(start <= place <= end for place in groups)
    pending = max((n for place, n in waits.items() if start <= place <= end), default=0)
    turns = (pending + turn) / turn if turn else 1
    return round(len(inside) * turns), round(sum(a.width for a in inside) * turns)


# -- AMD ---------------------------------------------------------------------------------------------------------------

_GCN_LINE = re.compile(r"^\s*\.loc\s.*;\s*(.*)$")
_GCN_PLACE = re.compile(r"([\w./-]+\.py):(\d+)")
_GCN_ACCESS = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)\s+(.*)$")
_GCN_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


def _gcn_registers(operands: str) -> frozenset[str]:
    found = set(re.findall(r"\bv\d+\b", operands))
    for first, last in re.findall(r"\bv\[(\d+):(\d+)\]", operands):
        found |= {f"v{n}" for n in range(int(first), int(last) + 1)}
    return frozenset(found)


def amdgcn(text: str, folder: Path) -> Code:
    """``folder``: where the files lie that the assembly names without one."""
    frames: list[tuple[str, int]] = []
    accesses, loops, jumps, spills, labels = [], [], set(), 0, {}
    registers: list[frozenset[str]] = []
    for line in text.splitlines():
        if found := _GCN_LINE.match(line):
            frames = [(str(folder / Path(path).name), int(n)) for path, n in _GCN_PLACE.findall(found[1])]
            continue
        if found := re.match(r"^(\.L\w+):", line):
            labels[found[1]] = len(registers)
            continue
        if not re.match(r"^\s+[a-z]\w+", line):
            continue
        i = len(registers)
        registers.append(_gcn_registers(line))
        if found := _GCN_ACCESS.match(line):
            width = _GCN_WIDTH.get(found[2].split("_")[0], 4)
            filled = _gcn_registers(found[3].split(",")[0]) if found[1] == "load" else frozenset()
            accesses.append(Access(found[1] == "store", width, kind_of(frames), i, filled))
        elif re.match(r"^\s+scratch_", line):
            spills += 1
        elif (found := re.match(r"^\s+s_c?branch\w*\s+(\.L\w+)", line)) and found[1] in labels:
            loops.append((labels[found[1]], i))
        elif re.match(r"^\s+s_branch\s", line):
            jumps.add(i)
    return _code(accesses, registers, loops, jumps, spills)


# -- both --------------------------------------------------------------------------------------------------------------


def _code(
    accesses: list[Access], registers: list[frozenset[str]], loops: list[tuple[int, int]], jumps: set[int], spills: int
) -> Code:
    loads = {a.line: a for a in accesses if not a.store and a.kind == "tensor" and "copy" not in a.registers}
    loading = [(start, end) for start, end in loops if any(start <= line <= end for line in loads)]
    regions = loading or [(0, len(registers) - 1)]
    count, size = max((_in_flight(loads, registers, jumps, *region) for region in regions), key=lambda most: most[1])
    return Code(tuple(accesses), spills, count, size)


def _in_flight(
    loads: dict[int, Access], registers: list[frozenset[str]], jumps: set[int], start: int, end: int
) -> tuple[int, int]:
    """(how many loads, their bytes), where the bytes are most. Arms of a branch do not add up."""
    waiting: list[Access] = []
    most = (0, 0)
    for i in range(start, end + 1):
        if i in loads:
            waiting.append(loads[i])
            most = max(most, (len(waiting), sum(a.width for a in waiting)), key=lambda pair: pair[1])
        elif i in jumps:
            waiting = []
        else:
            waiting = [a for a in waiting if not a.registers & registers[i]]
    return most
