"""What is seen of one tiny family: a cell per thing that a user does with a patched model, each right, refused or n/a.

The judge is a plain hook on the projections that the table here names: it shares no code with the patcher.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import lofit_fast as lf
from lofit_fast.data.collate import CompletionCollator
from lofit_fast.patching.architectures import text_config
from lofit_fast.training.engine.last_layer import narrowed, narrowing_refusal
from lofit_fast.training.engine.packing_trial import packing_leak
from tests.oracle import randomize
from tests.patched_models import snapshot
from tests.tiny_families import tiny_family
from tests.tiny_models import tokens
from tests.tiny_others import OTHERS, inputs_of, tiny_other

# float32, a few layers, products in another order
NEAR, NEAR_GRADIENT = 2e-5, 2e-4
RIGHT = "right"
COLUMNS = ("patch", "gradient", "generate", "packed", "narrowed", "load", "merge", "export")
QUICK = ("patch", "gradient")
OTHER_COLUMNS = ("patch", "gradient", "load", "merge", "classify")

# where a family's projections are, N a layer's number; without a line, where Llama's are, or a wrapper's
_LLAMA = r"model\.(language_model\.)?layers\.N\.self_attn\.o_proj"
_PLACES = {
    "biogpt.layers.N.self_attn.out_proj": ("biogpt",),
    "cpmant.encoder.layers.N.self_att.self_attention.attention_out": ("cpmant",),
    "git.encoder.layer.N.attention.output.dense": ("git",),
    "gpt_neox.layers.N.attention.dense": ("gpt_neox",),
    "gpt_neox_japanese.layers.N.attention.dense": ("gpt_neox_japanese",),
    "language_model.model.layers.N.self_attn.o_proj": ("llama4",),
    "model.(language_model.)?layers.N.self_attn.dense": ("fuyu", "persimmon", "phi"),
    "model.decoder.layers.N.self_attn.out_proj": (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "opt"),
        *("opt projected", "pegasus", "plbart", "trocr", "whisper"),
    ),
    "model.layers.N.attn.Wo": ("modernbert-decoder",),
    "model.layers.N.mixer.o_proj": ("nemotron_h",),
    "model.layers.N.self_attn.(o_proj|out_proj)": ("minimax", "minimax linear last"),
    "model.layers.N.self_attn.o_proj.linear": ("moshi",),
    "model.(language_model.)?layers.N.self_attn.out_proj": (
        *("lfm2", "lfm2 attention last", "lfm2_moe", "lfm2_vl", "xglm"),
    ),
    "model.layers.N.shared_transf(ormer)?.self_attn.o_proj": ("zamba", "zamba2"),
    "model.layers.N.temporal_block.o_proj": ("recurrent_gemma",),
    "model.text_model.layers.N.self_attn.o_proj": ("emu3", "granite_docling", "idefics2", "idefics3", "smolvlm"),
    "prophetnet.decoder.layers.N.self_attn.out_proj": ("prophetnet",),
    "text_model.model.layers.N.self_attn.out_proj": ("kosmos-2.5",),
    "transformer.attentions.N.out_lin": ("xlm",),
    "transformer.blocks.N.attn.out_proj": ("mpt",),
    "transformer.blocks.N.norm_attn_norm.attn.out_proj": ("dbrx",),
    "transformer.h.N.attn.attention.out_proj": ("gpt_neo",),
    "transformer.h.N.attn.c_proj": ("gpt2", "gpt_bigcode", "gpt_bigcode many keys", "openai-gpt"),
    "transformer.h.N.attn.out_proj": ("codegen", "gptj"),
    "transformer.h.N.multi_head_attention.dense": ("ctrl",),
    "transformer.h.N.self_attention.dense": (
        *("bloom", "bloom residual", "falcon", "falcon alibi", "falcon new decoder"),
    ),
    r"\w+.encoder.layer.N.attention.output.dense": (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        *("xmod",),
    ),
}
_PLACE_OF = {name: place.replace(".", r"\.") for place, names in _PLACES.items() for name in names}
HEADS = 4


@dataclass
class Family:
    """One tiny model, patched in turn by each check and plain between them.

    run: model -> logits (or what stands for them). place: a regex of the projections' names.
    """

    name: str
    model: nn.Module
    place: str
    run: Callable[[nn.Module], Tensor]
    folder: Path
    cells: dict[str, str] = field(default_factory=dict)


def family_of(name: str, folder: Path) -> Family:
    """A decoder family of `tests/tiny_families.py`."""
    return Family(name, tiny_family(name), _PLACE_OF.get(name, _LLAMA), logits_of, folder)


def other_of(name: str, folder: Path) -> Family:
    """A model beyond decoders, of `tests/tiny_others.py`."""

    def run(model: nn.Module) -> Tensor:
        output = model(**inputs_of(name))
        return output.reconstruction if "reconstruction" in output else output.logits

    return Family(name, tiny_other(name), OTHERS[name].place, run, folder)


def logits_of(model: nn.Module) -> Tensor:
    """(B, S, vocabulary) of the fixed tokens, without a cache."""
    known = inspect.signature(type(model).forward).parameters
    # hashing and the like draw numbers
    torch.manual_seed(0)
    return model(input_ids=tokens(), **({"use_cache": False} if "use_cache" in known else {})).logits


@contextmanager
def patched(family: Family) -> Iterator[lf.LofitHandle]:
    """A scope with scales and offsets of every head, large enough to matter."""
    handle = lf.patch(family.model, lf.LofitConfig(scale="all", offset="all"))
    randomize(handle)
    try:
        yield handle
    finally:
        if lf.handle_of(family.model) is handle:
            handle.unpatch()


@contextmanager
def hooked(family: Family, vectors: dict[int, tuple[Tensor, Tensor]]) -> Iterator[list[str]]:
    """A scope with z -> (1 + a) z + v before the projections that the family's place names; yields their names."""
    place = re.compile(family.place.replace("N", r"(\d+)"))
    hooks, names = [], []
    number = len(re.findall(r"\((?!\\d)", family.place[: family.place.index("N")])) + 1
    for name, module in family.model.named_modules():
        if match := place.fullmatch(name):
            scale, offset = (v.reshape(-1) for v in vectors[int(match[number])])
            hooks.append(module.register_forward_pre_hook(_edit(scale, offset)))
            names.append(name)
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _edit(scale: Tensor, offset: Tensor):
    return lambda module, args: ((1 + scale) * args[0] + offset, *args[1:])


def vectors_of(handle: lf.LofitHandle, grad: bool = False) -> dict[int, tuple[Tensor, Tensor]]:
    """Copies of a handle's (scale, offset) by layer."""
    return {
        number: tuple(v.detach().clone().requires_grad_(grad) for v in (layer.scale, layer.offset))
        for number, layer in handle.layers.items()
    }


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


class Wrong(AssertionError):
    """A cell that is neither right nor refused."""


def _near(got: Tensor, expected: Tensor, what: str, bound: float = NEAR) -> None:
    # `not <=`, so that nan is wrong
    if not (distance := off(got, expected)) <= bound:
        raise Wrong(f"{what} off by {distance:.1e}")


def see(family: Family, columns=COLUMNS) -> dict[str, str]:
    """The family's cells: "right", "refused: ..." or "n/a: ..."; anything else is wrong."""
    cells = {}
    for column in columns:
        if column != "patch" and cells["patch"] != RIGHT:
            cells[column] = "n/a: not patched"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cells[column] = _CHECKS[column](family) or RIGHT
        except Wrong as wrong:
            cells[column] = f"WRONG: {wrong}"
        except Exception as error:
            cells[column] = f"WRONG: {column} raised {type(error).__name__}, {_plain(error, family)}"
    return cells


def check_patch(family: Family) -> str | None:
    """Logits of the patched model against the hook's; a refusal and `unpatch` leave the model as it was."""
    with torch.no_grad():
        base = family.run(family.model)
        # some write into their config when they first run
        before = snapshot(family.model)
        try:
            with patched(family) as handle:
                got, vectors = family.run(family.model), vectors_of(handle)
        except ValueError as error:
            if snapshot(family.model) != before:
                raise Wrong("a refusal changed the model") from error
            return f"refused: {_plain(error, family)}"
        if snapshot(family.model) != before:
            raise Wrong("unpatch left something")
        with hooked(family, vectors) as names:
            expected = family.run(family.model)
    if len(names) != len(vectors):
        raise Wrong(f"{len(vectors)} projections patched, {len(names)} expected")
    if {p.n_heads for p in handle.projections} != {HEADS}:
        raise Wrong(f"heads {[p.n_heads for p in handle.projections]}")
    _near(got, expected, "logits")
    if not off(got, base) > 1e-3:
        raise Wrong("the vectors changed nothing")
    return None


def check_gradient(family: Family) -> None:
    """The vectors' gradients against autograd through the hook."""
    weights = None
    with patched(family) as handle:
        got = family.run(family.model)
        weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
        (got * weights).mean().backward()
        gradients = {n: (layer.scale.grad, layer.offset.grad) for n, layer in handle.layers.items()}
        vectors = vectors_of(handle, grad=True)
        trainable = [p for p in family.model.parameters() if p.requires_grad]
        own = {id(p) for p in handle.parameters()}
        if any(id(p) not in own for p in trainable):
            raise Wrong("something beside the vectors is trained")
    frozen = [p for p in family.model.parameters() if p.requires_grad]
    family.model.requires_grad_(False)
    with hooked(family, vectors):
        (family.run(family.model) * weights).mean().backward()
    for p in frozen:
        p.requires_grad_(True)
    for part in (0, 1):
        if any(gradients[n][part] is None or vectors[n][part].grad is None for n in vectors):
            raise Wrong("no gradient")
        pairs = [torch.cat([of[n][part].flatten() for n in vectors]) for of in (gradients, _grads(vectors))]
        _near(*pairs, "gradients", NEAR_GRADIENT)


def _grads(vectors):
    return {n: tuple(v.grad for v in pair) for n, pair in vectors.items()}


def check_generate(family: Family) -> str | None:
    """Greedy tokens with the model's own cache, patched against hooked."""
    try:
        _generate(family.model)
    except Exception as error:
        return f"n/a: the base does not generate ({type(error).__name__})"
    with patched(family) as handle:
        got, vectors = _generate(family.model), vectors_of(handle)
        with handle.folded():
            folded = _generate(family.model)
    with hooked(family, vectors):
        expected = _generate(family.model)
    if not (torch.equal(got, expected) and torch.equal(folded, expected)):
        raise Wrong("other tokens")
    return None


@torch.no_grad()
def _generate(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model.generate(input_ids=tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False)


@torch.no_grad()
def check_packed(family: Family) -> str | None:
    """Two samples in one row, told apart by their positions, against both padded; the engine must notice a leak."""
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[0, 5:] = 0
    row = {"input_ids": ids[mask.bool()][None]}
    row["position_ids"] = torch.cat((torch.arange(5), torch.arange(ids.shape[1])))[None]
    with patched(family):
        noticed = packing_leak(family.model, text_config(family.model)._attn_implementation, _collator)
        try:
            apart = family.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            together = family.model(**row, use_cache=False).logits[0]
        except Exception as error:
            if noticed is None:
                raise
            return f"refused: takes no packed rows ({type(error).__name__})"
    leaks = not off(together, apart) <= NEAR
    if leaks and noticed is None:
        raise Wrong("samples in one row see each other, and the engine packs them")
    if noticed:
        return f"refused: samples in one row {'' if leaks else 'may '}see each other"
    return None


def _collator(packing: bool) -> CompletionCollator:
    return CompletionCollator(0, packed=packing, logits="rows")


def check_narrowed(family: Family) -> str | None:
    """Logits and gradients under `narrowed`, of a batch that keeps some rows, against those without."""
    if "logits_to_keep" not in inspect.signature(type(family.model).forward).parameters:
        return "n/a: takes no rows of logits"
    keep = torch.zeros(tokens().shape, dtype=torch.bool)
    keep[0, 4:7] = keep[1, 9:] = True

    def run():
        return family.model(input_ids=tokens(), logits_to_keep=keep, use_cache=False).logits

    with patched(family) as handle:
        if narrowing_refusal(family.model):
            return "refused: the last MLP cannot be narrowed"
        seen = []
        for scope in (False, True):
            handle.model.zero_grad()
            for p in handle.parameters():
                p.grad = None
            if scope:
                with narrowed(family.model):
                    logits = run()
                    (logits * logits.detach().cos()).mean().backward()
            else:
                try:
                    logits = run()
                except Exception as error:
                    return f"n/a: takes no mask of logits ({type(error).__name__})"
                (logits * logits.detach().cos()).mean().backward()
            seen.append((logits.detach(), torch.cat([p.grad.flatten() for p in handle.parameters()])))
    _near(seen[1][0], seen[0][0], "logits")
    _near(seen[1][1], seen[0][1], "gradients", NEAR_GRADIENT)
    return None


@torch.no_grad()
def check_load(family: Family) -> None:
    """An adapter folder, loaded into the model again."""
    folder = family.folder / "adapter"
    with patched(family) as handle:
        expected = family.run(family.model)
        handle.save(folder)
    handle = lf.load(family.model, folder)
    got = family.run(family.model)
    handle.unpatch()
    if not torch.equal(got, expected):
        raise Wrong(f"loaded, off by {off(got, expected):.1e}")


@torch.no_grad()
def check_merge(family: Family) -> str | None:
    """A plain model in memory."""
    merged = copy.deepcopy(family.model)
    with patched(family):
        expected = family.run(family.model)
    handle = lf.patch(merged, lf.LofitConfig(scale="all", offset="all"))
    randomize(handle)
    try:
        handle.merge()
    except ValueError as error:
        return f"refused: {_plain(error, family)}"
    _near(family.run(merged), expected, "merged logits")
    return None


def check_export(family: Family) -> str | None:
    """A plain folder, proved by `verify_export`; a refusal writes nothing."""
    folder = family.folder / "plain"
    with patched(family) as handle:
        try:
            lf.export(handle, folder)
        except ValueError as error:
            if folder.exists():
                raise Wrong("a refused export left a folder") from error
            return f"refused: {_plain(error, family)}"
        except Exception as error:
            raise Wrong(f"export: {type(error).__name__}: {_plain(error, family)}") from error
        try:
            lf.verify_export(handle, folder)
        except Exception as error:
            raise Wrong(f"verify_export: {type(error).__name__}: {_plain(error, family)}") from error
    return None


def check_classify(family: Family) -> None:
    """An untrained classifier and the vectors, trained for a few steps; the base stays, and the way back is whole."""
    model, inputs = tiny_other(family.name, classifier=True), inputs_of(family.name, classifier=True)
    before, labels = snapshot(model), torch.tensor([0, 2])
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    # the head is frozen with the rest until one asks for it
    head = list(getattr(model, OTHERS[family.name].head).parameters())
    if any(p.requires_grad for p in head):
        raise Wrong("the head was trainable")
    for p in head:
        p.requires_grad_(True)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = [p.detach().clone() for p in handle.parameters()]
    optimizer, losses = torch.optim.Adam([*handle.parameters(), *head], lr=0.05), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < 0.8 * losses[0]:
        raise Wrong(f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f}")
    if any(torch.equal(p, was) for p, was in zip(handle.parameters(), start, strict=True)):
        raise Wrong("a vector did not move")
    if any(not torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept):
        raise Wrong("a frozen weight moved")
    handle.unpatch()
    own = {name for name, p in model.named_parameters() if any(p is one for one in head)}
    after = snapshot(model)
    if [key for key in before if after.get(key) != before[key] and key.removeprefix("tensor ") not in own]:
        raise Wrong("unpatch left something")


def _plain(error: Exception, family: Family) -> str:
    """The first sentence of a message, without names of models and layers: alike for all that it is said of."""
    said = str(error).split("\n")[0].replace(type(family.model).__name__, "the model")
    said = re.sub(r" \(model_type '[^']*'\)|(?<=model_type) '[^']*'", "", said)
    said = re.sub(r"\blayer \d+", "a layer", said)
    return re.split(r"[;.] ", said)[0].strip()


_CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
