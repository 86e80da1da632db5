"""Runs the kernels' tests under ttsem: out-of-bounds accesses and races, found in the compiled IR without a GPU.

    python -m tests.proof.sanitize [pytest options]

ttsem compiles each launch with Triton's own front end for sm_90 and executes the IR (TTIR) on the CPU. It sees bfloat16
as it is compiled, unlike the interpreter; it does not see what the compiler makes of the IR afterwards. `make sanitize`
puts it into a folder of its own and calls this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

KERNELS = ("offset", "affine", "linear_forward", "linear_backward", "projection")
FILES = ("tests/proof/sanitized.py", *(f"tests/kernels/gpu/test_{name}.py" for name in KERNELS))
# ttsem adds the products of a float32 dot one after the other, in one chain: over 512 columns and more further from
# float64 than twice PyTorch on a CPU, which adds in blocks. The same chain in PyTorch has the same four errors to four
# digits, so nothing else is wrong with them; in the interpreter these pass. How a GPU adds them has not been seen
_SUMS = tuple(
    f"tests/kernels/gpu/test_linear_forward.py::test_linear_matches_float64[{shape}-True-torch.float32-{form}]"
    for shape in ("7-100-128-all-plain", "9-30-256-one-padded")
    for form in ("delta_linear", "prologue_linear")
)
_FUSED = "tests/kernels/gpu/test_projection.py::test_projection_with_fused_products"
LEFT_OUT = (
    *_SUMS,
    # float32 as well, just beyond the rule; thought to have the same cause, not tried like the four
    f"{_FUSED}_matches_the_reference[delta-offsets everywhere, bias-torch.float32]",
    # torch.compile asks for a PyTorch built with CUDA
    f"{_FUSED}_compiles_whole",
)


def main(arguments: Sequence[str]) -> int:
    if find_spec("ttsem") is None:
        print("ttsem is not installed: make sanitize")
        return 2
    from ttsem.sanitize import run_pytest

    print(f"left out: {len(LEFT_OUT)} tests (why: {__spec__.name})")
    # the rows that the ordinary run leaves out too
    options = ["-q", "-p", "no:cacheprovider", "-m", "slow or not slow", *(f"--deselect={name}" for name in LEFT_OUT)]
    return run_pytest([*options, *(arguments or FILES)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
