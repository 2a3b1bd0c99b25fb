"""`make -C csrc check`: what it compiles, and that it can fail."""

import importlib.util
import re
import shutil

import pytest

from tests.csrc.building import SOURCES, make, need

LISTING = """
	.section	.text.good_kernel,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
	.section	.text.other_kernel,"ax",@progbits
        /*0000*/                   {instruction} ;
"""
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) planted(const float* x, float* y) {
  float held[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = held[i] * held[63 - i];
}
"""
INDEXED = """
extern "C" __global__ void planted(const float* x, float* y, int n) {
  float held[32];
  for (int i = 0; i < 32; ++i) held[i] = x[i * n];
  y[threadIdx.x] = held[(threadIdx.x + n) % 32];
}
"""


@pytest.fixture(scope="module")
def checker():
    spec = importlib.util.spec_from_file_location("check_sass", SOURCES / "check_sass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("instruction", "is_gemm", "expected"),
    [
        ("STG.E.128 desc[UR4][R2.64], R4", False, None),
        ("LDL.64 R2, [R1+0x8]", False, "other_kernel: 1 local-memory accesses"),
        ("@P1 STL [R1], R3", False, "other_kernel: 1 local-memory accesses"),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", True, None),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", True, "has no HGMMA"),
    ],
)
def test_what_the_machine_code_may_hold(checker, instruction, is_gemm, expected):
    found = checker.problems("a.cu", is_gemm, LISTING.replace("{instruction}", instruction))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def test_a_machine_without_nvcc_is_told_so():
    need("make")
    done = make("check", "CUDA_HOME=/nowhere", "NVCC=nvcc-that-is-not-there", "BUILD=build/none")
    assert done.returncode != 0 and "csrc: no nvcc at nvcc-that-is-not-there: install" in done.stderr


def checked(sources, build, *arguments: str):
    """`make check`, with a skip where no disassembler is."""
    need("make", "nvcc")
    done = make("check", f"BUILD={build}", *arguments, sources=sources)
    if "no disassembler was found" in done.stderr:
        pytest.skip("compiled, but no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return done


def test_one_file_passes_the_gate(tmp_path):
    done = checked(SOURCES, tmp_path, "KERNELS=rotary.cu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rotary.cu: 4 kernels" in done.stdout


@pytest.mark.slow
def test_every_file_passes_the_gate(tmp_path):
    done = checked(SOURCES, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{path.name}: " in done.stdout for path in SOURCES.glob("*.cu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "message"), [(SPILLING, "[Ss]pill"), (INDEXED, "local-memory accesses")], ids=["spill", "index"]
)
def test_planted_faults_are_found(tmp_path, code, message):
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("build", "*.cu", "bind_*"))
    (sources / "planted.cu").write_text(code)
    done = checked(sources, tmp_path / "build")
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr), done.stdout + done.stderr
