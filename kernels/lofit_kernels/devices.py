"""What a device can do: whether Triton's kernels are made for it. A device is asked once, and never at import."""

from functools import lru_cache

import torch

# the first compute capability that the tiles serve: older ones have neither bfloat16 nor asynchronous copies
FIRST_CAPABILITY = (8, 0)
# of AMD's, those with the matrix instructions that the tiles were chosen for
AMD = ("gfx90a", "gfx942", "gfx950")


def unserved(device: torch.device) -> str | None:
    """Why no Triton kernel serves a CUDA (or ROCm) device; None where one does, and for every other kind of device.

    A CUDA device that is only imagined, as by FakeTensorMode on a machine without one, counts as served.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _unserved(torch.cuda.current_device() if device.index is None else device.index)


# torch.compiler.assume_constant_result, which would import the compiler together with this package
unserved._dynamo_marked_constant = True


@lru_cache(maxsize=64)
def _unserved(index: int) -> str | None:
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        if name in AMD:
            return None
        return f"no Triton tiles for {name}; expected an AMD Instinct accelerator ({', '.join(AMD)})"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= FIRST_CAPABILITY:
        return None
    first = ".".join(map(str, FIRST_CAPABILITY))
    return f"no Triton tiles for compute capability {major}.{minor}; expected {first} or newer"
