"""What a consumer of the ping-pong kernel needs for a tile beside its operands: scales and biases, a tile ahead.

They are asked for before the products of the tile before, and so arrive under them: each of them is at the end of a
chain of loads (row block, expert, pointer), and all epilogues would wait for them otherwise. Those of rows are kept in
registers; those of columns, which all rows have in common, go through shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_ops.kernels.persistent import existing
from moe_ops.kernels.quantize import given_scale


@gluon.jit
def load_ahead(sources, expert, block_m, num_m, n, BLOCK_M: gl.constexpr, N: gl.constexpr, COLUMNS: gl.constexpr,
               GATED: gl.constexpr, INTERLEAVED: gl.constexpr, TOP_K: gl.constexpr, LAYOUT: gl.constexpr
               ):  # fmt: skip
    """(scales of the rows, scales of the columns, biases, scale of the result) of a tile; 0 for those there are not.

    A row's scale is multiplied by the one of the expert's weights where they have but one. The columns are those of the
    products, from the one on that makes column n of the result. Past the last row block it is that one's.
    """
    (row_scale_ptr, stride_sm, stride_se, weight_scale_ptr, channel_scale_ptr, stride_we, bias_ptr, stride_be,
     out_scale_ptr, stride_oe, sorted_routes_ptr, num_routes) = sources  # fmt: skip
    block_m = existing(block_m, num_m)
    # Without row blocks there is none.
    expert64 = gl.maximum(expert, 0).to(gl.int64)
    scales = gl.to_tensor(0)
    channels = gl.to_tensor(0)
    biases = gl.to_tensor(0)
    out_scale = gl.to_tensor(0)
    if row_scale_ptr is not None:
        rows = block_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
        row_scale_ptr += expert64 * stride_se
        if TOP_K:
            routes = gl.load(sorted_routes_ptr + rows)
            tokens = (routes // TOP_K).to(gl.int64)
            scales = gl.load(row_scale_ptr + tokens * stride_sm, mask=routes < num_routes, other=0.0)
        else:
            scales = gl.load(row_scale_ptr + rows.to(gl.int64) * stride_sm)
        if weight_scale_ptr is not None:
            weight_scale_ptr += expert64 * stride_we
            scales *= gl.load(weight_scale_ptr).to(gl.float32)
    if channel_scale_ptr is not None:
        channels = _load_columns(channel_scale_ptr + expert64 * stride_we, n, N, COLUMNS, GATED, INTERLEAVED)
    if bias_ptr is not None:
        biases = _load_columns(bias_ptr + expert64 * stride_be, n, N, COLUMNS, GATED, INTERLEAVED)
    if out_scale_ptr is not None:
        out_scale = given_scale(gl.load(out_scale_ptr + expert64 * stride_oe))
    return scales, channels, biases, out_scale


@gluon.jit
def _load_columns(ptr, n, N: gl.constexpr, COLUMNS: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr):
    """Numbers of weight rows in the order of a tile's columns, fp32; 0 where a column does not exist. [COLUMNS]"""
    columns = gl.arange(0, COLUMNS, gl.BlockedLayout([COLUMNS // 128], [32], [gl.num_warps()], [0]))
    if not GATED:
        rows = n + columns
        exist = rows < N
    elif INTERLEAVED:
        rows = 2 * n + columns
        exist = rows < 2 * N
    else:
        HALF: gl.constexpr = COLUMNS // 2
        exist = n + columns % HALF < N
        rows = columns // HALF * N + n + columns % HALF
    return gl.load(ptr + rows, mask=exist, other=0.0).to(gl.float32)


@gluon.jit
def affine(x, columns, FIRST: gl.constexpr):
    """x * scale + bias by column, in fp32; x has the products' columns from FIRST on."""
    scale_smem, bias_smem = columns
    LAYOUT: gl.constexpr = gl.SliceLayout(0, x.type.layout)
    if scale_smem is not None:
        x *= scale_smem.slice(FIRST, x.shape[1]).load(LAYOUT)[None, :]
    if bias_smem is not None:
        x += bias_smem.slice(FIRST, x.shape[1]).load(LAYOUT)[None, :]
    return x
