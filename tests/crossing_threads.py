"""Two calls of one model in two threads, of which the second comes in the middle of the first."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import nn


def crossed_by(module: nn.Module, first: Callable[[], object], second: Callable[[], object], *, stays: bool) -> tuple:
    """What both return. module: which each of them calls once, and where they meet.

    stays: whether the second waits at the module until the first is over; else the first waits until the second is.
    """
    main, inside, over = threading.current_thread(), threading.Event(), threading.Event()
    begun = []

    def meet(*_):
        if threading.current_thread() is main:
            begun.append(pool.submit(second))
            if stays:
                assert inside.wait(60)
            else:
                begun[0].result(60)
        elif stays:
            inside.set()
            assert over.wait(60)

    hook = module.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(1) as pool:
        try:
            one = first()
        finally:
            over.set()
        other = begun[0].result()
    hook.remove()
    return one, other
