"""A table of tuned tiles, and calls that it is for."""

import torch

from moe_ops.cli.formats import FORMATS
from moe_ops.cli.problems import describe_call
from moe_ops.tuning import TileConfig, lookup
from moe_ops.tuning.bucket import Bucket
from moe_ops.tuning.files import write_atomically
from moe_ops.tuning.table import Entry, Table, Tiles, dump_table

CONFIGS = lookup.PACKAGED
BF16, FP16 = torch.bfloat16, torch.float16
SIZES = (8, 2, 256, 1024)
BUCKET = Bucket(8, 256, 1024, 2, "bfloat16", "none", "tma")
TILES = Tiles("sorted", TileConfig(32, 64, 64, 4, 4, 3, True), TileConfig(32, 64, 128, 8, 4, 3))
TABLE = Table(
    BUCKET, "H200", (Entry(16, None, 0.1, 0.1), Entry(64, TILES, 0.2, 0.25), Entry(4096, TILES)), {"torch": "2.11"}
)


def call(tokens=64, dtype=BF16, form=None, **options):
    return describe_call(SIZES, tokens, dtype, form and FORMATS[form], **options)


def write(folder, table=TABLE, text=None, device="H200"):
    file = folder / device / table.bucket.file_name
    write_atomically(file, dump_table(table) if text is None else text)
    return file
