"""Tables of docs/distributed.md, in Markdown, from what benchmarks/expert_parallel.py recorded."""

import statistics
from collections.abc import Iterator

from result_tables import filled, number, table

from moe_ops.distributed import Network

_UNITS = ("B", "KiB", "MiB", "GiB")


def network_table(record: dict) -> Iterator[str]:
    """The collectives alone, by the bytes that go to each rank, and the cost model's network."""
    size, times = record["gpus"], _times(record)
    yield from _head(record)
    yield ""
    rows = []
    for nbytes in times["all_to_all"]:
        taken = [of[nbytes] for of in times.values()]
        rates = " / ".join(f"{nbytes * (size - 1) / one / 1e9:.0f}" for one in taken)
        rows.append([_bytes(nbytes), *(f"{one * 1e6:.1f}" for one in taken), rates])
    names = [f"{name.replace('_', '-')} us" for name in times]
    yield from table(["bytes to each rank", *names, "GB/s that a rank sends"], rows)
    net = fitted(record)
    yield "\n" + filled(f"Of the model: {net.bandwidth / 1e9:.0f} GB/s, {net.latency * 1e6:.1f} us a collective.")


def ranks_table(record: dict) -> Iterator[str]:
    """Every way of a layer beside one GPU."""
    size, net = record["gpus"], fitted(record)
    yield from _head(record)
    yield ""
    rows = [row for cell in record["cells"] for row in _cell(cell, size, net)]
    columns = ["shape", "M", "way", "whole us", "comm us", "predicted us", "share", "experts us", "rest us",
               f"one GPU, {size} M; M us", f"speed-up, {size} M", "M", "error / bound", "bits"]  # fmt: skip
    yield from table(columns, rows)


def _cell(cell: dict, size: int, net: Network) -> Iterator[list[object]]:
    taken, lead = cell["seconds"], [_shape(cell), cell["M"]]
    alone, small = taken["one GPU, W * M"], taken["one GPU, M"]
    singles = f"{alone * 1e6:.1f}; {small * 1e6:.1f}"
    for name, facts in cell["ways"].items():
        whole, comm, experts = (taken.get(key) for key in (name, f"{name}: comm", f"{name}: experts"))
        predicted = 2 * net.latency + net.seconds(facts["out_bytes"] + facts["back_bytes"], size)
        rest, share = (whole - comm - experts, comm / whole) if comm else (None, None)
        yield [
            *lead, name, f"{whole * 1e6:.1f}", _us(comm), f"{predicted * 1e6:.1f}", number(share, ".0%"),
            _us(experts), _us(rest), singles, f"{alone / whole:.2f}", f"{small * size / whole:.2f}",
            f"{facts['rule']:.3f}", "equal" if facts["bits"] else "DIFFER",
        ]  # fmt: skip
        lead, singles = ["", ""], ""


def host_table(record: dict) -> Iterator[str]:
    """What eager calls cost the host, before the process has captured any graph with collectives, and after."""
    yield from _head(record)
    yield ""
    ages = list(record["host"])
    rows = [[name, *(_us(record["host"][age].get(name)) for age in ages)] for name in record["host"][ages[0]]]
    yield from table(["host time of", *(f"{age} us" for age in ages)], rows)


def fitted(record: dict) -> Network:
    """The cost model's network: latency by the smallest size, bandwidth by the last but one, means over the three.

    The largest size would give a bandwidth that no layer's rows reach.
    """
    size, times = record["gpus"], _times(record)
    sizes = list(times["all_to_all"])

    def mean(nbytes: int) -> float:
        return statistics.mean(of[nbytes] for of in times.values())

    least, most = mean(sizes[0]), mean(sizes[-2])
    # Between processes of a busy CPU more bytes may take less time.
    return Network(bandwidth=sizes[-2] * (size - 1) / max(most - least, most / 10), latency=least)


def _times(record: dict) -> dict[str, dict[int, float]]:
    return {name: {int(n): taken for n, taken in times.items()} for name, times in record["collectives"].items()}


def _head(record: dict) -> Iterator[str]:
    facts = [f"{record['gpus']} x {record['device']}", f"torch {record['torch']}", f"triton {record['triton']}"]
    facts += [f"NCCL {record['nccl']}"] if record["nccl"] else []
    yield ", ".join([*facts, record["date"]]) + "."


def _shape(cell: dict) -> str:
    return cell["shape"] if cell["format"] == "bf16" else f"{cell['shape']}, {cell['format']}"


def _us(seconds: float | None) -> str:
    return number(seconds and seconds * 1e6, ".1f")


def _bytes(nbytes: int) -> str:
    step = 0
    while nbytes >= 1024:
        nbytes, step = nbytes // 1024, step + 1
    return f"{nbytes} {_UNITS[step]}"
