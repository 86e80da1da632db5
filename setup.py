"""Packages `lofit_kernels` (from kernels/) and `lofit_fast`."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lofit_fast" / "__init__.py").read_text()).group(1)

# accelerate is a need of transformers' Trainer
TRAIN = [
    "accelerate>=1.15",
    "datasets>=5.2",
    "gguf>=0.19",
    "matplotlib>=3.10",
    "pyarrow>=24",
    "rich>=14",
    "typer>=0.27",
]
GGUF = ["gguf>=0.19"]
PEFT = ["accelerate>=1.15", "peft>=0.21"]
BENCH = [*TRAIN, *PEFT, "psutil", "pytest-benchmark>=5.3"]
PREFERENCES = [*TRAIN, "trl>=1.16"]
QUANTIZED = [*TRAIN, "bitsandbytes>=0.50", "torchao>=0.18"]
SERVE = ["fastapi>=0.165", "pydantic>=2.14", "rich>=14", "typer>=0.27", "uvicorn>=0.54"]
TEST = [*BENCH, *PREFERENCES, *QUANTIZED, *SERVE, "httpx>=0.28", "hypothesis>=6.170"]
TEST += ["pytest>=9", "pytest-cov>=7", "pytest-timeout>=2.4", "pytest-xdist>=3.8"]
FLASH = ["flash-attn>=2.8"]
DEV = [*TEST, "import-linter>=2.17", "mypy==2.4.1", "pre-commit>=4", "ruff==0.17.6"]


class SameBytes(bdist_wheel):
    """A wheel whose files have one mode, whoever builds it: with SOURCE_DATE_EPOCH it is the same bytes each time."""

    def write_wheelfile(self, *args, **options):
        # the last that is done before the files are packed
        super().write_wheelfile(*args, **options)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


setup(
    cmdclass={"bdist_wheel": SameBytes},
    name="lofit-fast",
    version=VERSION,
    description="LoFiT, localized fine-tuning of attention heads: Triton kernels, a reversible patcher, fast training",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"lofit_kernels": "kernels/lofit_kernels", "lofit_fast": "lofit_fast"},
    packages=[
        *find_packages("kernels"),
        *find_packages(include=["lofit_fast", "lofit_fast.*"]),
    ],
    # type checkers read the annotations of a package that has this file
    package_data={"lofit_kernels": ["py.typed"], "lofit_fast": ["py.typed", "serving/page/*"]},
    include_package_data=False,
    # `make test-oldest` runs these very versions; tests/test_dependencies.py holds the list to what is imported
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "safetensors>=0.8",
        "huggingface_hub>=1.33",
        # transformers says which
        "numpy",
        "filelock>=3.20",
        "tqdm>=4.67",
    ],
    extras_require={
        "train": TRAIN,
        "bench": BENCH,
        "gguf": GGUF,
        "peft": PEFT,
        "preferences": PREFERENCES,
        "quantized": QUANTIZED,
        "flash": FLASH,
        "serve": SERVE,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["lofit-fast = lofit_fast.cli:main"]},
)
