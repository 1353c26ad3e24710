"""`python -m moe_ops traffic`: what expert parallelism sends, and how long that takes, on paper."""

import argparse
import json
from dataclasses import asdict

from moe_ops.cli.options import UsageError, add_shape_options, chosen_shapes, token_counts
from moe_ops.cli.output import show_table
from moe_ops.exchange import RowLayout, scales_of

_GPUS = (2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (1, 128, 4096)
_COLUMNS = ("GPUs", "M", "way", "rows a token", "KB out a token", "KB back a token", "us", "of those latency", "faster")

_EXAMPLES = """examples:
  python -m moe_ops traffic --model deepseek-v3
  python -m moe_ops traffic --model qwen3-30b-a3b --gpus 2,4 --tokens 1,64,1024,4096 --bandwidth 300 --latency 20
  python -m moe_ops traffic --model deepseek-v3 --payload fp8 --combine 16 --node-size 8 --node-bandwidth 50

Columns: M are the tokens of each GPU; rows, KB out and KB back are what a token of one layer sends to other GPUs, as
hidden states on the way out and as partial sums on the way back; us is the estimate for the collectives of one layer.
The formulas are those of `moe_ops.distributed.estimate` (docs/distributed.md)."""


def add_parser(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "traffic",
        help="say what expert parallelism sends, and how long that takes, on paper",
        description="Says what a layer with its experts on several GPUs sends per token, and how long its collectives "
        "take on a network of a given bandwidth and latency. It needs no GPU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_options(parser, "one of --model and --shape is needed; with the experts of all GPUs")
    parser.add_argument("--gpus", type=token_counts, default=_GPUS, help="numbers of GPUs, comma-separated")
    parser.add_argument("--tokens", type=token_counts, default=_TOKENS, help="tokens of each GPU, comma-separated")
    parser.add_argument("--payload", choices=("16", "fp8"), default="16", help="hidden states (default: 16 bits)")
    parser.add_argument("--combine", choices=("auto", "32", "16"), default="auto",
                        help="bits of partial sums (default: 16 where that is faster)")  # fmt: skip
    for name, text in (
        ("bandwidth", "GB/s that a GPU sends within its node"),
        ("latency", "us of a collective"),
        ("host-sync", "us of reading sizes back"),
        ("node-bandwidth", "GB/s that a GPU sends to other nodes"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="X", help=f"{text} (default: that of Network)")
    parser.add_argument("--node-size", type=int, metavar="N", help="GPUs of a node (default: all are of one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    # Needs torch.distributed, which not every build of torch has.
    from moe_ops.distributed import WAYS, choose_way
    from moe_ops.distributed.cost import halving_pays

    shapes = chosen_shapes(options)
    if not shapes:
        raise UsageError("it needs a --model or a --shape; --help lists the known ones")
    network = _network(options)
    records = []
    for name, (_, top_k, hidden, _) in shapes.items():
        layout = _layout(hidden, top_k, options.payload)
        for gpus in options.gpus:
            for tokens in options.tokens:
                sizes = {"hidden_size": hidden, "num_ranks": gpus, "network": network}
                bits = options.combine
                if bits == "auto":
                    bits = "16" if halving_pays(tokens, **sizes) else "32"
                best, other = choose_way(
                    tokens, top_k=top_k, row_bytes=layout.row_bytes, back_bytes=int(bits) // 8, host_sync=True, **sizes
                )
                for traffic in sorted((best, other), key=lambda traffic: WAYS.index(traffic.way)):
                    faster = traffic is best
                    records.append({"shape": name, "gpus": gpus, "tokens": tokens, "faster": faster} | asdict(traffic))
    if options.json:
        print(json.dumps({"network": asdict(network), "layers": records}, indent=1))
        return 0
    title = f"{network.bandwidth / 1e9:g} GB/s, {network.latency * 1e6:g} us a collective"
    if network.node_size is not None:
        title += f", nodes of {network.node_size}, {network.node_bandwidth / 1e9:g} GB/s between them"
    for name in shapes:
        rows = [_row(record, network.latency) for record in records if record["shape"] == name]
        show_table(f"{name}, one layer: {title}", _COLUMNS, rows)
    return 0


def _row(record: dict, latency: float) -> tuple:
    tokens = record["tokens"]
    out, back = (record[key] / tokens / 1e3 for key in ("out_bytes", "back_bytes"))
    return (
        record["gpus"], tokens, record["way"], f"{record['rows'] / tokens:.2f}", f"{out:.1f}", f"{back:.1f}",
        f"{record['seconds'] * 1e6:.1f}", f"{2 * latency / record['seconds']:.0%}", "x" if record["faster"] else "",
    )  # fmt: skip


def _layout(hidden: int, top_k: int, payload: str) -> RowLayout:
    import torch

    if payload == "16":
        return RowLayout(hidden, top_k, torch.bfloat16)
    return RowLayout(hidden, top_k, torch.float8_e4m3fn, scales_of(hidden, True))


def _network(options: argparse.Namespace):
    from moe_ops.distributed import Network

    given = {
        "bandwidth": (options.bandwidth, 1e9), "latency": (options.latency, 1e-6),
        "host_sync": (options.host_sync, 1e-6), "node_bandwidth": (options.node_bandwidth, 1e9),
    }  # fmt: skip
    values = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    try:
        return Network(node_size=options.node_size, **values)
    except ValueError as error:
        raise UsageError(str(error)) from error
