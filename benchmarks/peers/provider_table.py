"""All providers, by the name that results use. Adding a peer is a row here and its file."""

from benchmarks.peers import floor as floors
from benchmarks.peers import fold_eager, ours, peft_methods, step_hook, step_original
from benchmarks.peers.provider import Provider

PROVIDERS: dict[str, Provider] = {
    "floor": Provider("frozen floor", floors.attach, lofit=False),
    "ours": Provider("lofit-fast", ours.attach, lofit=True),
    "hook": Provider("hook LoFiT", step_hook.attach, lofit=True),
    "compiled_hook": Provider("hook LoFiT, compiled", step_hook.attach_compiled, lofit=True),
    "original": Provider("original per-head loop", step_original.attach, lofit=True),
    "fold_eager": Provider("fold in eager PyTorch", fold_eager.attach, lofit=True),
    "lora_qv": Provider("PEFT LoRA r=8, q and v", peft_methods.attach("lora_qv"), lofit=False),
    "lora_all": Provider("PEFT LoRA r=8, all-linear", peft_methods.attach("lora_all"), lofit=False),
    "ia3": Provider("PEFT IA3", peft_methods.attach("ia3"), lofit=False),
    "beft": Provider("PEFT BEFT", peft_methods.attach("beft"), lofit=False),
}
