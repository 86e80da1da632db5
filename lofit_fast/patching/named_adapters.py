"""Several adapters on one model, by name: the handle's own, and others beside it whose offsets are rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lofit_fast.config import LofitConfig, shown
from lofit_fast.patching.adapter_sources import read_source
from lofit_fast.patching.architectures import Fingerprint, Projection
from lofit_fast.patching.chosen_adapters import Chosen
from lofit_fast.patching.hub_adapters import adapter_folder
from lofit_fast.patching.layer import LofitLinear
from lofit_fast.patching.offset_table import BASE, OWN, OffsetTable
from lofit_fast.patching.one_at_a_time import CHANGING, one_at_a_time
from lofit_fast.patching.placement import device_of, dtype_of
from lofit_fast.patching.scopes import Scopes
from lofit_fast.patching.sharding import check_unshared
from lofit_fast.patching.storage import Adapter, check_finite, check_fits, fill
from lofit_fast.patching.weight_sample import base_digest, base_name, check_base
from lofit_fast.patching.wrapping import around_module, build_layers

if TYPE_CHECKING:
    from lofit_fast.patching.acting import Acting
    from lofit_fast.patching.watches import Watches

FIRST = "default"
# what set_active(None) chooses
_BASE_EVERYWHERE = Chosen([BASE], set(), BASE + 1, whole=True, device="cpu")
# families whose tensors are (S, B, K): a row of a batch is no row there
_SEQUENCE_FIRST = ("fsmt",)
_ONE_AT_A_TIME = "scales are one adapter at a time: rows of a table hold offsets alone"


@dataclass(frozen=True)
class Named:
    """An adapter beside the handle's own.

    slot: its row in the tables. trained: whether its vectors may move. everywhere: itself chosen for all rows.
    """

    slot: int
    config: LofitConfig
    trained: bool
    everywhere: Chosen


class SeveralAdapters:
    """What a handle knows of named adapters. Mixed into `LofitHandle`, whose fields it uses.

    Which adapter is active is a matter of each thread, or task of an event loop: a thread begins with the handle's own.
    """

    model: nn.Module
    config: LofitConfig
    projections: list[Projection]
    fingerprint: Fingerprint
    layers: dict[int, LofitLinear]
    watches: Watches | None
    # the handle's own adapter's name; the others by name
    own_name: str
    _others: dict[str, Named]
    _live: bool
    _merged: bool

    @property
    def scopes(self) -> Scopes:
        """What the layers share of who is in which scope."""
        return next(iter(self.layers.values())).scopes

    @property
    def acting(self) -> Acting | None:
        """What the layers share of where their vectors act; None where that is everywhere."""
        return next(iter(self.layers.values())).acting

    def check_live(self) -> None:
        """Raise ValueError when the handle has ended."""
        if not self._live:
            raise ValueError("this handle has ended: its model was unpatched or merged")

    def check_unmerged(self) -> None:
        """Raise ValueError when the handle was merged: its base has the vectors already, and would have them twice."""
        if self._merged:
            raise ValueError(
                "this handle has ended: merge() has written its vectors into the base, which would have them twice "
                "with an adapter folder of them. Expected save, push_to_hub and adapter before merge"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names there are, the handle's own first."""
        return (self.own_name, *self._others)

    @property
    def active(self) -> str | None:
        """The adapter that forwards have here; None for the base. What `rows` and `disabled` say comes before it."""
        chosen = self.scopes.for_good()
        if chosen is None:
            return self.own_name
        return next((name for name, other in self._others.items() if {other.slot} == chosen.slots), None)

    @property
    def rows_differ(self) -> bool:
        """Whether a scope of `rows` is around here."""
        chosen = self.scopes.said().chosen
        return chosen is not None and not chosen.whole

    @one_at_a_time
    def add(
        self,
        name: str,
        source: Path | str | LofitConfig | Adapter,
        *,
        trained: bool | None = None,
        strict: bool = False,
    ) -> None:
        """Put one more adapter beside those that are there; which one is active stays as it is.

        name: a new one. source: an adapter folder or a hub id, as of `lofit_fast.load`; what was read of one; or a
        LofitConfig for vectors drawn from its seed. trained: whether its vectors are parameters that may be trained,
        `parameters(name)`; by default those of a config are. Others are folded once, and cost nothing but their rows
        until they are used. strict: as of `lofit_fast.load`.
        Raises TypeError for a name that is no text, ValueError for one that is taken, scales (of the handle's own too),
        vectors that act on other positions, an adapter or heads of another model, and a sharded model;
        FileNotFoundError or ValueError for a folder that is no whole adapter. Nothing is changed then.
        """
        self.check_live()
        if not isinstance(name, str) or not name:
            raise TypeError(f"expected the name of an adapter, got {shown(name)}")
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already: got {shown(list(self.adapters))}; remove it first")
        config, adapter = (source, None) if isinstance(source, LofitConfig) else self._read(source, strict)
        self._check_offsets_alone(config, f"add {name!r}")
        if config.positions != self.config.positions:
            raise ValueError(
                f"cannot add {name!r}: its vectors have positions={config.positions!r}, expected those of the handle, "
                f"{self.config.positions!r}"
            )
        check_unshared(self.model, f"add {name!r} to")
        if adapter is not None:
            check_fits(adapter, self.fingerprint)
            where = f"the adapter {name}" if isinstance(source, Adapter) else f"the adapter in {source}"
            check_base(self.model, adapter.base_digest, where, adapter.base_model, strict)
        made = build_layers(self.model, config, self.projections)
        if adapter is not None:
            fill({("offset", number): layer.offset for number, layer in made.items()}, adapter)
        taken = {other.slot for other in self._others.values()}
        slot = next(slot for slot in range(OWN + 1, len(taken) + OWN + 2) if slot not in taken)
        trained = adapter is None if trained is None else trained
        for number, layer in made.items():
            if number not in self.layers:
                self._wrap(number)
            self._table_of(number).put(slot, layer.offset, layer.heads("offset"), trained)
        everywhere = Chosen([slot], {slot} if trained else set(), slot + 1, whole=True, device=self._device())
        self._others[name] = Named(slot, config, trained, everywhere)
        self._fold_tables()

    @one_at_a_time
    def remove(self, name: str) -> None:
        """Take an adapter out again.

        Raises ValueError for a name that is not there, the handle's own (unpatch ends it), and one that is active, or
        in a scope of `rows`, in any thread or task.
        """
        self.check_live()
        other = self._named(name)
        if other is None:
            raise ValueError(f"cannot remove {name!r}: it is the handle's own adapter, which handle.unpatch() ends")
        if any(other.slot in chosen.slots for chosen in self.scopes.choices()):
            raise ValueError(
                f"cannot remove {name!r}: it is active, or in a scope of handle.rows(), here or in another thread or "
                "task: set another one active there first"
            )
        del self._others[name]
        for layer in self.layers.values():
            if layer.others is not None:
                layer.others.drop(other.slot)
        self._fold_tables()

    def set_active(self, name: str | None) -> None:
        """Have forwards of this thread, or task, compute with an adapter from now on; None for the base.

        What was folded when it was added is looked up: no product, and nothing for a compiler to do anew. Others go on
        with theirs, and a thread that is started begins with the handle's own. Scopes of `rows` and `disabled` count
        before it. Raises ValueError, naming the adapters there are, for any other name.
        """
        self.check_live()
        with CHANGING:
            if name is None:
                self.scopes.choose(_BASE_EVERYWHERE)
                return
            other = self._named(name)
            if other is not None:
                # what a model that is compiled whole would not look for
                self._fold_tables()
            self.scopes.choose(None if other is None else other.everywhere)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """A scope in which each row of a batch has an adapter of its own, in forwards, generation and training.

        names: one for each row of the batches inside, None for the base. It holds in the thread, or task, that has
        entered it; `disabled` inside or around it is the base for all rows. In transformers' generate a name may be
        given for each prompt: its beams and returned sequences have it too. Gradients reach the vectors of adapters
        that are trained, each from its own rows.
        Raises TypeError for what is no list, one name say; ValueError for a name that is not there, no names, a handle
        with scales, and a model that is sharded or has its batch in the second dimension; and in the forward for a
        batch of another number of rows.
        """
        self.check_live()
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"expected a list of names, one for each row of a batch, got {shown(names)}")
        if not names:
            raise ValueError("expected the name of an adapter, or None, for each row of a batch, got no names")
        self._check_offsets_alone(self.config, "give rows adapters of their own")
        check_unshared(self.model, "give rows adapters of their own in")
        family = getattr(getattr(self.model, "config", None), "model_type", None)
        if family in _SEQUENCE_FIRST:
            raise ValueError(f"cannot give rows adapters of their own: {family} has its batch in the second dimension")
        with CHANGING:
            slots = [self._slot(name) for name in names]
            for number in self.layers:
                self._table_of(number)
            self._fold_tables()
            trained = {OWN, *(other.slot for other in self._others.values() if other.trained)}
            chosen = Chosen(slots, trained, self._room(), whole=False, device=self._device())
            scope = self.scopes.choosing(chosen)
            scope.__enter__()
        try:
            yield
        finally:
            scope.__exit__(None, None, None)

    def other_vectors(self, name: str) -> dict[int, nn.Parameter | Tensor]:
        """The offsets (h, D) of an adapter beside the handle's own, by layer."""
        slot = self._named(name).slot
        tables = {number: layer.others for number, layer in self.layers.items() if layer.others is not None}
        return {number: found[0] for number, table in tables.items() if (found := table.vectors(slot)) is not None}

    def other_adapter(self, name: str) -> Adapter:
        """What `save` writes of an adapter beside the handle's own."""
        vectors = self.other_vectors(name)
        modules = {p.layer: p.name.removeprefix("base_model.model.") for p in self.projections if p.layer in vectors}
        tensors = {("offset", number): offset for number, offset in vectors.items()}
        base = base_name(self.model), modules, base_digest(self.model)
        return Adapter(self._named(name).config, tensors, self.fingerprint, *base)

    def layers_with(self, name: str | None, action: str) -> dict[int, LofitLinear]:
        """Layers as the model would have with an adapter alone, by ascending layer; not in the model but for its own.

        Raises ValueError for the base. action: what it is for.
        """
        if name is None:
            raise ValueError(f"cannot {action}: the base is active (set_active(None)), set an adapter active first")
        if (other := self._named(name)) is None:
            return {number: layer for number, layer in self.layers.items() if any(True for _ in own_vectors(layer))}
        made = build_layers(self.model, other.config, self.projections)
        for number, layer in made.items():
            layer.inner = self.layers[number].inner
        fill({("offset", number): layer.offset for number, layer in made.items()}, self.other_adapter(name))
        return made

    def check_own(self, action: str) -> None:
        """Raise ValueError where another adapter than the handle's own is active here. action: what it is for."""
        if (active := self.active) != self.own_name:
            raise ValueError(
                f"cannot {action} while {active!r} is active: it is of the handle's own adapter {self.own_name!r}. "
                f"Call set_active({self.own_name!r}) first, or load that adapter's folder by itself"
            )

    def _read(self, source: Path | str | Adapter, strict: bool) -> tuple[LofitConfig, Adapter]:
        adapter = source
        if not isinstance(adapter, Adapter):
            adapter = read_source(adapter_folder(adapter), self.model, self.projections, self.fingerprint, strict)
            check_finite(adapter.tensors, f"the adapter in {source}")
        return adapter.config, adapter

    def _named(self, name: str) -> Named | None:
        """An adapter beside the handle's own; None for its own. Raises ValueError for a name that is not there."""
        if name != self.own_name and name not in self._others:
            raise ValueError(f"there is no adapter {shown(name)}, expected one of {shown(list(self.adapters))}")
        return self._others.get(name)

    def _slot(self, name: str | None) -> int:
        if name is None:
            return BASE
        return OWN if (other := self._named(name)) is None else other.slot

    def _room(self) -> int:
        """How many rows tables must have."""
        return max((OWN, *(other.slot for other in self._others.values()))) + 1

    def _device(self) -> torch.device:
        """Where the first table is."""
        return next(layer.others.spread.device for layer in self.layers.values() if layer.others is not None)

    def _check_offsets_alone(self, config: LofitConfig, action: str) -> None:
        if self.config.scale is not None or config.scale is not None:
            whose = "the handle's own adapter" if self.config.scale is not None else "it"
            raise ValueError(f"cannot {action}: {whose} has scales, and {_ONE_AT_A_TIME}")

    def _table_of(self, number: int) -> OffsetTable:
        """The table of a layer, made where there is none."""
        layer = self.layers[number]
        if layer.others is None:
            layer.others = OffsetTable(layer.n_heads, layer.head_dim, *self._place_of(number))
        return layer.others

    def _place_of(self, number: int) -> tuple[torch.device, torch.dtype]:
        """Where a layer's vectors are, and in what."""
        name = next(p.name for p in self.projections if p.layer == number)
        around = self.layers[number].inner, *around_module(self.model, name)
        return device_of(*around), torch.promote_types(dtype_of(*around), torch.float32)

    def _fold_tables(self) -> None:
        room = self._room()
        for layer in self.layers.values():
            layer.fold_table(room)

    def _wrap(self, number: int) -> None:
        """Put a layer without vectors of its own around a projection that the handle's own adapter leaves alone."""
        p = next(p for p in self.projections if p.layer == number)
        first = next(iter(self.layers.values()))
        # something may have wrapped it since the model was patched
        inner = getattr(p.parent, p.attribute)
        layer = LofitLinear(inner, p.n_heads, p.head_dim, None, None, around=list(around_module(self.model, p.name)))
        layer.acting, layer.scopes, layer.peft, layer.handle = self.acting, first.scopes, first.peft, self
        layer.training = inner.training
        self.watches.add(layer, p)
        self.layers = dict(sorted({**self.layers, number: layer}.items()))
        setattr(p.parent, p.attribute, layer)


def own_vectors(layer: LofitLinear) -> Iterator[nn.Parameter]:
    """The vectors of the handle's own adapter at a layer."""
    return (vectors for vectors in (layer.scale, layer.offset) if vectors is not None)
