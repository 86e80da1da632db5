"""What `plan --devices` prints: the arithmetic of a training step on several devices."""

from rich.table import Table

from lofit_fast.cli.command import out

GB = 10**9
_UNITS = ((10**12, "TB"), (GB, "GB"), (10**6, "MB"), (10**3, "KB"))


def device_report(name: str, mode: str, devices: int, tokens: int, dtype, plan, memory: float | None) -> dict:
    """The plan as plain data. memory: of a device, in GB of 10^9 bytes, or None."""
    from lofit_fast.models.device_arithmetic import NOT_COUNTED

    items = {
        key: [{"what": item.what, "bytes": item.bytes, "evidence": item.evidence} for item in listed]
        for key, listed in (("memory", plan.memory), ("payload", plan.payload))
    }
    about = {"model": name, "mode": mode, "devices": devices, "tokens": tokens, "dtype": str(dtype)}
    sums = {"bytes_per_device": plan.total, "bytes_sent_per_device": plan.sent}
    room = {} if memory is None else {"device_memory_gb": memory, "fits": plan.total <= memory * GB}
    return {**about, **items, **sums, **room, "notes": [*plan.notes, NOT_COUNTED]}


def show_device_plan(report: dict) -> None:
    """Print such a report as two tables and its notes."""
    title = f"{report['model']}, {report['mode']} on {report['devices']} devices, {report['tokens']} tokens, "
    memory = Table("kept on the fullest device", "", "", title=f"{title}{report['dtype']}")
    for item in report["memory"]:
        memory.add_row(item["what"], readable(item["bytes"]), item["evidence"])
    memory.add_row("together", readable(report["bytes_per_device"]), "", style="bold")
    out.print(memory)
    sent = Table("given to collectives in a step", "", "")
    for item in report["payload"]:
        sent.add_row(item["what"], readable(item["bytes"]), item["evidence"])
    sent.add_row("a device sends", readable(report["bytes_sent_per_device"]), "formula", style="bold")
    out.print(sent)
    if "fits" in report:
        room, word = f"{report['device_memory_gb']:g} GB", "fits" if report["fits"] else "does not fit"
        out.print(f"{word} into {room}, with {_left(report)}", highlight=False)
    for note in report["notes"]:
        out.print(note, highlight=False, markup=False)


def _left(report: dict) -> str:
    left = round(report["device_memory_gb"] * GB) - report["bytes_per_device"]
    return f"{readable(left)} left" if left >= 0 else f"{readable(-left)} too much"


def readable(size: int) -> str:
    """Bytes in the largest unit of which there is one, "12.3 GB"; units are powers of 1000."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"
