"""Process groups, devices, seeds, and Megatron-Core on CPU.

Importing it first keeps Megatron-Core's warnings about absent accelerators off every rank's console: what is in use
is printed once, in the start-up report.
"""

import warnings

for _message in (
    r".*[Tt]ransformer.?[Ee]ngine.*",
    r".*Apex.*",
    r".*torch.distributed.*is deprecated.*",
    r".*\.grad attribute of a Tensor that is not a leaf.*",
    r".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    r".*multi_tensor_applier.*",
    r".*full scope is deprecated.*",
):
    warnings.filterwarnings("ignore", message=_message)
del _message
