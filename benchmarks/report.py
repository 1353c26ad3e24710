"""Turns recorded results into the tables of docs/benchmarks.md.

    python benchmarks/report.py benchmarks/results/<ours>.json benchmarks/results/<peers>.json

Ours are what `python -m moe_ops bench --json` wrote. Peers are recorded results of another run, whose clocks were not
ours: besides the plain factor there is one in which their time is scaled to this run's ceilings, by the read-only
stream where a cell is bound by bytes and by the cuBLAS product where it is bound by FLOPs.
"""

import json
import math
import sys
from pathlib import Path


def main(ours_file: str, peers_file: str) -> None:
    """Prints the tables."""
    ours, peers = (json.loads(Path(name).read_text()) for name in (ours_file, peers_file))
    best = {(cell["shape"], cell["tokens"]): min((t, n) for n, t in cell["ms"].items()) for cell in peers["cells"]}
    print(f"{ours['device']}, torch {ours['torch']}, triton {ours['triton']}, {ours['date']}, {ours['dtype']}.\n")
    print("| shape | M | tma ms | classic ms | grouped_mm ms | of limit | best recorded peer | factor | scaled |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    factors, scaled_factors = [], []
    for cell in ours["cells"]:
        time, (peer_time, peer) = cell["ms"]["tma"], best[cell["shape"], cell["tokens"]]
        factor = peer_time / time
        scaled = factor * scale(cell, peers)
        factors.append(factor)
        scaled_factors.append(scaled)
        times = " | ".join(f"{cell['ms'][name]:.4f}" for name in ("tma", "classic", "grouped_mm"))
        print(
            f"| {cell['shape']} | {cell['tokens']} | {times} | {cell['limit_ms'] / time:.2f} "
            f"| {peer_time:.3f} {peer} | {factor:.3f} | {scaled:.3f} |"
        )
    for name, values in (("plain", factors), ("scaled", scaled_factors)):
        mean = math.exp(sum(map(math.log, values)) / len(values))
        ahead = sum(value > 1 for value in values)
        print(f"\nGeometric mean of the {name} factors: {mean:.3f}; ahead in {ahead} of {len(values)} cells.")


def scale(cell: dict, peers: dict) -> float:
    """This run's ceilings over the peers': what their time would be here."""
    if cell["bound"] == "bytes":
        return peers["stream_gbs"] / cell["stream_gbs"]
    # Power limits a card that multiplies without a pause; the peers' run has one rate for either state.
    rates = peers["cublas_tflops"]
    near = min(rates.values(), key=lambda rate: abs(rate - cell["cublas_tflops"]))
    return near / cell["cublas_tflops"]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
