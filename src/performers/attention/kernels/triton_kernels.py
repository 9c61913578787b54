# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false, reportPossiblyUnboundVariable=false, reportMissingImports=false, reportInvalidTypeForm=false
"""FAVOR attention on a GPU: the kernels. `triton_backend` launches them and says what each one is for.

Letters: u a projected token; a = log phi(q), b = log phi(k); S, z, c a summary of keys (numerator, denominator, log scale per
feature); R, r, c the same of queries, for gradients. A *job* is a span of rows of one sequence, (batch, first row, last row + 1,
slot): the slot says which summary it reads or writes. A *run* is the jobs [first, last) of one sequence.

Feature blocks are walked in a loop, so that neither M nor D is limited by registers. Sums, maxima and exponentials are float32.
Products are taken in the type DOT, with the precision PRECISION where that is float32. With SPLIT the rows of W come in two
parts, whose products with a token are added: 16-bit tokens are exact in DOT, and so are then the exponents to about 2^-17.
"""

import triton
import triton.language as tl

from performers.attention.features import RELU_EPSILON
from performers.attention.kernels.state import DENOMINATOR_FLOOR

EPSILON = tl.constexpr(RELU_EPSILON)
FLOOR = tl.constexpr(DENOMINATOR_FLOOR)


@triton.jit
def _finite(log):
    return tl.where(log == float("-inf"), 0.0, log)


@triton.jit
def _guarded(denominator):
    floor = tl.where(denominator < 0, -FLOOR, FLOOR)
    return tl.where(tl.abs(denominator) < FLOOR, floor, denominator)


@triton.jit
def _rounded(x):
    """float32 numbers rounded to bfloat16, kept as float32. Triton's interpreter, which truncates, needs to be told how."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _dot(x, y, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x y, multiplied in the type DOT and added up in float32."""
    if PRECISION == "emulated":  # bfloat16, which the interpreter cannot multiply
        if x.dtype == tl.float32:
            x = _rounded(x)
        if y.dtype == tl.float32:
            y = _rounded(y)
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x.to(DOT), y.to(DOT), input_precision=PRECISION)


@triton.jit
def _cast(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """float32 numbers as a product in the type DOT sees them, for a sum that is to agree with the product."""
    if PRECISION == "emulated":
        return _rounded(x)
    else:
        return x.to(DOT).to(tl.float32)


@triton.jit
def _dot_wide(x, y, DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """x y for tokens x and a summary y in float32, of which with SPLIT no digits are lost.

    The gradient of a feature is what is left when such a product nearly cancels.
    """
    product = _dot(x, y, DOT, PRECISION)
    if SPLIT and tl.bfloat16 == DOT:
        product += _dot(x, y - _cast(y, DOT, PRECISION), DOT, PRECISION)
    return product


@triton.jit
def _pull(
    d_u, high, low, features, d,
    M: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_u W, (L, D): the gradient of tokens from that of their projections (L, M). The terms cancel, too."""
    rows = _of_features(high, features, d, M, D)
    d_x = _dot(d_u, rows, DOT, PRECISION)
    if SPLIT and tl.bfloat16 == DOT:
        d_x += _dot(d_u - _cast(d_u, DOT, PRECISION), rows, DOT, PRECISION)
        d_x += _dot(d_u, _of_features(low, features, d, M, D), DOT, PRECISION)
    return d_x


@triton.jit
def _function(u, KIND: tl.constexpr):
    """phi(u) of a pointwise kernel."""
    if KIND == "relu":
        return tl.maximum(u, 0.0) + EPSILON
    elif KIND == "elu":
        return tl.where(u > 0, u + 1.0, tl.exp(tl.minimum(u, 0.0)))
    elif KIND == "abs":
        return tl.abs(u)
    elif KIND == "sigmoid":
        return tl.sigmoid(u)
    elif KIND == "tanh":
        return 2.0 * tl.sigmoid(2.0 * u) - 1.0
    elif KIND == "cos":
        return tl.cos(u)
    elif KIND == "gelu":
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    else:
        return u


@triton.jit
def _derivative(u, KIND: tl.constexpr):
    """phi'(u) of a pointwise kernel."""
    if KIND == "relu":
        return tl.where(u > 0, 1.0, 0.0)
    elif KIND == "elu":
        return tl.exp(tl.minimum(u, 0.0))
    elif KIND == "abs":
        return tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0))
    elif KIND == "sigmoid":
        s = tl.sigmoid(u)
        return s * (1.0 - s)
    elif KIND == "tanh":
        s = tl.sigmoid(2.0 * u)
        return 4.0 * s * (1.0 - s)
    elif KIND == "cos":
        return -tl.sin(u)
    elif KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        return u * 0.0 + 1.0


@triton.jit
def _tile(pointer, rows, stride, keep, columns, COLUMNS: tl.constexpr):
    """The rows (L, .) of a matrix, zero where `keep` (L,) is false."""
    mask = keep[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _put(pointer, rows, stride, keep, columns, COLUMNS: tl.constexpr, x, PRECISION: tl.constexpr):
    if PRECISION == "emulated":
        x = _rounded(x)
    mask = keep[:, None] & (columns < COLUMNS)[None, :]
    tl.store(
        pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], x.to(pointer.dtype.element_ty), mask=mask
    )


@triton.jit
def _of_features(pointer, features, columns, M: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows (M, .) of a contiguous matrix that belong to a block of features."""
    mask = (features < M)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + features[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _project(
    x, high, low, features, d,
    M: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = x W^T, (L, M), of tokens x (L, D) in the type of W."""
    u = _dot(x, tl.trans(_of_features(high, features, d, M, D)), DOT, PRECISION)
    if SPLIT:
        u += _dot(x, tl.trans(_of_features(low, features, d, M, D)), DOT, PRECISION)
    return u


@triton.jit
def _key_weights(k, metric, real, d, D: tl.constexpr):
    """t of keys k (L, D): -1/2 sum metric k^2; -inf where a key is no key, or so far out that its square overflows."""
    k = k.to(tl.float32)
    t = -0.5 * tl.sum(k * k * tl.load(metric + d, mask=d < D, other=0.0)[None, :], 1)
    return tl.where(real & (tl.abs(t) < float("inf")), t, float("-inf"))


@triton.jit
def _log_keys(u, t, bias, features, M: tl.constexpr):
    """b (L, M): -inf for what is no key or no feature."""
    b = u + tl.load(bias + features, mask=features < M, other=0.0)[None, :] + t[:, None]
    return tl.where((t > float("-inf"))[:, None] & (features < M)[None, :], b, float("-inf"))


@triton.jit
def _job(jobs, index):
    return (
        tl.load(jobs + index * 4).to(tl.int64),
        tl.load(jobs + index * 4 + 1),
        tl.load(jobs + index * 4 + 2),
        tl.load(jobs + index * 4 + 3).to(tl.int64),
    )


@triton.jit
def summarise(
    x_ptr, x_b, x_h, x_l,
    value_ptr, value_b, value_h, value_l,
    norm_ptr, norm_b, norm_h,
    slope_ptr, slope_b, slope_h,
    mask_ptr, mask_b,
    high_ptr, low_ptr, w_b, w_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    jobs_ptr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, MASKED: tl.constexpr, EXPONENTIAL: tl.constexpr, KIND: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of features of the summary of a job's rows.

    Of keys: sum phi(k) v^T and sum phi(k). With QUERIES, of queries, where `norm` is each row's (log) denominator and `slope` its
    d_out . out: sum phi(q) / denominator d_out^T and -sum phi(q) / denominator slope, the gradients with respect to the former.
    """
    job, head = tl.program_id(0), tl.program_id(1)
    features = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, start, stop, slot = _job(jobs_ptr, job)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    x_ptr += batch * x_b + head.to(tl.int64) * x_h
    value_ptr += batch * value_b + head.to(tl.int64) * value_h
    norm_ptr += batch * norm_b + head.to(tl.int64) * norm_h
    slope_ptr += batch * slope_b + head.to(tl.int64) * slope_h
    mask_ptr += batch * mask_b
    high = _of_features(high_ptr + batch * w_b + head * w_h, features, d, M, D)
    low = high
    if SPLIT:
        low = _of_features(low_ptr + batch * w_b + head * w_h, features, d, M, D)
    metric = tl.load(metric_ptr + batch * metric_b + head * metric_h + d, mask=d < D, other=0.0)
    bias = tl.load(bias_ptr + batch * bias_b + head * bias_h + features, mask=features < M, other=0.0)

    numerator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    scale = tl.zeros((BLOCK_M,), tl.float32)
    if EXPONENTIAL:
        scale += float("-inf")
    for first in range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        real = rows < stop
        if MASKED:
            real = real & (tl.load(mask_ptr + rows, mask=real, other=0) != 0)
        # Features stand in rows here, (M, L): the sum over tokens is then a product with the features as its left side.
        x = tl.load(
            x_ptr + rows.to(tl.int64)[None, :] * x_l + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0
        )
        v = _tile(value_ptr, rows, value_l, real, e, DV)
        u = _dot(high, x, DOT, PRECISION)
        if SPLIT:
            u += _dot(low, x, DOT, PRECISION)
        weight = tl.where(real, 1.0, 0.0)
        if QUERIES:
            norm = tl.load(norm_ptr + rows, mask=real, other=0.0)
            weight = -tl.load(slope_ptr + rows, mask=real, other=0.0)
        if EXPONENTIAL:
            if QUERIES:
                log_weight = tl.where(norm > float("-inf"), -norm, float("-inf"))
                log_phi = u + log_weight[None, :]
            else:
                wide = x.to(tl.float32)
                log_weight = -0.5 * tl.sum(wide * wide * metric[:, None], 0)
                log_weight = tl.where(tl.abs(log_weight) < float("inf"), log_weight, float("-inf"))
                log_phi = u + bias[:, None] + log_weight[None, :]
            counts = real & (log_weight > float("-inf"))
            log_phi = tl.where(counts[None, :] & (features < M)[:, None], log_phi, float("-inf"))
            largest = tl.maximum(scale, tl.max(log_phi, 1))
            keep = tl.exp(scale - _finite(largest))
            phi = tl.exp(log_phi - _finite(largest)[:, None])
            numerator, denominator, scale = numerator * keep[:, None], denominator * keep, largest
        else:
            phi = tl.where(real[None, :] & (features < M)[:, None], _function(u, KIND), 0.0)
            if QUERIES:
                phi = phi / _guarded(norm)[None, :]
        numerator += _dot(phi, v, DOT, PRECISION)
        denominator += tl.sum(_cast(phi, DOT, PRECISION) * weight[None, :], 1)

    place = (slot * H + head) * M
    within = (features < M)[:, None] & (e < DV)[None, :]
    tl.store(numerator_ptr + place * DV + features[:, None] * DV + e[None, :], numerator, mask=within)
    tl.store(denominator_ptr + place + features, denominator, mask=features < M)
    tl.store(scale_ptr + place + features, scale, mask=features < M)


@triton.jit
def scan(
    part_numerator_ptr, part_denominator_ptr, part_scale_ptr,
    past_numerator_ptr, past_denominator_ptr, past_scale_ptr,
    after_numerator_ptr, after_denominator_ptr, after_scale_ptr,
    runs_ptr,
    H: tl.constexpr, M: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, EXPONENTIAL: tl.constexpr,
):  # fmt: skip
    """Add the summaries of a run's jobs to the one before, in order. With EXCLUSIVE, each is replaced by the sum before it."""
    run, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    features, e = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    first, last = tl.load(runs_ptr + run * 2), tl.load(runs_ptr + run * 2 + 1)
    rows = features < M
    within = rows[:, None] & (e < DV)[None, :]
    flat = features[:, None] * DV + e[None, :]
    place = (run * H + head) * M
    numerator = tl.load(past_numerator_ptr + place * DV + flat, mask=within, other=0.0)
    denominator = tl.load(past_denominator_ptr + place + features, mask=rows, other=0.0)
    scale = tl.load(past_scale_ptr + place + features, mask=rows, other=0.0)
    for index in range(first, last):
        job = index
        if REVERSE:
            job = last - 1 - (index - first)
        at = (job.to(tl.int64) * H + head) * M
        part_numerator = tl.load(part_numerator_ptr + at * DV + flat, mask=within, other=0.0)
        part_denominator = tl.load(part_denominator_ptr + at + features, mask=rows, other=0.0)
        part_scale = tl.load(part_scale_ptr + at + features, mask=rows, other=0.0)
        if EXCLUSIVE:
            # Small tensors are held by several threads each: all of them must have read before one writes.
            tl.debug_barrier()
            tl.store(part_numerator_ptr + at * DV + flat, numerator, mask=within)
            tl.store(part_denominator_ptr + at + features, denominator, mask=rows)
            tl.store(part_scale_ptr + at + features, scale, mask=rows)
        if EXPONENTIAL:
            largest = tl.maximum(scale, part_scale)
            keep, part_keep = tl.exp(scale - _finite(largest)), tl.exp(part_scale - _finite(largest))
            numerator = numerator * keep[:, None] + part_numerator * part_keep[:, None]
            denominator = denominator * keep + part_denominator * part_keep
            scale = largest
        else:
            numerator += part_numerator
            denominator += part_denominator
    tl.store(after_numerator_ptr + place * DV + flat, numerator, mask=within)
    tl.store(after_denominator_ptr + place + features, denominator, mask=rows)
    tl.store(after_scale_ptr + place + features, scale, mask=rows)


@triton.jit
def read(
    q_ptr, q_b, q_h, q_l,
    k_ptr, k_b, k_h, k_l,
    v_ptr, v_b, v_h, v_l,
    out_ptr, out_b, out_h, out_l,
    norm_ptr, norm_b, norm_h,
    mask_ptr, mask_b,
    q_high_ptr, q_low_ptr, qw_b, qw_h,
    k_high_ptr, k_low_ptr, kw_b, kw_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    jobs_ptr,
    LOST_BELOW: tl.constexpr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr, EXPONENTIAL: tl.constexpr, KIND: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a job's queries, which see a summary and, with CAUSAL, the keys of the same rows up to their own.

    With NORM the (log) denominators are written as well. The weights within a job are products of features at scales of single
    tokens, as in `exponential`; a row for which that is not enough gets the log denominator NaN and is left to `read_exact`.
    """
    job, head = tl.program_id(0), tl.program_id(1)
    batch, start, stop, slot = _job(jobs_ptr, job)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    rows = start + tl.arange(0, ROWS)
    inside = rows < stop
    wide_head = head.to(tl.int64)
    q = _tile(q_ptr + batch * q_b + wide_head * q_h, rows, q_l, inside, d, D)
    q_high_ptr += batch * qw_b + head * qw_h
    q_low_ptr += batch * qw_b + head * qw_h
    place = (slot * H + head) * M
    numerator_ptr += place * DV
    denominator_ptr += place
    scale_ptr += place

    numerator = tl.zeros((ROWS, BLOCK_V), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    divisor = tl.zeros((ROWS,), tl.float32)  # the denominator of features rounded as those of the numerator are
    peak = tl.zeros((ROWS,), tl.float32) + float("-inf")
    if CAUSAL:
        k_high_ptr += batch * kw_b + head * kw_h
        k_low_ptr += batch * kw_b + head * kw_h
        bias_ptr += batch * bias_b + head * bias_h
        real = inside
        if MASKED:
            real = real & (tl.load(mask_ptr + batch * mask_b + rows, mask=inside, other=0) != 0)
        k = _tile(k_ptr + batch * k_b + wide_head * k_h, rows, k_l, real, d, D)
        t = _key_weights(k, metric_ptr + batch * metric_b + head * metric_h, real, d, D)
        k = k
        products = tl.zeros((ROWS, ROWS), tl.float32)
        peak_a = tl.zeros((ROWS,), tl.float32) + float("-inf")
        peak_b = tl.zeros((ROWS,), tl.float32) + float("-inf")
    for first in range(0, M, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        known = features < M
        u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
        state = _of_features(numerator_ptr, features, e, M, DV)
        z = tl.load(denominator_ptr + features, mask=known, other=0.0)
        if EXPONENTIAL:
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            a = tl.where(known[None, :], u, float("-inf"))
            log_phi = a + c[None, :]
            largest = tl.maximum(peak, tl.max(log_phi, 1))
            keep = tl.exp(peak - _finite(largest))
            phi = tl.exp(log_phi - _finite(largest)[:, None])
            numerator, denominator, peak = numerator * keep[:, None], denominator * keep, largest
            divisor = divisor * keep
        else:
            phi = tl.where(known[None, :], _function(u, KIND), 0.0)
        numerator += _dot(phi, state, DOT, PRECISION)
        denominator += tl.sum(phi * z[None, :], 1)
        divisor += tl.sum(_cast(phi, DOT, PRECISION) * z[None, :], 1)
        if CAUSAL:
            u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            if EXPONENTIAL:
                b = _log_keys(u, t, bias_ptr, features, M)
                largest_a, largest_b = tl.maximum(peak_a, tl.max(a, 1)), tl.maximum(peak_b, tl.max(b, 1))
                keep_a, keep_b = tl.exp(peak_a - largest_a), tl.exp(peak_b - _finite(largest_b))
                products = products * keep_a[:, None] * keep_b[None, :]
                peak_a, peak_b = largest_a, largest_b
                phi_q = tl.exp(a - peak_a[:, None])
                phi_k = tl.exp(b - _finite(peak_b)[:, None])
            else:
                phi_q = phi
                phi_k = tl.where(real[:, None] & known[None, :], _function(u, KIND), 0.0)
            products += _dot(phi_q, tl.trans(phi_k), DOT, PRECISION)

    if CAUSAL:
        earlier = tl.arange(0, ROWS)[None, :] <= tl.arange(0, ROWS)[:, None]
        v = _tile(v_ptr + batch * v_b + wide_head * v_h, rows, v_l, real, e, DV)
        if EXPONENTIAL:
            largest = tl.max(tl.where(earlier, peak_b[None, :], float("-inf")), 1)
            running = _finite(largest)
            decay = tl.exp(tl.where(earlier, peak_b[None, :] - running[:, None], float("-inf")))
            weights = products * decay
            own = tl.sum(weights, 1)
            scale = peak_a + running
            log_past = tl.where(denominator > 0, peak + tl.log(denominator), float("-inf"))
            log_own = tl.where(own > 0, scale + tl.log(own), float("-inf"))
            top = tl.maximum(log_past, log_own)
            log_all = top + tl.log(tl.exp(log_past - _finite(top)) + tl.exp(log_own - _finite(top)))
            log_all = tl.where(top > float("-inf"), log_all, float("-inf"))
            safe = _finite(log_all)
            share_past = tl.where(denominator > 0, tl.exp(peak - safe), 0.0)
            share_own = tl.where(own > 0, tl.exp(scale - safe), 0.0)
            out = _dot(weights, v, DOT, PRECISION) * share_own[:, None]
            out += numerator * share_past[:, None]
            divisor = divisor * share_past + tl.sum(_cast(weights, DOT, PRECISION), 1) * share_own
            out = out / _guarded(divisor)[:, None]
            lost = (log_all < scale - LOST_BELOW) & (largest > float("-inf"))
            norm = tl.where(lost, float("nan"), log_all)
        else:
            weights = tl.where(earlier, products, 0.0)
            norm = denominator + tl.sum(weights, 1)
            out = numerator + _dot(weights, v, DOT, PRECISION)
            divisor += tl.sum(_cast(weights, DOT, PRECISION), 1)
            out = out / _guarded(divisor)[:, None]
    else:
        out = numerator / _guarded(divisor)[:, None]
        norm = denominator
        if EXPONENTIAL:
            norm = tl.where(denominator > 0, peak + tl.log(denominator), float("-inf"))
    _put(out_ptr + batch * out_b + wide_head * out_h, rows, out_l, inside, e, DV, out, PRECISION)
    if NORM:
        tl.store(norm_ptr + batch * norm_b + wide_head * norm_h + rows, norm, mask=inside)


@triton.jit
def read_backward(
    q_ptr, q_b, q_h, q_l,
    k_ptr, k_b, k_h, k_l,
    v_ptr, v_b, v_h, v_l,
    d_out_ptr, d_out_b, d_out_h, d_out_l,
    d_q_ptr, d_q_b, d_q_h, d_q_l,
    norm_ptr, norm_b, norm_h,
    slope_ptr, slope_b, slope_h,
    mask_ptr, mask_b,
    q_high_ptr, q_low_ptr, qw_b, qw_h,
    k_high_ptr, k_low_ptr, kw_b, kw_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    lost_ptr,
    jobs_ptr,
    SAFE_ABOVE: tl.constexpr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, KNOWN: tl.constexpr, MASKED: tl.constexpr, EXPONENTIAL: tl.constexpr, KIND: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a job's queries, and d_out . out of each row, the slope.

    The (log) denominators are read if they are KNOWN, and else computed and written. Where weights within the job could overflow,
    `lost` is set and the job is left to `read_backward_exact`.
    """
    job, head = tl.program_id(0), tl.program_id(1)
    batch, start, stop, slot = _job(jobs_ptr, job)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    rows = start + tl.arange(0, ROWS)
    inside = rows < stop
    wide_head = head.to(tl.int64)
    q = _tile(q_ptr + batch * q_b + wide_head * q_h, rows, q_l, inside, d, D)
    d_out = _tile(d_out_ptr + batch * d_out_b + wide_head * d_out_h, rows, d_out_l, inside, e, DV)
    norm_ptr += batch * norm_b + wide_head * norm_h
    q_high_ptr += batch * qw_b + head * qw_h
    q_low_ptr += batch * qw_b + head * qw_h
    place = (slot * H + head) * M
    numerator_ptr += place * DV
    denominator_ptr += place
    scale_ptr += place

    slope = tl.zeros((ROWS,), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    peak = tl.zeros((ROWS,), tl.float32) + float("-inf")
    norm = denominator
    if KNOWN:
        norm = tl.load(norm_ptr + rows, mask=inside, other=1.0)
        if EXPONENTIAL:  # a row with nothing to attend to: all its weights are zero
            norm = tl.where(inside & (norm > float("-inf")), norm, float("inf"))
    if CAUSAL:
        k_high_ptr += batch * kw_b + head * kw_h
        k_low_ptr += batch * kw_b + head * kw_h
        bias_ptr += batch * bias_b + head * bias_h
        real = inside
        if MASKED:
            real = real & (tl.load(mask_ptr + batch * mask_b + rows, mask=inside, other=0) != 0)
        k = _tile(k_ptr + batch * k_b + wide_head * k_h, rows, k_l, real, d, D)
        t = _key_weights(k, metric_ptr + batch * metric_b + head * metric_h, real, d, D)
        products = tl.zeros((ROWS, ROWS), tl.float32)
        peak_a = tl.zeros((ROWS,), tl.float32) + float("-inf")
        peak_b = tl.zeros((ROWS,), tl.float32) + float("-inf")
    for first in range(0, M, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        known = features < M
        u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
        state = _of_features(numerator_ptr, features, e, M, DV)
        z = tl.load(denominator_ptr + features, mask=known, other=0.0)
        d_phi = _dot_wide(d_out, tl.trans(state), DOT, SPLIT, PRECISION)
        if EXPONENTIAL:
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            a = tl.where(known[None, :], u, float("-inf"))
            log_phi = a + c[None, :]
            if KNOWN:
                phi = tl.exp(log_phi - norm[:, None])
            else:
                largest = tl.maximum(peak, tl.max(log_phi, 1))
                keep = tl.exp(peak - _finite(largest))
                phi = tl.exp(log_phi - _finite(largest)[:, None])
                slope, denominator, peak = slope * keep, denominator * keep, largest
        else:
            phi = tl.where(known[None, :], _function(u, KIND), 0.0)
        denominator += tl.sum(phi * z[None, :], 1)
        slope += tl.sum(phi * d_phi, 1)
        if CAUSAL:
            u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            if EXPONENTIAL:
                b = _log_keys(u, t, bias_ptr, features, M)
                largest_a, largest_b = tl.maximum(peak_a, tl.max(a, 1)), tl.maximum(peak_b, tl.max(b, 1))
                keep_a, keep_b = tl.exp(peak_a - largest_a), tl.exp(peak_b - _finite(largest_b))
                products = products * keep_a[:, None] * keep_b[None, :]
                peak_a, peak_b = largest_a, largest_b
                phi_q = tl.exp(a - peak_a[:, None])
                phi_k = tl.exp(b - _finite(peak_b)[:, None])
            else:
                phi_q = phi
                phi_k = tl.where(real[:, None] & known[None, :], _function(u, KIND), 0.0)
            products += _dot(phi_q, tl.trans(phi_k), DOT, PRECISION)

    if not KNOWN:
        norm = denominator
        slope = slope / _guarded(denominator)
        if EXPONENTIAL:
            norm = tl.where(denominator > 0, peak + tl.log(denominator), float("-inf"))
        tl.store(norm_ptr + rows, norm, mask=inside)
        if EXPONENTIAL:
            norm = tl.where(inside & (norm > float("-inf")), norm, float("inf"))
    elif not EXPONENTIAL:
        slope = slope / _guarded(norm)
    if not EXPONENTIAL:
        norm = 1.0 / _guarded(norm)
    if CAUSAL:
        earlier = tl.arange(0, ROWS)[None, :] <= tl.arange(0, ROWS)[:, None]
        v = _tile(v_ptr + batch * v_b + wide_head * v_h, rows, v_l, real, e, DV)
        if EXPONENTIAL:
            exponents = peak_a[:, None] + peak_b[None, :] - norm[:, None]
            exponents = tl.where(earlier & inside[:, None], exponents, float("-inf"))
            tl.store(lost_ptr + job * H + head, (tl.max(tl.max(exponents, 1), 0) > SAFE_ABOVE).to(tl.int32))
            factor = tl.exp(tl.minimum(exponents, SAFE_ABOVE))
        else:
            factor = tl.where(earlier, norm[:, None], 0.0)
        along = _dot(d_out, tl.trans(v), DOT, PRECISION)
        weights = products * factor
        slope += tl.sum(weights * along, 1)
        if EXPONENTIAL:
            # Rounded weights do not quite add up to one, and what is left of along - slope would be that error.
            total = denominator + tl.sum(weights, 1)
            slope = slope / tl.where(total > 0, total, 1.0)
        slopes = (along - slope[:, None]) * factor
    tl.store(slope_ptr + batch * slope_b + wide_head * slope_h + rows, slope, mask=inside)

    d_q = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(0, M, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        known = features < M
        u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
        state = _of_features(numerator_ptr, features, e, M, DV)
        z = tl.load(denominator_ptr + features, mask=known, other=0.0)
        d_phi = _dot_wide(d_out, tl.trans(state), DOT, SPLIT, PRECISION) - slope[:, None] * z[None, :]
        if EXPONENTIAL:
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            a = tl.where(known[None, :], u, float("-inf"))
            d_u = tl.exp(a + c[None, :] - norm[:, None]) * d_phi
            if CAUSAL:
                u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                phi_k = tl.exp(_log_keys(u, t, bias_ptr, features, M) - _finite(peak_b)[:, None])
                d_u += tl.exp(a - peak_a[:, None]) * _dot(slopes, phi_k, DOT, PRECISION)
        else:
            d_phi = d_phi * norm[:, None]
            d_u = _derivative(u, KIND)
            if CAUSAL:
                u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                phi_k = tl.where(real[:, None] & known[None, :], _function(u, KIND), 0.0)
                d_phi += _dot(slopes, phi_k, DOT, PRECISION)
            d_u = d_u * d_phi
        d_q += _pull(d_u, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
    _put(d_q_ptr + batch * d_q_b + wide_head * d_q_h, rows, d_q_l, inside, d, D, d_q, PRECISION)


@triton.jit
def pull_keys(
    q_ptr, q_b, q_h, q_l,
    k_ptr, k_b, k_h, k_l,
    v_ptr, v_b, v_h, v_l,
    d_out_ptr, d_out_b, d_out_h, d_out_l,
    d_k_ptr, d_k_b, d_k_h, d_k_l,
    d_v_ptr, d_v_b, d_v_h, d_v_l,
    norm_ptr, norm_b, norm_h,
    slope_ptr, slope_b, slope_h,
    mask_ptr, mask_b,
    q_high_ptr, q_low_ptr, qw_b, qw_h,
    k_high_ptr, k_low_ptr, kw_b, kw_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    lost_ptr,
    jobs_ptr,
    SAFE_ABOVE: tl.constexpr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXPONENTIAL: tl.constexpr, KIND: tl.constexpr,
    DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a job's keys and values, from a summary of queries and, with CAUSAL, the queries of the same rows."""
    job, head = tl.program_id(0), tl.program_id(1)
    batch, start, stop, slot = _job(jobs_ptr, job)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    rows = start + tl.arange(0, ROWS)
    inside = rows < stop
    wide_head = head.to(tl.int64)
    k_high_ptr += batch * kw_b + head * kw_h
    k_low_ptr += batch * kw_b + head * kw_h
    metric_ptr += batch * metric_b + head * metric_h
    bias_ptr += batch * bias_b + head * bias_h
    place = (slot * H + head) * M
    numerator_ptr += place * DV
    denominator_ptr += place
    scale_ptr += place
    real = inside
    if MASKED:
        real = real & (tl.load(mask_ptr + batch * mask_b + rows, mask=inside, other=0) != 0)
    k = _tile(k_ptr + batch * k_b + wide_head * k_h, rows, k_l, real, d, D)
    v = _tile(v_ptr + batch * v_b + wide_head * v_h, rows, v_l, real, e, DV)
    t = _key_weights(k, metric_ptr, real, d, D)
    d_k = tl.zeros((ROWS, BLOCK_D), tl.float32)
    d_v = tl.zeros((ROWS, BLOCK_V), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    if CAUSAL:
        q_high_ptr += batch * qw_b + head * qw_h
        q_low_ptr += batch * qw_b + head * qw_h
        q = _tile(q_ptr + batch * q_b + wide_head * q_h, rows, q_l, inside, d, D)
        d_out = _tile(d_out_ptr + batch * d_out_b + wide_head * d_out_h, rows, d_out_l, inside, e, DV)
        norm = tl.load(norm_ptr + batch * norm_b + wide_head * norm_h + rows, mask=inside, other=1.0)
        slope = tl.load(slope_ptr + batch * slope_b + wide_head * slope_h + rows, mask=inside, other=0.0)
        products = tl.zeros((ROWS, ROWS), tl.float32)
        peak_a = tl.zeros((ROWS,), tl.float32) + float("-inf")
        peak_b = tl.zeros((ROWS,), tl.float32) + float("-inf")
        for first in range(0, M, BLOCK_M):
            features = first + tl.arange(0, BLOCK_M)
            known = features < M
            u_q = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            u_k = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            if EXPONENTIAL:
                a = tl.where(known[None, :], u_q, float("-inf"))
                b = _log_keys(u_k, t, bias_ptr, features, M)
                largest_a, largest_b = tl.maximum(peak_a, tl.max(a, 1)), tl.maximum(peak_b, tl.max(b, 1))
                keep_a, keep_b = tl.exp(peak_a - largest_a), tl.exp(peak_b - _finite(largest_b))
                products = products * keep_a[:, None] * keep_b[None, :]
                peak_a, peak_b = largest_a, largest_b
                phi_q = tl.exp(a - peak_a[:, None])
                phi_k = tl.exp(b - _finite(peak_b)[:, None])
            else:
                phi_q = tl.where(known[None, :], _function(u_q, KIND), 0.0)
                phi_k = tl.where(real[:, None] & known[None, :], _function(u_k, KIND), 0.0)
            products += _dot(phi_q, tl.trans(phi_k), DOT, PRECISION)
        earlier = (tl.arange(0, ROWS)[None, :] <= tl.arange(0, ROWS)[:, None]) & inside[:, None]
        if EXPONENTIAL:
            norm = tl.where(norm > float("-inf"), norm, float("inf"))
            exponents = peak_a[:, None] + peak_b[None, :] - norm[:, None]
            exponents = tl.where(earlier, exponents, float("-inf"))
            tl.store(lost_ptr + job * H + head, (tl.max(tl.max(exponents, 1), 0) > SAFE_ABOVE).to(tl.int32))
            factor = tl.exp(tl.minimum(exponents, SAFE_ABOVE))
        else:
            factor = tl.where(earlier, (1.0 / _guarded(norm))[:, None], 0.0)
        d_v += _dot(tl.trans(products * factor), d_out, DOT, PRECISION)
        slopes = tl.trans((_dot(d_out, tl.trans(v), DOT, PRECISION) - slope[:, None]) * factor)

    for first in range(0, M, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        known = features < M
        u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
        state = _of_features(numerator_ptr, features, e, M, DV)
        r = tl.load(denominator_ptr + features, mask=known, other=0.0)
        d_phi = _dot_wide(v, tl.trans(state), DOT, SPLIT, PRECISION) + r[None, :]
        if CAUSAL:
            u_q = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
        if EXPONENTIAL:
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            b = _log_keys(u, t, bias_ptr, features, M)
            phi = tl.exp(b + c[None, :])
            d_u = phi * d_phi
            if CAUSAL:
                phi_q = tl.exp(tl.where(known[None, :], u_q, float("-inf")) - peak_a[:, None])
                d_u += tl.exp(b - _finite(peak_b)[:, None]) * _dot(slopes, phi_q, DOT, PRECISION)
            total += tl.sum(d_u, 1)
        else:
            phi = tl.where(real[:, None] & known[None, :], _function(u, KIND), 0.0)
            if CAUSAL:
                d_phi += _dot(slopes, tl.where(known[None, :], _function(u_q, KIND), 0.0), DOT, PRECISION)
            d_u = tl.where(real[:, None], d_phi * _derivative(u, KIND), 0.0)
        d_v += _dot(phi, state, DOT, PRECISION)
        d_k += _pull(d_u, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
    if EXPONENTIAL:
        metric = tl.load(metric_ptr + d, mask=d < D, other=0.0)
        d_k -= k.to(tl.float32) * metric[None, :] * total[:, None]
    _put(d_k_ptr + batch * d_k_b + wide_head * d_k_h, rows, d_k_l, inside, d, D, d_k, PRECISION)
    _put(d_v_ptr + batch * d_v_b + wide_head * d_v_h, rows, d_v_l, inside, e, DV, d_v, PRECISION)


# The kernels below compute again the rows of causal jobs whose weights cannot be had from scales of single tokens: those of
# queries and keys that peak at different features, far from the origin. They take 16 rows at a time. The keys of earlier rows
# all precede these queries, so that a scale for each feature is allowed; the 16 x 16 pairs of the rows themselves are summed over
# the features one by one. Exponential features only.


@triton.jit
def _pairs(a, b, rows):
    """a_im + b_jm for j <= i, (L, L, M); -inf elsewhere."""
    earlier = rows[None, :] <= rows[:, None]
    return tl.where(earlier[:, :, None], a[:, None, :] + b[None, :, :], float("-inf"))


@triton.jit
def read_exact(
    q_ptr, q_b, q_h, q_l,
    k_ptr, k_b, k_h, k_l,
    v_ptr, v_b, v_h, v_l,
    out_ptr, out_b, out_h, out_l,
    norm_ptr, norm_b, norm_h,
    mask_ptr, mask_b,
    q_high_ptr, q_low_ptr, qw_b, qw_h,
    k_high_ptr, k_low_ptr, kw_b, kw_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    jobs_ptr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`read` with CAUSAL for the rows whose log denominator is NaN."""
    job, head, own = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, stop, slot = _job(jobs_ptr, job)
    wide_head = head.to(tl.int64)
    rows = start + own * ROWS + tl.arange(0, ROWS)
    norm_ptr += batch * norm_b + wide_head * norm_h
    norm = tl.load(norm_ptr + rows, mask=rows < stop, other=0.0)
    lost = norm != norm
    if tl.max(lost.to(tl.int32), 0) > 0:
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        k_ptr += batch * k_b + wide_head * k_h
        v_ptr += batch * v_b + wide_head * v_h
        mask_ptr += batch * mask_b
        q_high_ptr += batch * qw_b + head * qw_h
        q_low_ptr += batch * qw_b + head * qw_h
        k_high_ptr += batch * kw_b + head * kw_h
        k_low_ptr += batch * kw_b + head * kw_h
        metric_ptr += batch * metric_b + head * metric_h
        bias_ptr += batch * bias_b + head * bias_h
        place = (slot * H + head) * M
        numerator_ptr += place * DV
        denominator_ptr += place
        scale_ptr += place
        q = _tile(q_ptr + batch * q_b + wide_head * q_h, rows, q_l, rows < stop, d, D)

        numerator = tl.zeros((ROWS, BLOCK_V), tl.float32)
        denominator = tl.zeros((ROWS,), tl.float32)
        peak = tl.zeros((ROWS,), tl.float32) + float("-inf")
        for first in range(0, M, BLOCK_M):
            features = first + tl.arange(0, BLOCK_M)
            known = features < M
            u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            z = tl.load(denominator_ptr + features, mask=known, other=0.0)
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            log_phi = tl.where(known[None, :], u, float("-inf")) + c[None, :]
            largest = tl.maximum(peak, tl.max(log_phi, 1))
            keep = tl.exp(peak - _finite(largest))
            phi = tl.exp(log_phi - _finite(largest)[:, None])
            state = _of_features(numerator_ptr, features, e, M, DV)
            numerator = numerator * keep[:, None] + _dot(phi, state, DOT, PRECISION)
            denominator = denominator * keep + tl.sum(phi * z[None, :], 1)
            peak = largest
        for block in range(own + 1):
            at = start + block * ROWS + tl.arange(0, ROWS)
            real = at < stop
            if MASKED:
                real = real & (tl.load(mask_ptr + at, mask=real, other=0) != 0)
            k = _tile(k_ptr, at, k_l, real, d, D)
            v = _tile(v_ptr, at, v_l, real, e, DV)
            t = _key_weights(k, metric_ptr, real, d, D)
            for first in range(0, M, BLOCK_M):
                features = first + tl.arange(0, BLOCK_M)
                u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                a = tl.where((features < M)[None, :], u, float("-inf"))
                u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                b = _log_keys(u, t, bias_ptr, features, M)
                if block < own:
                    shift = tl.max(b, 0)
                    log_phi = a + shift[None, :]
                    largest = tl.maximum(peak, tl.max(log_phi, 1))
                    phi_q = tl.exp(log_phi - _finite(largest)[:, None])
                    phi_k = tl.exp(b - _finite(shift)[None, :])
                    weights = _dot(phi_q, tl.trans(phi_k), DOT, PRECISION)
                else:
                    pairs = _pairs(a, b, rows)
                    largest = tl.maximum(peak, tl.max(tl.max(pairs, 2), 1))
                    weights = tl.sum(tl.exp(pairs - _finite(largest)[:, None, None]), 2)
                keep = tl.exp(peak - _finite(largest))
                numerator = numerator * keep[:, None] + _dot(weights, v, DOT, PRECISION)
                denominator = denominator * keep + tl.sum(weights, 1)
                peak = largest
        out = numerator / _guarded(denominator)[:, None]
        norm = tl.where(denominator > 0, peak + tl.log(denominator), float("-inf"))
        _put(out_ptr + batch * out_b + wide_head * out_h, rows, out_l, lost, e, DV, out, PRECISION)
        tl.store(norm_ptr + rows, norm, mask=lost)


@triton.jit
def read_backward_exact(
    q_ptr, q_b, q_h, q_l,
    k_ptr, k_b, k_h, k_l,
    v_ptr, v_b, v_h, v_l,
    d_out_ptr, d_out_b, d_out_h, d_out_l,
    d_q_ptr, d_q_b, d_q_h, d_q_l,
    norm_ptr, norm_b, norm_h,
    slope_ptr, slope_b, slope_h,
    mask_ptr, mask_b,
    q_high_ptr, q_low_ptr, qw_b, qw_h,
    k_high_ptr, k_low_ptr, kw_b, kw_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    lost_ptr,
    jobs_ptr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`read_backward` with CAUSAL for the jobs that are `lost`."""
    job, head, own = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, stop, slot = _job(jobs_ptr, job)
    if tl.load(lost_ptr + job * H + head) > 0:
        wide_head = head.to(tl.int64)
        rows = start + own * ROWS + tl.arange(0, ROWS)
        inside = rows < stop
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        k_ptr += batch * k_b + wide_head * k_h
        v_ptr += batch * v_b + wide_head * v_h
        mask_ptr += batch * mask_b
        q_high_ptr += batch * qw_b + head * qw_h
        q_low_ptr += batch * qw_b + head * qw_h
        k_high_ptr += batch * kw_b + head * kw_h
        k_low_ptr += batch * kw_b + head * kw_h
        metric_ptr += batch * metric_b + head * metric_h
        bias_ptr += batch * bias_b + head * bias_h
        place = (slot * H + head) * M
        numerator_ptr += place * DV
        denominator_ptr += place
        scale_ptr += place
        q = _tile(q_ptr + batch * q_b + wide_head * q_h, rows, q_l, inside, d, D)
        d_out = _tile(d_out_ptr + batch * d_out_b + wide_head * d_out_h, rows, d_out_l, inside, e, DV)
        norm = tl.load(norm_ptr + batch * norm_b + wide_head * norm_h + rows, mask=inside, other=float("-inf"))
        norm = tl.where(norm > float("-inf"), norm, float("inf"))

        slope = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, M, BLOCK_M):
            features = first + tl.arange(0, BLOCK_M)
            u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            c = tl.load(scale_ptr + features, mask=features < M, other=float("-inf"))
            z = tl.load(denominator_ptr + features, mask=features < M, other=0.0)
            phi = tl.exp(u + c[None, :] - norm[:, None])
            total += tl.sum(phi * z[None, :], 1)
            state = _of_features(numerator_ptr, features, e, M, DV)
            slope += tl.sum(phi * _dot_wide(d_out, tl.trans(state), DOT, SPLIT, PRECISION), 1)
        for block in range(own + 1):
            at = start + block * ROWS + tl.arange(0, ROWS)
            real = at < stop
            if MASKED:
                real = real & (tl.load(mask_ptr + at, mask=real, other=0) != 0)
            k = _tile(k_ptr, at, k_l, real, d, D)
            v = _tile(v_ptr, at, v_l, real, e, DV)
            t = _key_weights(k, metric_ptr, real, d, D)
            along = _dot(d_out, tl.trans(v), DOT, PRECISION)
            for first in range(0, M, BLOCK_M):
                features = first + tl.arange(0, BLOCK_M)
                u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                a = tl.where((features < M)[None, :], u, float("-inf")) - norm[:, None]
                u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                b = _log_keys(u, t, bias_ptr, features, M)
                if block < own:
                    shift = tl.max(b, 0)
                    phi_k = tl.exp(b - _finite(shift)[None, :])
                    weights = _dot(tl.exp(a + shift[None, :]), tl.trans(phi_k), DOT, PRECISION)
                else:
                    weights = tl.sum(tl.exp(_pairs(a, b, rows)), 2)
                slope += tl.sum(weights * along, 1)
                total += tl.sum(weights, 1)
        slope = slope / tl.where(total > 0, total, 1.0)
        tl.store(slope_ptr + batch * slope_b + wide_head * slope_h + rows, slope, mask=inside)

        d_q = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for first in range(0, M, BLOCK_M):
            features = first + tl.arange(0, BLOCK_M)
            known = features < M
            u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            a = tl.where(known[None, :], u, float("-inf")) - norm[:, None]
            z = tl.load(denominator_ptr + features, mask=known, other=0.0)
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            state = _of_features(numerator_ptr, features, e, M, DV)
            d_u = _dot_wide(d_out, tl.trans(state), DOT, SPLIT, PRECISION) - slope[:, None] * z[None, :]
            d_u = d_u * tl.exp(a + c[None, :])
            for block in range(own + 1):
                at = start + block * ROWS + tl.arange(0, ROWS)
                real = at < stop
                if MASKED:
                    real = real & (tl.load(mask_ptr + at, mask=real, other=0) != 0)
                k = _tile(k_ptr, at, k_l, real, d, D)
                v = _tile(v_ptr, at, v_l, real, e, DV)
                t = _key_weights(k, metric_ptr, real, d, D)
                slopes = _dot(d_out, tl.trans(v), DOT, PRECISION) - slope[:, None]
                u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                b = _log_keys(u, t, bias_ptr, features, M)
                if block < own:
                    shift = tl.max(b, 0)
                    phi_k = tl.exp(b - _finite(shift)[None, :])
                    d_u += tl.exp(a + shift[None, :]) * _dot(slopes, phi_k, DOT, PRECISION)
                else:
                    d_u += tl.sum(tl.exp(_pairs(a, b, rows)) * slopes[:, :, None], 1)
            d_q += _pull(d_u, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
        _put(d_q_ptr + batch * d_q_b + wide_head * d_q_h, rows, d_q_l, inside, d, D, d_q, PRECISION)


@triton.jit
def pull_keys_exact(
    q_ptr, q_b, q_h, q_l,
    k_ptr, k_b, k_h, k_l,
    v_ptr, v_b, v_h, v_l,
    d_out_ptr, d_out_b, d_out_h, d_out_l,
    d_k_ptr, d_k_b, d_k_h, d_k_l,
    d_v_ptr, d_v_b, d_v_h, d_v_l,
    norm_ptr, norm_b, norm_h,
    slope_ptr, slope_b, slope_h,
    mask_ptr, mask_b,
    q_high_ptr, q_low_ptr, qw_b, qw_h,
    k_high_ptr, k_low_ptr, kw_b, kw_h,
    metric_ptr, metric_b, metric_h,
    bias_ptr, bias_b, bias_h,
    numerator_ptr, denominator_ptr, scale_ptr,
    lost_ptr,
    jobs_ptr,
    H: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, DOT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`pull_keys` with CAUSAL for the jobs that are `lost`."""
    job, head, own = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, start, stop, slot = _job(jobs_ptr, job)
    if tl.load(lost_ptr + job * H + head) > 0:
        wide_head = head.to(tl.int64)
        rows = start + own * ROWS + tl.arange(0, ROWS)
        real = rows < stop
        d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
        q_ptr += batch * q_b + wide_head * q_h
        d_out_ptr += batch * d_out_b + wide_head * d_out_h
        norm_ptr += batch * norm_b + wide_head * norm_h
        slope_ptr += batch * slope_b + wide_head * slope_h
        q_high_ptr += batch * qw_b + head * qw_h
        q_low_ptr += batch * qw_b + head * qw_h
        k_high_ptr += batch * kw_b + head * kw_h
        k_low_ptr += batch * kw_b + head * kw_h
        metric_ptr += batch * metric_b + head * metric_h
        bias_ptr += batch * bias_b + head * bias_h
        place = (slot * H + head) * M
        numerator_ptr += place * DV
        denominator_ptr += place
        scale_ptr += place
        if MASKED:
            real = real & (tl.load(mask_ptr + batch * mask_b + rows, mask=real, other=0) != 0)
        k = _tile(k_ptr + batch * k_b + wide_head * k_h, rows, k_l, real, d, D)
        v = _tile(v_ptr + batch * v_b + wide_head * v_h, rows, v_l, real, e, DV)
        t = _key_weights(k, metric_ptr, real, d, D)
        d_k = tl.zeros((ROWS, BLOCK_D), tl.float32)
        d_v = tl.zeros((ROWS, BLOCK_V), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, M, BLOCK_M):
            features = first + tl.arange(0, BLOCK_M)
            known = features < M
            u = _project(k, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            b = _log_keys(u, t, bias_ptr, features, M)
            state = _of_features(numerator_ptr, features, e, M, DV)
            r = tl.load(denominator_ptr + features, mask=known, other=0.0)
            c = tl.load(scale_ptr + features, mask=known, other=float("-inf"))
            phi = tl.exp(b + c[None, :])
            d_v += _dot(phi, state, DOT, PRECISION)
            d_u = phi * (_dot_wide(v, tl.trans(state), DOT, SPLIT, PRECISION) + r[None, :])
            shift = tl.max(b, 0)
            phi_k = tl.exp(b - _finite(shift)[None, :])
            for block in range(own, tl.cdiv(stop - start, ROWS)):
                at = start + block * ROWS + tl.arange(0, ROWS)
                inside = at < stop
                q = _tile(q_ptr, at, q_l, inside, d, D)
                d_out = _tile(d_out_ptr, at, d_out_l, inside, e, DV)
                norm = tl.load(norm_ptr + at, mask=inside, other=float("-inf"))
                norm = tl.where(norm > float("-inf"), norm, float("inf"))
                slopes = _dot(d_out, tl.trans(v), DOT, PRECISION)
                slopes -= tl.load(slope_ptr + at, mask=inside, other=0.0)[:, None]
                u = _project(q, q_high_ptr, q_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
                a = tl.where(known[None, :], u, float("-inf")) - norm[:, None]
                if block > own:
                    phi_q = tl.exp(a + shift[None, :])
                    weights = _dot(phi_q, tl.trans(phi_k), DOT, PRECISION)
                    d_u += phi_k * _dot(tl.trans(slopes), phi_q, DOT, PRECISION)
                else:
                    pairs = tl.exp(_pairs(a, b, rows))
                    weights = tl.sum(pairs, 2)
                    d_u += tl.sum(pairs * slopes[:, :, None], 0)
                d_v += _dot(tl.trans(weights), d_out, DOT, PRECISION)
            d_k += _pull(d_u, k_high_ptr, k_low_ptr, features, d, M, D, SPLIT, DOT, PRECISION)
            total += tl.sum(d_u, 1)
        metric = tl.load(metric_ptr + d, mask=d < D, other=0.0)
        d_k -= k.to(tl.float32) * metric[None, :] * total[:, None]
        _put(d_k_ptr + batch * d_k_b + wide_head * d_k_h, rows, d_k_l, rows < stop, d, D, d_k, PRECISION)
        _put(d_v_ptr + batch * d_v_b + wide_head * d_v_h, rows, d_v_l, rows < stop, e, DV, d_v, PRECISION)
