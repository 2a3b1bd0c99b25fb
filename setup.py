"""Package metadata of megatron_vl: what it needs, and what is optional.

Versions are ranges here; the one exact torch version used on CPU machines stands in
``constraints-cpu.txt``.  CONTRIBUTING.md gives the reason for every dependency.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

CORE = [
    "megatron-core==0.16.1",
    "torch>=2.11",
    "numpy>=2",
    "pillow>=10.1",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "tensorstore",
    "psutil",
]
# Exact: another version may judge an answer differently, which would change rewards in the middle of a run.
RL = ["math-verify==0.9.0", "shapely>=2.1", "matplotlib"]
CURATE, PARQUET = ["opencv-python-headless>=5"], ["pyarrow>=15"]
TEST = ["pytest>=8", "transformers>=4.51", *RL, *CURATE, *PARQUET]
EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=2.4"],
    # The PyTorch part of Transformer Engine is compiled on the machine against its CUDA torch, so this
    # extra is for GPU machines only: with it present and no GPU, `import megatron.core` fails.
    "cuda": ["transformer-engine[core_cu13,pytorch]==2.11.0"],
    "rl": RL,
    "curate": CURATE,
    "parquet": PARQUET,
    "csrc": ["nvidia-cuda-nvdisasm>=13"],
    "test": TEST,
    "dev": TEST + ["ruff"],
}


def version() -> str:
    """``__version__`` of the package, read as text because importing it would need its dependencies."""
    text = (ROOT / "megatron_vl" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_vl/__init__.py has no line __version__ = "..."')
    return found.group(1)


def long_description() -> str:
    """The README, or nothing where a partial checkout has none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megatron-vl",
    version=version(),
    description="Training of STEP3-VL-class vision-language models on Megatron-Core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_vl", "megatron_vl.*"]),
    package_data={"megatron_vl": ["**/*.yaml", "**/*.jinja", "**/*.json"]},
    python_requires=">=3.11,<3.13",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-vl=megatron_vl.__main__:main"]},
)
