"""Making LoFiT one of PEFT's methods, by the name LOFIT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from lofit_fast.patching.storage import PEFT_TYPE
from lofit_fast.peft.lofit_peft_config import LofitPeftConfig
from lofit_fast.peft.lofit_peft_model import LofitModel


def register() -> None:
    """Make LOFIT one of PEFT's types. A second time changes nothing."""
    if "LOFIT" not in PeftType.__members__:
        member = str.__new__(PeftType, "LOFIT")
        member._name_, member._value_, member._sort_order_ = "LOFIT", "LOFIT", len(PeftType)
        # an enumeration has no way to grow; these are the tables that it looks its members up in
        type.__setattr__(PeftType, "LOFIT", member)
        PeftType._member_names_.append("LOFIT")
        PeftType._member_map_["LOFIT"] = PeftType._value2member_map_["LOFIT"] = member
    if PeftType.LOFIT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="lofit", config_cls=LofitPeftConfig, model_cls=LofitModel)
    # of a module that is imported anew, the newest classes count; files hold the longer name
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOFIT] = PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = LofitPeftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOFIT] = LofitModel
