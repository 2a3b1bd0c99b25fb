"""megatron_vl: training of STEP3-VL-class vision-language models on Megatron-Core.

Importing the package loads nothing but this version; every part is imported by its own path.
"""

__version__ = "0.1.0"
