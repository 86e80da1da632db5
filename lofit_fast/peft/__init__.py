"""LoFiT as a method of PEFT, for people whose stack is PEFT: importing this package registers it as peft_type LOFIT.

    import lofit_fast.peft
    model = peft.get_peft_model(model, lofit_fast.peft.LofitPeftConfig(offset=heads))

What is computed, drawn, merged and written is what `lofit_fast.patch` computes, draws, merges and writes.
"""

from lofit_fast.extras import needing

with needing("peft", "peft", "lofit_fast.peft"):
    from lofit_fast.peft.lofit_peft_config import LofitPeftConfig
    from lofit_fast.peft.lofit_peft_layer import LofitPeftLayer
    from lofit_fast.peft.lofit_peft_model import LofitModel
    from lofit_fast.peft.registration import register

__all__ = ["LofitModel", "LofitPeftConfig", "LofitPeftLayer"]

register()
