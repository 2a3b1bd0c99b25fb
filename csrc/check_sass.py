"""Reads the machine code of compiled kernels: no local memory anywhere, HGMMA in files with matrix products.

    python check_sass.py --build FOLDER_OF_CUBINS a.cu b.cu

A disassembler is needed: `nvdisasm` of the CUDA toolkit, or `pip install nvidia-cuda-nvdisasm`. Exit code 2 without.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

GEMM_MARK = "MVL_GEMM_KERNEL"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
KERNEL = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.MULTILINE)


def find_disassembler() -> str | None:
    """Path of nvdisasm: on PATH, in the toolkit, or in an installed wheel."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    homes += [path for place in sys.path for path in Path(place).glob("nvidia/*") if path.is_dir()]
    for home in homes:
        if (home / "bin" / "nvdisasm").is_file():
            return str(home / "bin" / "nvdisasm")
    return None


def kernels(listing: str) -> Iterator[tuple[str, list[str]]]:
    """(mangled name, opcodes) of every kernel of a listing."""
    starts = [(match.start(), match.group(1)) for match in KERNEL.finditer(listing)]
    for (start, name), (end, _) in zip(starts, [*starts[1:], (len(listing), "")]):
        yield name, INSTRUCTION.findall(listing[start:end])


def problems(source: str, is_gemm: bool, listing: str) -> list[str]:
    """What is wrong with the machine code of one file."""
    wrong, opcodes = [], []
    for name, found in kernels(listing):
        opcodes += found
        local = sum(op in ("LDL", "STL") for op in found)
        if local:
            wrong.append(
                f"{source}: {name}: {local} local-memory accesses (LDL, STL); an array or a spill is there"
            )
        if not found:
            wrong.append(f"{source}: {name}: no instruction could be read")
    if is_gemm and "HGMMA" not in opcodes:
        wrong.append(f"{source}: declares {GEMM_MARK} but has no HGMMA: its products are on a slower path")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """0: as meant. 1: something is wrong. 2: no disassembler."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="folder of the cubins")
    parser.add_argument("sources", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    tool = find_disassembler()
    if tool is None:
        print(
            "csrc: compiled without spills, but no disassembler was found: the machine code is not checked; install "
            "nvdisasm of the CUDA toolkit, or: pip install nvidia-cuda-nvdisasm",
            file=sys.stderr,
        )
        return 2
    wrong = []
    for source in given.sources:
        cubin = given.build / f"{source.stem}.cubin"
        listing = subprocess.run([tool, str(cubin)], check=True, capture_output=True, text=True).stdout
        is_gemm = GEMM_MARK in source.read_text(encoding="utf-8")
        wrong += problems(source.name, is_gemm, listing)
        names = [name for name, _ in kernels(listing)]
        print(f"{source.name}: {len(names)} kernels{', HGMMA' if 'HGMMA' in listing else ''}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
