"""The proof that stock code computes from an exported folder what the patched model computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lofit_fast.checksums import check_sums
from lofit_fast.extras import needing
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.export import merged_state
from lofit_fast.patching.fully_sharded import fully_sharded
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.modes import eval_mode
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.storage import COMPONENTS
from lofit_fast.patching.whole_copy import with_whole_copy

# largest difference of logits over their largest magnitude; a 16-bit folder holds weights rounded once more
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# how much of a tensor's change, and of a component's effect on the logits, may be rounding
_OF_A_TENSOR, _OF_THE_LOGITS = 0.1, 0.25
_NO_EFFECT = "Verify with inputs on which the adapter has an effect (tokens=...)"


@dataclass(frozen=True)
class ExportReport:
    """What `verify_export` saw: differences of logits, each the maximum over the maximum magnitude.

    difference: exported against patched. base_difference: the untouched base against patched, the adapter's effect.
    effects: the same for each component ("scale", "offset") that alone is left out. All are computed in float32 at
    least, whatever the folder holds.
    """

    difference: float
    base_difference: float
    tolerance: float
    effects: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def verify_export(
    handle: LofitHandle, folder: Path | str, tokens: Tensor | Mapping[str, Tensor] | None = None
) -> ExportReport:
    """Prove an exported folder: reload it with stock code, compare its tensors and logits with the patched model.

    tokens: (B, S) int64, or a mapping of all inputs that the model's forward takes, or None for 2 x 16 fixed random
    tokens. A model in 16 bits is compared through a float32 copy, since rounding in its forward would hide small
    adapters: that takes 8 bytes per parameter for the time being.
    Raises ValueError when a tensor or the logits differ by more than rounding; as inconclusive, when rounding hides
    the scales or the offsets; and inside `handle.disabled()` or `folded()`, where the model computes something else.
    """
    handle.check_live()
    if not handle.scopes.plain:
        raise ValueError("cannot verify inside handle.disabled() or handle.folded(): leave the scope first")
    if fully_sharded(handle.model):
        return with_whole_copy(handle, folder, lambda copy: verify_export(copy, folder, tokens))
    exported = check_export(handle, folder)
    dtype = next(iter(handle.layers.values())).inner.weight.dtype
    wrong = f"the exported model in {folder} does not compute what the patched one does"
    return _compared(handle, folder, tokens, lambda _: exported, dtype, wrong)


@torch.no_grad()
def verify_peft(
    handle: LofitHandle, folder: Path | str, tokens: Tensor | Mapping[str, Tensor] | None = None
) -> ExportReport:
    """Prove a folder of `export_peft`: stock PEFT loads it around a copy of the base, and the logits are compared.

    tokens: as of `verify_export`. Both are computed in float32 at least; the copy takes 4 bytes per parameter.
    Raises ValueError when the logits differ by more than rounding; as inconclusive, when the offsets hardly change
    them, or not at all; and inside `handle.disabled()` or `folded()`.
    """
    with needing("peft", "peft", "an adapter for PEFT"):
        from peft import PeftModel
    handle.check_live()
    if not handle.scopes.plain:
        raise ValueError("cannot verify inside handle.disabled() or handle.folded(): leave the scope first")

    def loaded(model: nn.Module) -> nn.Module:
        plain = handle_of(copy.deepcopy(model)).unpatch()
        with warnings.catch_warnings():
            # that PEFT cannot merge it
            warnings.simplefilter("ignore")
            stock = PeftModel.from_pretrained(plain, folder, trust_remote_code=False, use_safetensors=True)
        return stock.eval()

    # what PEFT adds is in float32, whatever the base is in
    dtype = torch.float64 if next(handle.model.parameters()).dtype == torch.float64 else torch.float32
    wrong = f"the adapter in {folder} does not compute in PEFT what the patched model does"
    return _compared(handle, folder, tokens, loaded, dtype, wrong)


def _compared(
    handle: LofitHandle,
    folder: Path | str,
    tokens: Tensor | Mapping[str, Tensor] | None,
    stock: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype,
    wrong: str,
) -> ExportReport:
    """The logits of a patched model beside those of what stock code makes of a folder.

    stock: what that is, given the patched model in float32 at least. dtype: to which the folder was rounded.
    Raises ValueError, which begins with `wrong`, for a difference, and as inconclusive where each component's effect is
    nothing, or too small beside it.
    """
    inputs = _inputs(handle.model, tokens)
    model = handle.model if _is_wide(handle.model) else _widened(handle.model)
    expected, base, without = _seen(model, inputs)
    got = _output(stock(model), inputs)
    size = expected.abs().max()

    def relative(output: Tensor) -> float:
        return ((output - expected).abs().max() / size).item()

    tolerance = TOLERANCE[dtype]
    effects = {component: relative(output) for component, output in without.items()}
    report = ExportReport(relative(got), relative(base), tolerance, effects)
    if not report.difference <= tolerance:
        raise ValueError(f"{wrong}: {report}")
    for component, effect in effects.items():
        if effect == 0 or report.difference > _OF_THE_LOGITS * effect:
            raise ValueError(
                f"inconclusive: leaving out the {component}s would change the logits by {effect:.3g} of their size, "
                f"and those of {folder} differ by {report.difference:.3g}, from rounding to {dtype}. "
                + ("Load the base in float32, export and verify there" if dtype.itemsize < 4 else _NO_EFFECT)
            )
    return report


@torch.no_grad()
def check_export(handle: LofitHandle, folder: Path | str) -> nn.Module:
    """Reload an exported folder with stock code and compare every tensor with the merged one. No forward runs.

    Returns the reloaded model in eval mode, in float32 or wider. Raises ValueError naming the tensors that stock code
    has dropped, has made up, or has in another form, or the file whose bytes are not those that were written.
    """
    handle.check_live()
    handle.check_everywhere("verify an export")
    exported, info = _reloaded(handle.model, folder)
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    for kind, keys in wrong.items():
        if keys:
            raise ValueError(
                f"the exported model in {folder} does not compute what the patched one does: stock code finds "
                f"{len(keys)} {kind} tensors ({keys[0]}, ...)"
            )
    base, got = handle.model.state_dict(), exported.state_dict()
    for name, want in merged_state(handle).items():
        if not _arrived(got.get(name), want, base.get(name)):
            raise ValueError(
                f"the exported model in {folder} does not compute what the patched one does: its {name} is not the "
                "merged one"
            )
    # what is within rounding above is damage all the same
    check_sums(Path(folder), "*.safetensors")
    return exported


def _reloaded(model: nn.Module, folder: Path | str) -> tuple[nn.Module, dict]:
    """(model, loading info) of what stock code makes of a folder."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    (name,) = config.architectures
    # code that came with a checkpoint is not transformers' own
    kind = getattr(transformers, name, None) or type(model)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    attention = _attention(model)
    asked = {} if attention is None else {"attn_implementation": attention}
    exported, info = kind.from_pretrained(
        folder, dtype=wide, output_loading_info=True, use_safetensors=True, trust_remote_code=False, **asked
    )
    return exported.to(device_of(model)).eval(), info


def _attention(model: nn.Module) -> str | None:
    """The attention to ask for in float32; None leaves it to transformers, since towers differ in what they know."""
    # flash attention knows 16 bits only
    name = getattr(model.config, "_attn_implementation", None)
    return None if name in (None, "sdpa") else "eager"


def _arrived(got: Tensor | None, want: Tensor, base: Tensor | None) -> bool:
    """Whether a reloaded tensor is the merged one, up to the rounding of a device other than the exporting one."""
    if got is None or got.shape != want.shape:
        return False
    want = want.to(got.device, got.dtype)
    if torch.equal(got, want):
        return True
    if not want.is_floating_point():
        return False
    change = torch.zeros_like(want) if base is None else base.to(want)
    error = (got - want).norm()
    return bool(error <= _OF_A_TENSOR * (want - change).norm())


def _is_wide(model: nn.Module) -> bool:
    return all(p.element_size() >= 4 for p in model.parameters() if p.is_floating_point())


def _widened(model: nn.Module) -> nn.Module:
    """A patched copy of the model in float32, which computes the same without rounding on the way."""
    wide = copy.deepcopy(model).float()
    if attention := _attention(model):
        wide.set_attn_implementation(attention)
    return wide


def _seen(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs of a patched model: as it is, as its base, and without each component that is not all zeros."""
    handle = handle_of(model)
    with eval_mode(model):
        expected = _output(model, inputs)
        with handle.disabled():
            base = _output(model, inputs)
        without = {}
        for component in COMPONENTS:
            zeros = _zeros(model, handle, component)
            if zeros:
                without[component] = _output(model, inputs, zeros)
    return expected, base, without


def _zeros(model: nn.Module, handle: LofitHandle, component: str) -> dict[str, Tensor]:
    """Zeros for one component's parameters, by their names in the model; none where they are zeros already."""
    own = {id(v) for (kind, _), v in handle.vectors().items() if kind == component and v.any()}
    return {name: torch.zeros_like(p) for name, p in model.named_parameters() if id(p) in own}


def _inputs(model: nn.Module, tokens: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What to call the model with, on its device."""
    device = device_of(model)
    if isinstance(tokens, Mapping):
        return {name: tensor.to(device) for name, tensor in tokens.items()}
    if tokens is None:
        if getattr(model, "main_input_name", "input_ids") != "input_ids":
            raise ValueError(
                f"a {type(model).__name__} reads {model.main_input_name}, not token ids: pass tokens as a mapping of "
                "its inputs"
            )
        tokens = _random_tokens(model)
    inputs = {"input_ids": tokens.to(device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def _random_tokens(model: nn.Module) -> Tensor:
    """2 x 16 tokens, or 1 x 16 for a classifier without padding, none of them special: some stand for images."""
    config = text_config(model)
    special = {
        value
        for part in (config, model.config)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and type(value) is int
    }
    size = getattr(config, "vocab_size", None) or model.get_input_embeddings().weight.shape[0]
    usual = torch.tensor([number for number in range(size) if number not in special])
    drawn = torch.randint(0, len(usual), (2, 16), generator=torch.Generator().manual_seed(0))
    alone = hasattr(config, "num_labels") and model.get_output_embeddings() is None and config.pad_token_id is None
    return usual[drawn[:1] if alone else drawn]


def _output(model: nn.Module, inputs: Mapping[str, Tensor], instead: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits, or the first floating output, in float64; with other parameters where given."""
    try:
        output = functional_call(model, dict(instead), (), dict(inputs)) if instead else model(**inputs)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run on {', '.join(inputs)} alone ({error}): pass tokens as a mapping of "
            "all inputs that it takes"
        ) from error
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = next(t for t in output.values() if isinstance(t, Tensor) and t.is_floating_point())
    return logits.double()
