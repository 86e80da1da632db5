"""The commands of `lofit-fast`, each with its examples."""

import typer

from lofit_fast.cli import (
    adapter_commands,
    export_commands,
    heads_command,
    judge_commands,
    plan_commands,
    select_command,
    serve_command,
    sweep_command,
    train_command,
)
from lofit_fast.cli.command import command
from lofit_fast.cli.company import DIVIDED, EACH, refused

app = typer.Typer(
    help="LoFiT: find the attention heads that matter, then tune offsets on those alone.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

command(
    app,
    "train --model smollm2 --output runs/kinship",
    "train --model smollm2 --task clutrr --data DIR --train-size 300 --top 0.1 --output runs/clutrr",
    "train --model smollm2 --task truthfulqa --data DIR --top 0.1 --output runs/truthfulqa",
    "train --model meta-llama/Llama-3.2-1B --data my.jsonl --top 32 --output runs/mine",
    "train --model smollm2 --data my.csv --columns prompt=question,completion=answer --dry-run",
    "train --model smollm2 --data preferences.jsonl --top 0.1 --output runs/preferred",
    "train --model smollm2 --data my.jsonl --min-layer 22 --prefix-cache-gb 2 --output runs/mine",
    goes_on=True,
    across=DIVIDED,
)(train_command.train)
command(
    app,
    "sweep grid.toml --output sweeps/mine",
    "sweep grid.toml --output sweeps/mine --jobs 2",
    "sweep grid.toml --output sweeps/mine --devices 0,1,2,3",
    "sweep grid.toml --output sweeps/mine --together 4",
    "sweep grid.toml --dry-run",
    goes_on=True,
    across=EACH,
)(sweep_command.sweep)
command(
    app,
    "eval --model smollm2 --task kinship",
    "eval --model smollm2 --adapter runs/kinship/adapter --task kinship --json",
    "eval --model smollm2 --task truthfulqa --data DIR",
    "eval --model smollm2 --adapter runs/preferred/adapter --data preferences.jsonl",
    across=DIVIDED,
)(judge_commands.eval)
command(
    app,
    'generate --model smollm2 --adapter runs/kinship/adapter --prompt "Question: ..."',
    "generate --model smollm2 --max-new-tokens 64 < prompts.txt",
    across=DIVIDED,
)(judge_commands.generate)
command(app, "merge --model smollm2 --adapter runs/kinship/adapter --output merged")(export_commands.merge)
command(
    app,
    "export --model smollm2 --adapter runs/kinship/adapter --output exported",
    "export --model smollm2 --adapter runs/kinship/adapter --for llama.cpp --output gguf",
    "export --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --for vllm --output served",
    "export --model smollm2 --adapter runs/kinship/adapter --for peft --peft-method lora --output lora",
)(export_commands.export)
command(app, "convert-adapter --model meta-llama/Llama-2-7b-hf --checkpoint lofit/checkpoint-400 --output adapter")(
    adapter_commands.convert_adapter
)
command(
    app,
    "push --model smollm2 --adapter runs/kinship/adapter --repo me/kinship --license apache-2.0",
    "push --model smollm2 --adapter runs/kinship/adapter --repo me/kinship --dry-run --output page",
)(adapter_commands.push)
command(
    app,
    "select --model smollm2 --task clutrr --data DIR --top 0.1 --output heads.json",
    "select --model smollm2 --method all --top 0.1 --output selections",
)(select_command.select)
command(
    app,
    "heads --model smollm2 --adapter runs/kinship/adapter",
    "heads --model smollm2 --adapter runs/kinship/adapter --compare runs/clutrr/adapter --output heads.html",
)(heads_command.heads)
command(
    app,
    "plan --model smollm2 --tokens 4096",
    "plan --model Llama-3-8B --tokens 8192 --offset 0.03 --device H100",
    "plan --model Llama-3-70B --offset 0.03 --devices 8 --mode fsdp --device-memory 80",
)(plan_commands.plan)
command(app, "autotune --model smollm2 --tokens 1024 --tokens 4096")(plan_commands.autotune)
command(
    app,
    "serve --model smollm2 --adapter kinship=runs/kinship/adapter",
    "serve --model smollm2 --adapter mine=me/kinship --adapter theirs=you/kinship --port 8080",
    across=refused("its processes would all ask for one port, so start one server by itself"),
)(serve_command.serve)
