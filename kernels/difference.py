"""Difference penalties of many weights in one launch: values, and gradients added in place. Not yet run on a GPU.

A program handles one tile of a weight. There are two kinds:

- Row tiles, for aligned weights with one axis and long rows: a few rows, and the one or two before and behind them, are
  loaded once and all together; 12 bytes per float32 entry go to and from memory.
- Flat tiles, for everything else: a run of entries, each loaded with its neighbours along every axis.

Every program leaves the sums of its tile. The last one to finish a tensor adds them up, the last one to finish all
tensors adds those, both in the order of the table: integer tickets tell who is last, and the bits do not depend on it.

``normalized`` and the norm l21 need sums over a whole tensor before the first gradient: they take two launches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _stencil(rows, i, n, factors, ORDER: tl.constexpr, NORM: tl.constexpr):
    """For row ``i`` of ``n``, the middle one of ``rows``: the value of the difference that starts there, and the slopes
    of all differences that contain it. A NaN comes through.

    l2 leaves its factor 2 to `_scales`, l21 the values to `group_kernel`.
    """
    MIDDLE: tl.constexpr = len(rows) // 2
    value = 0.0
    slopes = ()
    for back in tl.static_range(ORDER + 1):
        d = rows[MIDDLE - back + 1] - rows[MIDDLE - back]
        if ORDER == 2:  # a difference of differences: neighbours are close, so the first ones are exact
            d = (rows[MIDDLE - back + 2] - rows[MIDDLE - back + 1]) - d
        m = i - back
        exists = (m >= 0) & (m < n - ORDER)
        d = tl.where(exists, d, 0.0)
        if back == 0:
            if NORM == "l1":
                value = tl.abs(d)
            elif NORM == "huber":
                value = tl.where(tl.abs(d) > 1, tl.abs(d) - 0.5, 0.5 * d * d)
            else:
                value = d * d
        if NORM == "l1":
            d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
        elif NORM == "huber":
            d = tl.where(d > 1, 1.0, tl.where(d < -1, -1.0, d))
        elif NORM == "l21":
            d *= tl.load(factors + m, mask=exists, other=0.0)
        slopes += (d,)
    if ORDER == 1:
        gradient = slopes[1] - slopes[0]
    else:
        gradient = slopes[0] - 2 * slopes[1] + slopes[2]
    return value, gradient


@triton.jit
def _add_row(rows, i, n, sums, gradient, scales, factors, groups, ORDERS: tl.constexpr, NORM: tl.constexpr):
    """``sums`` and ``gradient`` with the share of row ``i``, the middle one of ``rows``."""
    updated = ()
    for k in tl.static_range(len(ORDERS)):
        value, slopes = _stencil(rows, i, n, factors + k * groups, ORDERS[k], NORM)
        updated += (sums[k] + value,)
        gradient += scales[k] * slopes
    return updated, gradient


@triton.jit
def _row_tile(
    record,
    weight,
    grad,
    scales,
    factors,
    groups,
    ORDERS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``ROWS`` rows of one axis, of up to ``COLUMNS`` neighbouring entries each; all loads have 128 bits.

    A block of its own keeps the compiler from using the first rows before it has asked for the last; it would also move
    the loads into the block if nothing behind it needed what they bring, which is why every launch takes the sums.
    """
    COMPUTE: tl.constexpr = factors.dtype.element_ty
    REACH: tl.constexpr = ORDERS[len(ORDERS) - 1]
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    first = tl.multiple_of(tl.load(record + 1), VECTOR)
    width = tl.multiple_of(tl.load(record + 2).to(tl.int32), VECTOR)
    i = tl.load(record + 3).to(tl.int32)
    n = tl.load(record + 4).to(tl.int32)
    stride = tl.multiple_of(tl.load(record + 5).to(tl.int32), VECTOR)
    factors += tl.load(record + 6)
    weight = tl.multiple_of(weight.to(tl.pointer_type(DTYPE)), 16) + first
    grad = tl.multiple_of(grad.to(tl.pointer_type(GRAD_DTYPE)), 16) + first
    lane = tl.arange(0, COLUMNS)
    inside = lane < width

    grads = ()
    if GRADIENT == "add":
        for k in tl.static_range(ROWS):
            grads += (tl.load(grad + (k * stride + lane), mask=inside & (i + k < n), other=0.0),)
    rows = ()
    for k in tl.static_range(-REACH, ROWS + REACH):
        exists = i + k >= 0 if k < 0 else i + k < n
        rows += (tl.load(weight + (k * stride + lane), mask=inside & exists, other=0.0),)

    zeros = tl.zeros([COLUMNS], COMPUTE)
    squares = zeros
    sums = (zeros,) * len(ORDERS)
    if width > 0:  # always
        for k in tl.static_range(ROWS):
            near = ()
            for j in tl.static_range(2 * REACH + 1):
                near += (rows[k + j].to(COMPUTE),)
            gradient = zeros
            if GRADIENT == "add":
                gradient = grads[k].to(COMPUTE)
            if NORMALIZED:
                squares += near[REACH] * near[REACH]
                gradient += scales[len(ORDERS)] * near[REACH]
            sums, gradient = _add_row(near, i + k, n, sums, gradient, scales, factors, groups, ORDERS, NORM)
            if GRADIENT != "none":
                tl.store(grad + (k * stride + lane), gradient.to(GRAD_DTYPE), mask=inside & (i + k < n))
    return _totals(sums + (squares,))


@triton.jit
def _flat_tile(
    record,
    weight,
    grad,
    scales,
    factors,
    groups,
    ORDERS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    AXES: tl.constexpr,
    INDEX: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Up to ``ENTRIES`` neighbouring entries, with those before and behind them along every axis."""
    COMPUTE: tl.constexpr = factors.dtype.element_ty
    REACH: tl.constexpr = ORDERS[len(ORDERS) - 1]
    lane = tl.arange(0, ENTRIES)
    inside = lane < tl.load(record + 2)
    entry = tl.load(record + 1).to(INDEX) + lane
    weight = weight.to(tl.pointer_type(DTYPE))
    grad = grad.to(tl.pointer_type(GRAD_DTYPE))
    x = tl.load(weight + entry, mask=inside, other=0.0).to(COMPUTE)
    zeros = tl.zeros([ENTRIES], COMPUTE)
    gradient = zeros
    if GRADIENT == "add":
        gradient = tl.load(grad + entry, mask=inside, other=0.0).to(COMPUTE)
    squares = x * x
    if NORMALIZED:
        gradient += scales[len(ORDERS)] * x
    sums = (zeros,) * len(ORDERS)
    for axis in tl.static_range(AXES):
        n = tl.load(record + 4 + 3 * axis).to(INDEX)
        stride = tl.load(record + 5 + 3 * axis).to(INDEX)
        i = entry // stride % n
        near = ()
        for k in tl.static_range(-REACH, REACH + 1):
            if k == 0:
                near += (x,)
            else:
                exists = inside & (i + k >= 0) & (i + k < n)
                near += (tl.load(weight + entry + k * stride, mask=exists, other=0.0).to(COMPUTE),)
        group = factors + tl.load(record + 6 + 3 * axis)
        sums, gradient = _add_row(near, i, n, sums, gradient, scales, group, groups, ORDERS, NORM)
    if GRADIENT != "none":
        tl.store(grad + entry, gradient.to(GRAD_DTYPE), mask=inside)
    return _totals(sums + (squares,))


@triton.jit
def _totals(sums):
    totals = ()
    for k in tl.static_range(len(sums)):
        totals += (tl.sum(sums[k]),)
    return totals


@triton.jit
def _sum(x, count):
    """Sum of ``x[:count]``, always in the same order. Not through the first-level cache: other programs wrote ``x``."""
    total = tl.zeros([2048], tl.float64)
    for first in range(0, count, 2048):
        at = first + tl.arange(0, 2048)
        total += tl.load(x + at, mask=at < count, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total)


@triton.jit
def _is_last(ticket, count):
    """Whether ``count - 1`` programs came here before. What they have stored can be read then."""
    tl.debug_barrier()  # the ticket is one thread's; this puts the stores of all threads before it
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def _scales(
    coefficients,
    sums,
    tensor,
    tensors,
    ORDERS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
):
    """Factor of the slopes of each order, and of the weight itself (the derivative of the scale of `normalized`)."""
    inverse = 1.0
    decay = 0.0
    if NORMALIZED:
        inverse = tl.load(sums + len(ORDERS) * tensors + tensor)
    scales = ()
    for k in tl.static_range(len(ORDERS)):
        coefficient = tl.load(coefficients + k).to(sums.dtype.element_ty)
        if NORMALIZED:
            decay -= coefficient * tl.load(sums + k * tensors + tensor)
        scales += (coefficient * inverse * (2 if NORM == "l2" else 1),)
    if NORMALIZED:
        scales += (decay * tl.load(sums + (len(ORDERS) + 1) * tensors + tensor),)
    return scales


@triton.jit
def _finish(
    coefficients,
    sums,
    values,
    totals,
    squares,
    tickets,
    tensor,
    tensors,
    ORDERS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Leave the terms of a finished tensor in ``sums``; the last tensor's program adds them up in ``values``."""
    scale = 1.0
    if NORMALIZED:
        exists = squares != 0  # a zero tensor adds nothing; a NaN has to come through
        squares = tl.where(exists, squares, 1.0)
        inverse = tl.where(exists, 1 / (squares if NORM == "l2" else tl.sqrt(squares)), 0.0)
        tl.store(sums + len(ORDERS) * tensors + tensor, inverse)
        tl.store(sums + (len(ORDERS) + 1) * tensors + tensor, (2 if NORM == "l2" else 1) / squares)
        scale = inverse
    for k in tl.static_range(len(ORDERS)):
        tl.store(sums + k * tensors + tensor, totals[k] * scale)
    if _is_last(tickets + tensors, tensors):
        for k in tl.static_range(len(ORDERS)):
            value = _sum(sums + k * tensors, tensors)
            if WEIGHTED:
                value *= tl.load(coefficients + k).to(tl.float64)
            tl.store(values + k, value)


@triton.jit(do_not_specialize=["tensors", "groups", "row_tiles"], do_not_specialize_on_alignment=["coefficients"])
def difference_kernel(
    tiles,  # int64 [programs, 4 + 3 * AXES]: tensor, first entry, columns, row; for each axis rows, stride, first group
    addresses,  # int64 [tensors, 2]: weight, gradient
    spans,  # int64 [tensors, 2]: first tile, number of tiles
    coefficients,  # [orders]
    factors,  # [orders, groups]: for l21, 1 / length of each difference; its dtype is that of all arithmetic
    partials,  # [orders + 1, programs]: sums of each tile
    sums,  # [orders + 2, tensors]: terms; where normalized, 1 / scale and its logarithmic derivative, negated
    tickets,  # int32 [tensors + 1]: zeros before and after a launch
    values,  # [orders]: the terms, times their coefficients where WEIGHTED
    tensors,
    groups,
    row_tiles,  # the first ones of the table
    ORDERS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    VALUES: tl.constexpr,
    GRADIENT: tl.constexpr,  # "none", "write" or "add"
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    AXES: tl.constexpr,
    ROW_TILES: tl.constexpr,
    FLAT_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    record = tiles + tile * (4 + 3 * AXES)
    tensor = tl.load(record)
    weight = tl.load(addresses + 2 * tensor)
    grad = tl.load(addresses + 2 * tensor + 1)
    scales = (0.0, 0.0, 0.0)
    if GRADIENT != "none":
        scales = _scales(coefficients, sums, tensor, tensors, ORDERS, NORM, NORMALIZED)
    if ROW_TILES and (not FLAT_TILES or tile < row_tiles):
        totals = _row_tile(
            record,
            weight,
            grad,
            scales,
            factors,
            groups,
            ORDERS,
            NORM,
            NORMALIZED,
            GRADIENT,
            DTYPE,
            GRAD_DTYPE,
            ROWS,
            COLUMNS,
        )
    else:
        totals = _flat_tile(
            record,
            weight,
            grad,
            scales,
            factors,
            groups,
            ORDERS,
            NORM,
            NORMALIZED,
            GRADIENT,
            DTYPE,
            GRAD_DTYPE,
            AXES,
            INDEX,
            ENTRIES,
        )
    programs = tl.num_programs(0).to(tl.int64)
    for k in tl.static_range(len(ORDERS) + NORMALIZED):
        tl.store(partials + k * programs + tile, totals[k])
    if VALUES:
        first = tl.load(spans + 2 * tensor)
        count = tl.load(spans + 2 * tensor + 1)
        if _is_last(tickets + tensor, count):
            whole = ()
            for k in tl.static_range(len(ORDERS)):
                whole += (_sum(partials + k * programs + first, count),)
            squares = 0.0
            if NORMALIZED:
                squares = _sum(partials + len(ORDERS) * programs + first, count)
            _finish(
                coefficients,
                sums,
                values,
                whole,
                squares,
                tickets,
                tensor,
                tensors,
                ORDERS,
                NORM,
                NORMALIZED,
                WEIGHTED,
            )


@triton.jit
def _lengths(axes, partials, factors, ORDER: tl.constexpr, EPS: tl.constexpr, AXES: tl.constexpr):
    """Sum of the lengths of a tensor's differences; ``1 / length`` of each one goes to ``factors``."""
    total = tl.zeros([64], tl.float64)
    for axis in tl.static_range(AXES):
        n = tl.load(axes + 5 * axis)
        blocks = tl.load(axes + 5 * axis + 1)
        slots = tl.load(axes + 5 * axis + 2)
        slot = tl.load(axes + 5 * axis + 3)
        group = tl.load(axes + 5 * axis + 4)
        for first in range(0, n, 64):
            m = first + tl.arange(0, 64)
            square = tl.zeros([64], tl.float64)
            for block in range(0, blocks, 16):
                b = block + tl.arange(0, 16)[:, None]
                at = partials + slot + b * slots + m[None, :]
                part = tl.load(at, mask=(b < blocks) & (m < n)[None, :], other=0.0, cache_modifier=".cg")
                square += tl.sum(part.to(tl.float64), axis=0)
            exists = m < n - ORDER
            length = tl.sqrt(square + EPS)
            tl.store(factors + group + m, tl.where(exists, 1 / length, 0.0), mask=m < n)
            total += tl.where(exists, length, 0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["tensors", "groups", "slots"], do_not_specialize_on_alignment=["coefficients"])
def group_kernel(
    tiles,  # int64 [programs, 8]: tensor, first row, first column, slot of the first row, rows, stride, columns, counts
    addresses,
    spans,
    coefficients,
    axes,  # int64 [tensors, AXES, 5]: rows, column blocks, slots of a block, first slot, first group
    factors,  # [orders, groups]: 1 / length of each difference
    partials,  # [orders, slots]: squared length of each difference within a column block
    squares,  # [programs]
    sums,
    tickets,
    values,
    tensors,
    groups,
    slots,
    ORDERS: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    AXES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """First launch of the norm l21: the lengths of the differences. Arguments not described: `difference_kernel`."""
    tile = tl.program_id(0).to(tl.int64)
    record = tiles + 8 * tile
    tensor = tl.load(record)
    i = (tl.load(record + 1) + tl.arange(0, ROWS)).to(INDEX)[:, None]
    column = (tl.load(record + 2) + tl.arange(0, COLUMNS)).to(INDEX)[None, :]
    slot = tl.load(record + 3)
    n = tl.load(record + 4).to(INDEX)
    stride = tl.load(record + 5).to(INDEX)
    weight = tl.load(addresses + 2 * tensor).to(tl.pointer_type(DTYPE))
    weight += i * stride + column + column // stride * ((n - 1) * stride)
    inside = column < tl.load(record + 6)
    near = ()
    for k in tl.static_range(ORDERS[len(ORDERS) - 1] + 1):
        near += (tl.load(weight + k * stride, mask=inside & (i + k < n), other=0.0).to(factors.dtype.element_ty),)
    for k in tl.static_range(len(ORDERS)):
        d = near[1] - near[0]
        if ORDERS[k] == 2:
            d = (near[2] - near[1]) - d
        d = tl.where(i < n - ORDERS[k], d, 0.0)
        tl.store(partials + k * slots + slot + tl.arange(0, ROWS), tl.sum(d * d, axis=1))
    if NORMALIZED:
        counts = tl.load(record + 7) != 0  # along one axis of the tensor
        tl.store(squares + tile, tl.where(counts, tl.sum(near[0] * near[0]), 0.0))
    first = tl.load(spans + 2 * tensor)
    count = tl.load(spans + 2 * tensor + 1)
    if _is_last(tickets + tensor, count):
        whole = ()
        for k in tl.static_range(len(ORDERS)):
            axis = axes + tensor * (5 * AXES)
            whole += (_lengths(axis, partials + k * slots, factors + k * groups, ORDERS[k], EPS, AXES),)
        square = 0.0
        if NORMALIZED:
            square = _sum(squares + first, count)
        _finish(
            coefficients,
            sums,
            values,
            whole,
            square,
            tickets,
            tensor,
            tensors,
            ORDERS,
            "l21",
            NORMALIZED,
            WEIGHTED,
        )
