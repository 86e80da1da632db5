"""LofitPeftConfig: what PEFT's adapters of LoFiT adapt, and what their folders are described by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig
from peft.utils import PeftType
from torch import Tensor

from lofit_fast.config import HeadSet, LofitConfig, shown
from lofit_fast.patching.seal import CONFIG_DIGEST, TENSOR_DIGEST, sealed, tensors_digest
from lofit_fast.patching.sharding import kind_of_part
from lofit_fast.patching.storage import FORMAT_VERSION, PEFT_TYPE, check_finite, description_in


@dataclass
class LofitPeftConfig(PeftConfig):
    """`LofitConfig` as a config of PEFT.

    scale, offset, init_std, seed: as of `LofitConfig`. modules_to_save: as of every PEFT method. The projections are
    found in the model: `target_modules` is filled in, not asked for. fingerprint, base_digest: shape and weights of the
    model that the adapter is for, once there is one. positions: "all", the only one that PEFT's models do.
    tensor_digest, config_digest: of the folder that the config was read from, until its tensors are loaded.
    Raises what `LofitConfig` raises, and ValueError for vectors that act on answers alone.
    """

    scale: HeadSet = None
    offset: HeadSet = None
    init_std: float = 1e-3
    seed: int = 42
    positions: str = field(default="all", repr=False)
    modules_to_save: list[str] | None = None
    target_modules: set[str] | None = field(default=None, repr=False)
    fingerprint: dict | None = field(default=None, repr=False)
    base_digest: str = field(default="", repr=False)
    format_version: int = field(default=FORMAT_VERSION, repr=False)
    tensor_digest: str | None = field(default=None, repr=False)
    config_digest: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOFIT
        config = self.heads()
        if config.positions != "all":
            raise ValueError(
                "vectors that act on answers alone (positions='answer') are not for models of PEFT, which do not find "
                "where an answer begins: use lofit_fast.load or lofit_fast.patch"
            )
        self.scale, self.offset = config.scale, config.offset
        if not isinstance(self.base_digest, str):
            raise ValueError(f"expected base_digest to be text, got {shown(self.base_digest)}")

    def heads(self) -> LofitConfig:
        """What is adapted, for `lofit_fast`."""
        return LofitConfig(self.scale, self.offset, self.init_std, self.seed, self.positions)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict:
        """The entries of a folder's config, or of the adapter that was last saved there, see `storage`.

        Raises ValueError for a folder that is damaged.
        """
        return description_in(Path(path_json_file).parent)

    def to_dict(self) -> dict:
        """What `adapter_config.json` holds: what `handle.save` writes, and PEFT's own entries."""
        ours = {"peft_type": PEFT_TYPE, "target_modules": None, "format_version": FORMAT_VERSION}
        entries = super().to_dict() | ours | {TENSOR_DIGEST: None, CONFIG_DIGEST: None}
        # once: the vectors may be others the next time
        digest = vars(self).pop("_to_be_written", None)
        return entries if digest is None else sealed(entries, digest)

    def expect_to_write(self, tensors: dict[tuple[str, int], Tensor]) -> None:
        """Take note of the tensors, by (component, layer), that PEFT writes beside what `to_dict` gives next."""
        whole = tensors and all(t.device.type != "meta" and kind_of_part(t) is None for t in tensors.values())
        self._to_be_written = tensors_digest(tensors) if whole else None

    def check_loaded(self, tensors: dict[tuple[str, int], Tensor]) -> None:
        """Raise ValueError unless tensors, by (component, layer), are finite, and those that the config came with."""
        check_finite(tensors, "cannot load the adapter")
        if self.tensor_digest is not None and self.tensor_digest != tensors_digest(tensors):
            raise ValueError(
                "cannot load the adapter: its tensors are damaged, or not those that its config was written with. If "
                "they are right, set tensor_digest of the LofitPeftConfig to None"
            )
        self.tensor_digest = self.config_digest = None
