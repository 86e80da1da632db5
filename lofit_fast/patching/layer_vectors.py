"""Which parameters of a layer are its vectors, or what torch computes them from."""

from collections.abc import Iterator

from torch import nn

from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.stand_in import PARAMETRIZED


def named_vectors(layer: LofitLinear) -> Iterator[tuple[str, nn.Parameter]]:
    """(path, parameter) of each component: the vectors themselves, "offset", or what they are computed from.

    That is what torch's parametrize keeps, "parametrizations.offset.original", and prune and the older weight_norm,
    "offset_orig". Other parameters that somebody has put here are no vectors.
    """
    for component, heads in layer._heads.items():
        if heads is None:
            continue
        for name, parameter in layer._parameters.items():
            if parameter is not None and (name == component or name.startswith(f"{component}_")):
                yield name, parameter
        if is_parametrized(layer, component):
            path = f"{PARAMETRIZED}.{component}"
            yield from layer._modules[PARAMETRIZED][component].named_parameters(path)


def is_parametrized(layer: LofitLinear, component: str) -> bool:
    """Whether a component is computed by torch's parametrize in each forward."""
    return PARAMETRIZED in layer._modules and component in layer._modules[PARAMETRIZED]


def is_computed(layer: LofitLinear, component: str) -> bool:
    """Whether a component is computed from other parameters, so that nothing can be written into it."""
    from_own = any(name.startswith(f"{component}_") for name in layer._parameters)
    return from_own or is_parametrized(layer, component)
