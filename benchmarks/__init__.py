"""Benchmarks of lofit-fast. Everything here compares ours with its peers, and checks numbers before it reads a clock.

What is where
    peers/      every competing method and implementation, a file each. `table.PEERS` lists them.
    speed/      `make bench`: time and memory. `cell_plan` says what is measured and how many minutes it takes.
        op/     one output projection or one decoder layer. `operators.OPERATORS` has every path of ours, and the peers.
        step/   training steps, memory, whole runs, sweeps, scoring, generation, on packaged models.
        gpu/    `make bench-gpu`: the op level on a GPU machine as found, with torch and Triton alone.
    accuracy/   `make paper-quick`: the paper's tables and figures.
    proof/      what needs no clock: machine code, counts, predictions, the dead zone of bfloat16.
    results/    a folder per machine, with a JSON file per cell.

How to add a peer
    1. Write `peers/<name>.py` under the method's equation. For step timings it has `attach(model, vectors)`, which
       returns an `Attached`. For accuracy it has `make(model, seed=..., **options)` where it is trained, and
       `make(model, tokenizer, contrasts, seed=..., **options)` where it is fitted. See `peers.peer.Peer`.
    2. Add its row to `peers/table.py`. The step timings take it from there, and so does
       `tests/benchmarks/peers/test_peers.py`, the tester that every peer goes through.
    3. Test its equation in `tests/benchmarks/peers/test_<name>.py`.
    4. Where it changes one output projection, add a row to `speed/op/operators.py` under the same name. Where a
       table of the paper has it, add a row to `accuracy/method_table.py`.
"""
