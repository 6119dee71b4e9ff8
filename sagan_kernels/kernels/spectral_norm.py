"""W/σ of every spectral-normed weight of a network: three launches forward, two backward, for any number of layers.

Shapes   each weight is a matrix W (R, C) that lies in memory as (A, R, K), C = A·K: A = 1 is row after row, K = 1
         column after column, anything else a transposed convolution. `inner` tells how the C columns in memory order
         map to the order of the stored v: channels_last weights need no copy.
Traffic  forward reads every weight three times and writes W/σ once; backward reads the gradient twice and W/σ once, and
         writes the weight's gradient once. u, v and the sums of squares are small.
Maths    y = W v, u = y/‖y‖, z = Wᵀu, v = z/‖z‖, σ = ‖z‖ (= uᵀWv); dW = (G - <G, W/σ> u vᵀ)/σ.
Method   Miyato et al., arXiv:1802.05957. A table of pointers, one row per layer, and a list of tiles of all layers make
         one launch of many; sums of squares go to one number per tile and every reader adds them in the same order,
         so there are no atomics and results repeat bit for bit. They are float64: 1e±20 squared has no float32.
"""

import triton
import triton.language as tl

# columns of the table of layers, int64 each: addresses of weight, u and v; A, R, K; where the layer's part of y, z and
# out begins; inner; elements of the weight; flags
WIDTH: tl.constexpr = tl.constexpr(12)
# bits of flags
BY_COLUMNS: tl.constexpr = tl.constexpr(
    1
)  # the first product is z = Wᵀu, as BigGAN's and torch's older form have it
ROWS_ALIGNED: tl.constexpr = tl.constexpr(2)  # A = 1 and every row starts at a multiple of 16 bytes
ALIGNED: tl.constexpr = tl.constexpr(4)  # the first element does
CAPPED: tl.constexpr = tl.constexpr(8)  # divide by max(1, σ)


@triton.jit
def product_kernel(
    layers_ptr, tiles_ptr, first_row_tile_ptr, first_column_tile_ptr,
    y_ptr, z_ptr, y_partial_ptr, z_partial_ptr,
    STORED: tl.constexpr, DOT: tl.constexpr, ELEMENT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, ROW_SPAN: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMN_SPAN: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """ROWS entries of y = W v or COLUMNS entries of z = Wᵀu of one layer, and their sum of squares. Grid: (tiles,).

    A tile is (layer, first row or column, its place among partial sums, 1 for columns). The factor is the stored
    vector with STORED, otherwise the other product's last result, normalized. With DOT the partial sum is that of the
    product with the stored vector of the other side: its total is uᵀWv.
    """
    tile = tiles_ptr + 4 * tl.program_id(0)
    layer = tl.load(tile).to(tl.int64)
    start = tl.load(tile + 1)
    slot = tl.load(tile + 2)
    row = layers_ptr + WIDTH * layer
    address = tl.load(row)
    u = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    v = tl.load(row + 2).to(tl.pointer_type(ELEMENT))
    A = tl.load(row + 3).to(tl.int32)
    R = tl.load(row + 4).to(tl.int32)
    K = tl.load(row + 5).to(tl.int32)
    y = y_ptr + tl.load(row + 6)
    z = z_ptr + tl.load(row + 7)
    inner = tl.load(row + 9).to(tl.int32)
    aligned = (tl.load(row + 11) & ROWS_ALIGNED) != 0
    if tl.load(tile + 3) == 0:
        factor_total = 1.0
        if not STORED:
            factor_total = _total(z_partial_ptr, first_column_tile_ptr, layer, BLOCK_T)
        total = _rows_product(
            address, u, v, y, z, factor_total, start, A, R, K, inner, aligned,
            STORED, DOT, ELEMENT, VECTOR, ROWS, ROW_SPAN,
        )  # fmt: skip
        tl.store(y_partial_ptr + slot, total)
    else:
        factor_total = 1.0
        if not STORED:
            factor_total = _total(y_partial_ptr, first_row_tile_ptr, layer, BLOCK_T)
        total = _columns_product(
            address, u, v, y, z, factor_total, start, A, R, K, inner, aligned,
            STORED, DOT, ELEMENT, VECTOR, COLUMNS, COLUMN_SPAN,
        )  # fmt: skip
        tl.store(z_partial_ptr + slot, total)


@triton.jit
def normalize_kernel(
    layers_ptr, tiles_ptr, first_row_tile_ptr, first_column_tile_ptr,
    y_ptr, z_ptr, y_partial_ptr, z_partial_ptr,
    sigma_ptr, out_ptr,
    ITERATED: tl.constexpr, STORE: tl.constexpr, ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of W/σ; y and z become the u and v that σ was taken with; σ. Grid: (tiles,).

    A tile is (layer, block). STORE also writes u and v to the layer's own buffers.
    """
    tile = tiles_ptr + 2 * tl.program_id(0)
    layer = tl.load(tile).to(tl.int64)
    block = tl.load(tile + 1)
    row = layers_ptr + WIDTH * layer
    address = tl.load(row)
    u = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    v = tl.load(row + 2).to(tl.pointer_type(ELEMENT))
    R = tl.load(row + 4).to(tl.int32)
    C = (tl.load(row + 3) * tl.load(row + 5)).to(tl.int32)
    y = y_ptr + tl.load(row + 6)
    z = z_ptr + tl.load(row + 7)
    out = out_ptr + tl.load(row + 8)
    inner = tl.load(row + 9).to(tl.int32)
    numel = tl.load(row + 10)
    flags = tl.load(row + 11)
    SUM: tl.constexpr = y_ptr.dtype.element_ty

    by_columns = (flags & BY_COLUMNS) != 0
    y_total = _total(y_partial_ptr, first_row_tile_ptr, layer, BLOCK_T)
    z_total = _total(z_partial_ptr, first_column_tile_ptr, layer, BLOCK_T)
    if ITERATED:
        y_norm = tl.sqrt(y_total).to(SUM)
        z_norm = tl.sqrt(z_total).to(SUM)
        sigma = tl.where(by_columns, y_norm, z_norm)
    else:
        y_norm = tl.full((), 0.0, SUM)  # keeps the stored vectors: they are what σ was taken with
        z_norm = y_norm
        sigma = (y_total + z_total).to(SUM)  # one of them has no tile
    divisor = tl.where(sigma == 0, 1.0, sigma)
    if (flags & CAPPED) != 0:
        divisor = tl.maximum(sigma, 1.0)

    start = block.to(tl.int64) * BLOCK
    e = start + tl.arange(0, BLOCK)
    if ((flags & ALIGNED) != 0) & (start + BLOCK <= numel):
        w = tl.load(_aligned(address, ELEMENT) + e)
        tl.store(tl.multiple_of(out, 16) + e, (w.to(SUM) / divisor).to(out_ptr.dtype.element_ty))
    else:
        w = tl.load(address.to(tl.pointer_type(ELEMENT)) + e, mask=e < numel, other=0.0)
        tl.store(out + e, (w.to(SUM) / divisor).to(out_ptr.dtype.element_ty), mask=e < numel)

    i = block * BLOCK + tl.arange(0, BLOCK)
    if start < R:
        new = _normalized(y, u, i, i, i < R, y_norm, SUM)
        tl.store(y + i, new, mask=i < R)
        if STORE:
            tl.store(u + i, new.to(ELEMENT), mask=i < R)
    if start < C:
        stored_at = _stored_at(i, C, inner)
        new = _normalized(z, v, i, stored_at, i < C, z_norm, SUM)
        tl.store(z + i, new, mask=i < C)
        if STORE:
            tl.store(v + stored_at, new.to(ELEMENT), mask=i < C)
    if block == 0:
        tl.store(sigma_ptr + layer, sigma)


@triton.jit
def gradient_dot_kernel(
    layers_ptr, tiles_ptr, grads_ptr,
    out_ptr, partial_ptr,
    GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """<G, W/σ> over BLOCK elements. Grid: (tiles,). grads_ptr has the address of each layer's G, 0 for none."""
    tile = tiles_ptr + 2 * tl.program_id(0)
    layer = tl.load(tile).to(tl.int64)
    row = layers_ptr + WIDTH * layer
    address = tl.load(grads_ptr + layer)
    out = out_ptr + tl.load(row + 8)
    numel = tl.load(row + 10)
    SUM: tl.constexpr = partial_ptr.dtype.element_ty
    start = tl.load(tile + 1).to(tl.int64) * BLOCK
    e = start + tl.arange(0, BLOCK)
    total = 0.0
    if address != 0:
        if (address % 16 == 0) & (start + BLOCK <= numel):
            g = tl.load(_aligned(address, GRAD) + e)
            w = tl.load(tl.multiple_of(out, 16) + e)
            total = tl.sum(g.to(SUM) * w.to(SUM), 0)
        else:
            g = tl.load(address.to(tl.pointer_type(GRAD)) + e, mask=e < numel, other=0.0)
            w = tl.load(out + e, mask=e < numel, other=0.0)
            total = tl.sum(g.to(SUM) * w.to(SUM), 0)
    tl.store(partial_ptr + tl.program_id(0), total)


@triton.jit
def weight_gradient_kernel(
    layers_ptr, tiles_ptr, first_tile_ptr, grads_ptr,
    u_ptr, v_ptr, sigma_ptr, partial_ptr, weight_grad_ptr,
    GRAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of dW = (G - <G, W/σ> u vᵀ)/σ, or G where σ does not divide. Grid: (tiles,)."""
    tile = tiles_ptr + 2 * tl.program_id(0)
    layer = tl.load(tile).to(tl.int64)
    row = layers_ptr + WIDTH * layer
    address = tl.load(grads_ptr + layer)
    if address == 0:
        return
    R = tl.load(row + 4).to(tl.int32)
    K = tl.load(row + 5).to(tl.int32)
    u = u_ptr + tl.load(row + 6)
    v = v_ptr + tl.load(row + 7)
    weight_grad = weight_grad_ptr + tl.load(row + 8)
    numel = tl.load(row + 10)
    capped = (tl.load(row + 11) & CAPPED) != 0
    SUM: tl.constexpr = partial_ptr.dtype.element_ty

    sigma = tl.load(sigma_ptr + layer)
    dot = _total(partial_ptr, first_tile_ptr, layer, BLOCK_T)
    divides = (sigma != 0) & (
        (sigma >= 1) | (not capped)
    )  # max(1, σ) has σ's slope from 1 on, as torch.clamp
    divisor = tl.where(divides, sigma, 1.0)
    dot = tl.where(divides, dot, 0.0)

    start = tl.load(tile + 1).to(tl.int64) * BLOCK
    e = start + tl.arange(0, BLOCK)
    first = start // K  # the division in 64 bits is done once, the ones for each element in 32
    ahead = (start - first * K).to(tl.int32) + tl.arange(0, BLOCK)
    row_in_memory = first.to(tl.int32) + ahead // K
    a = row_in_memory // R
    r = row_in_memory - a * R
    c = a * K + ahead % K
    inside = e < numel
    outer = tl.load(u + r, mask=inside, other=0.0) * tl.load(v + c, mask=inside, other=0.0)
    if (address % 16 == 0) & (start + BLOCK <= numel):
        g = tl.load(_aligned(address, GRAD) + e).to(SUM)
        dw = ((g - dot * outer) / divisor).to(weight_grad_ptr.dtype.element_ty)
        tl.store(tl.multiple_of(weight_grad, 16) + e, dw)
    else:
        g = tl.load(address.to(tl.pointer_type(GRAD)) + e, mask=inside, other=0.0).to(SUM)
        dw = ((g - dot * outer) / divisor).to(weight_grad_ptr.dtype.element_ty)
        tl.store(weight_grad + e, dw, mask=inside)


@triton.jit
def _rows_product(
    address, u, v, y, z, factor_total, start, A, R, K, inner, aligned,
    STORED: tl.constexpr, DOT: tl.constexpr, ELEMENT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """ROWS entries of y = W v from `start` on, and the sum that DOT chooses."""
    SUM: tl.constexpr = y.dtype.element_ty
    C = A * K
    norm = _root(factor_total, STORED, SUM)
    r = start + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, SPAN), SUM)
    if aligned:
        weight = _aligned(address, ELEMENT)
        length = tl.multiple_of(C // VECTOR * VECTOR, VECTOR)  # C itself, in a form the compiler can use
        for at in range(0, length, SPAN):
            c = at + tl.arange(0, SPAN)
            x = _factor(z, v, c, c < length, norm, length, inner, STORED, SUM)
            w_at = r[:, None].to(tl.int64) * length + c[None, :]
            w = tl.load(weight + w_at, mask=(r[:, None] < R) & (c[None, :] < length), other=0.0)
            acc += w.to(SUM) * x[None, :]
    else:
        weight = address.to(tl.pointer_type(ELEMENT))
        for at in range(0, C, SPAN):
            c = at + tl.arange(0, SPAN)
            x = _factor(z, v, c, c < C, norm, C, inner, STORED, SUM)
            w_at = r[:, None].to(tl.int64) * K + _column_at(c, R, K)[None, :]
            w = tl.load(weight + w_at, mask=(r[:, None] < R) & (c[None, :] < C), other=0.0)
            acc += w.to(SUM) * x[None, :]
    result = tl.sum(acc, 1)
    tl.store(y + r, result, mask=r < R)
    wide = result.to(tl.float64)
    if DOT:
        wide *= tl.load(u + r, mask=r < R, other=0.0).to(tl.float64)
    else:
        wide *= wide
    return tl.sum(wide, 0)


@triton.jit
def _columns_product(
    address, u, v, y, z, factor_total, start, A, R, K, inner, aligned,
    STORED: tl.constexpr, DOT: tl.constexpr, ELEMENT: tl.constexpr, VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """COLUMNS entries of z = Wᵀu from `start` on, and the sum that DOT chooses."""
    SUM: tl.constexpr = y.dtype.element_ty
    C = A * K
    norm = _root(factor_total, STORED, SUM)
    c = tl.multiple_of(start // COLUMNS * COLUMNS, COLUMNS) + tl.arange(
        0, COLUMNS
    )  # start, as the compiler likes it
    acc = tl.zeros((SPAN, COLUMNS), SUM)
    if aligned:
        weight = _aligned(address, ELEMENT)
        length = tl.multiple_of(C // VECTOR * VECTOR, VECTOR)
        for at in range(0, R, SPAN):
            r = at + tl.arange(0, SPAN)
            x = _factor(y, u, r, r < R, norm, R, R, STORED, SUM)
            w_at = r[:, None].to(tl.int64) * length + c[None, :]
            w = tl.load(weight + w_at, mask=(r[:, None] < R) & (c[None, :] < length), other=0.0)
            acc += w.to(SUM) * x[:, None]
    else:
        weight = address.to(tl.pointer_type(ELEMENT))
        column_at = _column_at(c, R, K)
        for at in range(0, R, SPAN):
            r = at + tl.arange(0, SPAN)
            x = _factor(y, u, r, r < R, norm, R, R, STORED, SUM)
            w_at = r[:, None].to(tl.int64) * K + column_at[None, :]
            w = tl.load(weight + w_at, mask=(r[:, None] < R) & (c[None, :] < C), other=0.0)
            acc += w.to(SUM) * x[:, None]
    result = tl.sum(acc, 0)
    tl.store(z + c, result, mask=c < C)
    wide = result.to(tl.float64)
    if DOT:
        wide *= tl.load(v + _stored_at(c, C, inner), mask=c < C, other=0.0).to(tl.float64)
    else:
        wide *= wide
    return tl.sum(wide, 0)


@triton.jit
def _root(total, STORED: tl.constexpr, SUM: tl.constexpr):
    """The norm of a product from its sum of squares; stored vectors are normalized already."""
    return 1.0 if STORED else tl.sqrt(total).to(SUM)


@triton.jit
def _aligned(address, ELEMENT: tl.constexpr):
    """A pointer of its own to an address that is known to be a multiple of 16 bytes: loads of 16 bytes at once.

    The hint belongs to the value it is given to, so the branch for other addresses must not use the same one.
    """
    return tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), 16)


@triton.jit
def _total(partial_ptr, first_tile_ptr, layer, BLOCK_T: tl.constexpr):
    """The partial sums of all tiles of a layer, always added in the same order."""
    begin = tl.load(first_tile_ptr + layer)
    end = tl.load(first_tile_ptr + layer + 1)
    total = tl.zeros((BLOCK_T,), partial_ptr.dtype.element_ty)
    for at in range(begin, end, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        total += tl.load(partial_ptr + t, mask=t < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _column_at(c, R, K):
    """Where column c starts: weights lie in memory as (A, R, K)."""
    a = c // K
    return a.to(tl.int64) * R * K + (c - a * K)


@triton.jit
def _stored_at(c, C, inner):
    """Where the stored v has the entry of column c: in memory, `inner` columns lie at each place of a kernel."""
    return (c % inner) * (C // inner) + c // inner


@triton.jit
def _normalized(raw_ptr, stored_ptr, at, stored_at, inside, norm, SUM: tl.constexpr):
    """Raw / norm, or what was stored where the product vanished: a zero weight must not lose its vectors."""
    norm = tl.where(inside, norm, 1.0)
    vanished = norm == 0
    old = tl.load(stored_ptr + stored_at, mask=vanished, other=0.0).to(SUM)
    raw = tl.load(raw_ptr + at, mask=inside, other=0.0)
    return tl.where(vanished, old, raw / tl.where(vanished, 1.0, norm))


@triton.jit
def _factor(raw_ptr, stored_ptr, at, inside, norm, length, inner, STORED: tl.constexpr, SUM: tl.constexpr):
    """The vector a product multiplies with."""
    stored_at = _stored_at(at, length, inner)
    if STORED:
        x = tl.load(stored_ptr + stored_at, mask=inside, other=0.0).to(SUM)
    else:
        x = _normalized(raw_ptr, stored_ptr, at, stored_at, inside, norm, SUM)
    return x
