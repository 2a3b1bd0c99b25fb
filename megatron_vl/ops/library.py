"""The library of fused kernels that ``csrc/`` builds: found, loaded once, never required.

Each operation of this package has a PyTorch form and one line that chooses between the two by ``uses_kernels``. Which
library: the file that ``MEGATRON_VL_OPS`` names, else what `make -C csrc` has built beside the package. Its kernels are
for Hopper (sm_90); its CPU form runs the same bodies, for tests and `parallel.fused_kernels=required` without a GPU. No
kernel of it has run on a GPU yet.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch

from megatron_vl.errors import ConfigError
from megatron_vl.plan.kernels import HOPPER, PACK_BYTES

KEY, VARIABLE = "parallel.fused_kernels", "MEGATRON_VL_OPS"
BUILD = Path(__file__).parents[2] / "csrc" / "build"
NAMES = ("libmegatron_vl_ops.so", "libmegatron_vl_ops_host.so")
# Modules that tell PyTorch shapes and gradients of the library's operators; imported when it is loaded.
DESCRIBED_IN = ("megatron_vl.ops.fused", "megatron_vl.ops.projector_fused")

_in_use: set[str] = set()  # device types whose tensors go through the kernels
_loaded: list[Path] = []


def find_library() -> Path | None:
    """The library of this installation, None where there is none.

    Raises:
        ConfigError: ``MEGATRON_VL_OPS`` names a file that does not exist.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise ConfigError(
                f"{VARIABLE} = {named}: no such file; build it with `make -C csrc`, or unset it"
            )
        return Path(named)
    return next((BUILD / name for name in NAMES if (BUILD / name).is_file()), None)


def load(path: Path) -> None:
    """Load the library and describe its operators to PyTorch. Operators exist once: a second one is not looked at.

    Raises:
        ConfigError: it does not load, or was built from other sources.
    """
    if _loaded:
        return
    try:
        torch.ops.load_library(path)
        for module in DESCRIBED_IN:
            importlib.import_module(module)
    except (OSError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be used ({error}); build it again with `make -C csrc`, against the torch that is installed"
        ) from error
    _loaded.append(path)


def why_not(device: torch.device) -> str | None:
    """Why tensors of ``device`` cannot go through the kernels here; None when they can, and the library is loaded."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != HOPPER:
        return f"the kernels are for compute capability 9.0, this device has {torch.cuda.get_device_capability(device)}"
    path = find_library()
    if path is None:
        build = "make -C csrc" if device.type == "cuda" else "make -C csrc host"
        return f"there is no library; run `{build}`, or name one in {VARIABLE}"
    load(path)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "megatron_vl::bias_quick_gelu", device.type.upper()
    ):
        return f"{path} was built for the CPU only; run `make -C csrc`"
    return None


def choose_kernels(choice: str, device: torch.device) -> str:
    """Carry out ``parallel.fused_kernels`` for ``device``; a few words for the start-up report.

    auto: used on Hopper GPUs where the library is built; a CPU keeps PyTorch's own kernels, which are faster there.

    Raises:
        ConfigError: required, and they cannot be used.
    """
    _in_use.discard(device.type)
    if choice == "never" or (choice == "auto" and device.type != "cuda"):
        return "not used"
    reason = why_not(device)
    if reason is None:
        _in_use.add(device.type)
        return "used"
    if choice == "required":
        raise ConfigError(f"{KEY} = required: {reason}; or set {KEY}=auto")
    return f"not used ({reason})"


def uses_kernels(x: torch.Tensor, channels: int, at_most: int | None = None) -> bool:
    """Whether an operation on ``x`` goes through its kernel.

    channels: values that lie together and belong to one thread's accesses, to be a multiple of 16 bytes. at_most: bytes
    of them that the kernel can hold.
    """
    return (
        x.device.type in _in_use
        and x.dtype in (torch.bfloat16, torch.float32)
        and channels * x.element_size() % PACK_BYTES == 0
        and (at_most is None or channels * x.element_size() <= at_most)
    )
