// FAVOR linear attention for CPUs: the native backend, compiled on first use by native.py, which loads it with ctypes.
//
// The unit of work is one head of one sequence, taken in panels of 64 tokens. Everything of a panel is laid out with features
// down and tokens across, phi[m][token]: what is per token (a maximum, a denominator, a slope) is then a vector, never a
// horizontal sum, and every matrix product of the algorithm finds both operands the way the register tile wants them, once the
// 64 x D inputs are transposed. A panel's features, the weights and the state stay in the second-level cache; no L x M matrix
// ever exists, and nothing per token is kept between the passes but the causal normaliser.
//
// Letters, as in exponential.py: a = log phi(q), b = log phi(k); S, z, c the state (numerator, denominator, log scale); in the
// backward pass R, r (and a scale rho) what queries owe to the keys before them: R = sum phi(q) d_out^T, r = -sum phi(q) slope.
//
// Exponential features, causal: a panel has one reference scale per feature, ref = max(c, b of the panel's first key), which
// every row of the panel may know. Then phi(q) = exp(a + ref - row maximum) and phi(k) = exp(b - ref) serve the state and the
// explicit weights within the panel alike, and no denominator can be less than 1: the feature where the row has its maximum has
// z >= 1, or the first key itself there. A key that rises more than exp(JUMP) above the reference would overflow: the panel ends
// before it, and it becomes the first key of the next one. Where panels end thus depends on no later token, and neither does any
// bit of a row.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------------------
// Vectors: as wide as the compiler was told the machine is.

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_VECTORS = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, TILE_VECTORS = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_VECTORS = 4;  // 24 of 32
#else
constexpr int LANES = 4, TILE_VECTORS = 2;  // 12 of 16
#endif
constexpr int TILE_ROWS = 6;
constexpr int TOKENS = 64;           // of a panel
constexpr int CAUSAL_TOKENS = 48;    // of a causal one, whose weights cost as much per token as it has tokens
constexpr int STRIDE = TOKENS + 16;  // of a panel's features: a power of two would crowd into a few sets of the cache
constexpr int BLOCK = 16;            // columns are padded to this
constexpr int DEPTH = 64;            // of a product over features: so many rows of its right factor stay in the first-level cache

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float LooseVec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * LANES)));

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float JUMP = 40.0f;  // exp(40) times a sum of 64 is far from overflow; what exp(-87) loses is exp(-47) of the whole
constexpr float FLOOR = 1e-12f;  // DENOMINATOR_FLOOR of state.py
constexpr float RELU_EPSILON = 1e-3f;

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
inline Vec all(float x) { return x - Vec{}; }  // not x + 0, which a compiler must compute: it changes -0

// a > b ? a : b, lane by lane: b where either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline bool any_greater(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#else
    IntVec greater = a > b;
    bool any = false;
    for (int i = 0; i < LANES; i++) any |= greater[i] != 0;
    return any;
#endif
}

inline float sum(Vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(x);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
#endif
}

inline float largest(Vec x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

inline Vec iota(int first) {
    Vec x;
    for (int i = 0; i < LANES; i++) x[i] = static_cast<float>(first + i);
    return x;
}

// e^x to 2e-7, zero below e^-87.
inline Vec exponential(Vec x) {
    const float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#if defined(__AVX512F__)
    x = _mm512_max_ps(x, all(-104.0f));
    Vec n = _mm512_roundscale_ps(x * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Vec argument = x;
    x = x > -87.3f ? x : all(-87.3f);
    x = x < 88.0f ? x : all(88.0f);
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    Vec n = (x * log2e + magic) - magic;
#endif
    Vec r = (x - n * ln2_high) - n * ln2_low;
    Vec p = r * 1.383679e-3f + 8.374857e-3f;
    p = p * r + 4.1668229e-2f;
    p = p * r + 1.6666420e-1f;
    p = p * r + 4.9999992e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    return argument > -87.3f ? p * reinterpret_cast<Vec&>(power) : Vec{};
#endif
}

inline float exponential(float x) { return exponential(all(x))[0]; }

template <int STEP, std::size_t... LANE>
inline void exchange(Vec& a, Vec& b, std::index_sequence<LANE...>) {
    Vec low = __builtin_shufflevector(a, b, ((LANE & STEP) == 0 ? int(LANE) : LANES + int(LANE) - STEP)...);
    Vec high = __builtin_shufflevector(a, b, ((LANE & STEP) == 0 ? int(LANE) + STEP : LANES + int(LANE))...);
    a = low, b = high;
}

template <int STEP>
inline void exchange_all(Vec* rows) {
    for (int i = 0; i < LANES; i++)
        if ((i & STEP) == 0) exchange<STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES>());
    if constexpr (STEP > 1) exchange_all<STEP / 2>(rows);
}

// to[column][row] = from[row][column]; rows and columns are multiples of LANES.
void transpose(const float* from, long from_stride, float* to, long to_stride, int rows, int columns) {
    for (int r = 0; r < rows; r += LANES)
        for (int c = 0; c < columns; c += LANES) {
            Vec block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = load(from + (r + i) * from_stride + c);
            exchange_all<LANES / 2>(block);
            for (int i = 0; i < LANES; i++) store(to + (c + i) * to_stride + r, block[i]);
        }
}

template <int STEP, std::size_t... LANE>
inline Vec moved_up(Vec x, std::index_sequence<LANE...>) {
    return __builtin_shufflevector(Vec{}, x, (int(LANE) < STEP ? 0 : LANES + int(LANE) - STEP)...);
}

template <int STEP = 1>
inline Vec running_sum(Vec x) {
    x += moved_up<STEP>(x, std::make_index_sequence<LANES>());
    if constexpr (2 * STEP < LANES) return running_sum<2 * STEP>(x);
    return x;
}

// Denormal numbers would cost a hundred cycles each, and are less than rounding errors everywhere here.
class FlushDenormals {
#if defined(__SSE2__)
    unsigned saved_ = _mm_getcsr();

   public:
    FlushDenormals() { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
    std::uint64_t saved_ = 0;

   public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(saved_ | (1u << 24)));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
   public:
    FlushDenormals() {}
#endif
};

// ---------------------------------------------------------------------------------------------------------------------------
// Matrix products: a tile of C in registers, broadcast elements of A times vectors of B.
//
// The sum over k runs in the same order with the same instructions whatever the tile: a row's bits do not depend on how many
// rows and columns are computed along with it.

template <int ROWS, int VECTORS, bool TRANSPOSED>
void tile(long depth, const float* a, long lda, const float* b, long ldb, float* c, long ldc, bool accumulate) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) sums[i][j] = accumulate ? load(c + i * ldc + j * LANES) : Vec{};
    for (long k = 0; k < depth; k++) {
        Vec right[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) right[j] = load(b + k * ldb + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Vec left = all(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++)
#if defined(__AVX512F__)
                sums[i][j] = _mm512_fmadd_ps(left, right[j], sums[i][j]);
#else
                sums[i][j] += left * right[j];
#endif
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) store(c + i * ldc + j * LANES, sums[i][j]);
}

template <bool TRANSPOSED, int VECTORS>
void product_columns(long rows, long columns, long depth, const float* a, long lda, const float* b, long ldb, float* c, long ldc,
                     bool accumulate) {
    const long step = TRANSPOSED ? 1 : lda;
    long done = 0;
    for (; done + VECTORS * LANES <= columns; done += VECTORS * LANES)
        for (long r = 0; r < rows;) {
            const auto take = [&](auto count) {
                tile<count(), VECTORS, TRANSPOSED>(depth, a + r * step, lda, b + done, ldb, c + r * ldc + done, ldc, accumulate);
                r += count();
            };
            const long left = rows - r;
            if (left >= TILE_ROWS) {
                take(std::integral_constant<int, TILE_ROWS>());
            } else if (left >= 4) {
                take(std::integral_constant<int, 4>());
            } else if (left >= 2) {
                take(std::integral_constant<int, 2>());
            } else {
                take(std::integral_constant<int, 1>());
            }
        }
    if constexpr (VECTORS * LANES > BLOCK)
        product_columns<TRANSPOSED, LANES < BLOCK ? VECTORS / 2 : VECTORS - 1>(rows, columns - done, depth, a, lda, b + done, ldb,
                                                                               c + done, ldc, accumulate);
}

// C (rows, columns) = A B or C + A B, where A is (rows, depth), or (depth, rows) if TRANSPOSED. Columns are a multiple of BLOCK.
template <bool TRANSPOSED>
void product(long rows, long columns, long depth, const float* a, long lda, const float* b, long ldb, float* c, long ldc,
             bool accumulate) {
    product_columns<TRANSPOSED, TILE_VECTORS>(rows, columns, depth, a, lda, b, ldb, c, ldc, accumulate);
}

// ---------------------------------------------------------------------------------------------------------------------------
// Matrix products of bfloat16 inputs, where the processor has tiles for them (AMX): operands are rounded and laid out in tiles of
// 16 x 32, sums are float32. Elsewhere such inputs are multiplied as floats.

typedef std::uint16_t Half;  // the bits of a bfloat16
constexpr int TILE = 512;    // elements of a tile

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
constexpr bool HAS_TILES = true;

// Linux lends the tiles on request only.
bool tiles_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return allowed;
}

// Eight full tiles while it lives; whoever used them before on this thread finds their own shapes again.
class TileShapes {
    alignas(64) std::uint8_t saved_[64];
    const bool used_;

   public:
    explicit TileShapes(bool used) : used_(used) {
        if (!used_) return;
        alignas(64) std::uint8_t shapes[64] = {1};
        for (int i = 0; i < 8; i++) shapes[16 + 2 * i] = 64, shapes[48 + i] = 16;
        _tile_storeconfig(saved_);
        _tile_loadconfig(shapes);
    }
    ~TileShapes() {
        if (used_) _tile_loadconfig(saved_);
    }
};

inline Vec rounded_pair(Vec first, Vec second) { return (Vec)_mm512_cvtne2ps_pbh(second, first); }

// Rounded and interleaved: first[0], second[0], first[1], ...
inline Vec interleaved(Vec first, Vec second) {
    alignas(64) static constexpr std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)rounded_pair(first, second));
}

inline float* as_floats(Half* p) { return reinterpret_cast<float*>(p); }

// Tiles [row block][depth block] of the left factor, (rows, depth), or (depth, rows) if TRANSPOSED. It is read up to multiples of
// 16 columns, zeros beyond.
template <bool TRANSPOSED>
void pack_left(long rows, long depth, const float* a, long lda, Half* to) {
    for (long r = 0; r < rows; r += 16)
        for (long k = 0; k < depth; k += 32, to += TILE)
            if constexpr (TRANSPOSED) {
                Vec block[LANES];
                for (int i = 0; i < LANES; i++) {
                    const long at = k + 2 * i;
                    const Vec first = at < depth ? load(a + at * lda + r) : Vec{};
                    block[i] = interleaved(first, at + 1 < depth ? load(a + (at + 1) * lda + r) : Vec{});
                }
                exchange_all<LANES / 2>(block);
                for (int i = 0; i < LANES; i++) store(as_floats(to) + 16 * i, block[i]);
            } else {
                for (int i = 0; i < 16; i++) {
                    const float* row = a + (r + i) * lda + k;
                    store(as_floats(to) + 16 * i, rounded_pair(load(row), k + 16 < depth ? load(row + 16) : Vec{}));
                }
            }
}

// Tiles [depth block][column block] of the right factor, (depth, columns).
void pack_right(long depth, long columns, const float* b, long ldb, Half* to) {
    for (long k = 0; k < depth; k += 32)
        for (long c = 0; c < columns; c += 16, to += TILE)
            for (int i = 0; i < 16; i++) {
                const long at = k + 2 * i;
                const Vec first = at < depth ? load(b + at * ldb + c) : Vec{};
                store(as_floats(to) + 16 * i, interleaved(first, at + 1 < depth ? load(b + (at + 1) * ldb + c) : Vec{}));
            }
}

// Two by two tiles of C, or fewer. The left factor may be a sum of `parts`, one after the other along its rows.
template <int ROWS, int COLUMNS>
void tile_block(long parts, long depth_tiles, const Half* a, const Half* b, long b_tiles, float* c, long ldc, bool accumulate) {
    if (accumulate) {
        _tile_loadd(0, c, 4 * ldc);
        if constexpr (COLUMNS > 1) _tile_loadd(1, c + 16, 4 * ldc);
        if constexpr (ROWS > 1) _tile_loadd(2, c + 16 * ldc, 4 * ldc);
        if constexpr (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long part = 0; part < parts; part++)
        for (long k = 0; k < depth_tiles; k++, a += TILE) {
            const Half* right = b + k * b_tiles * TILE;
            _tile_loadd(4, a, 64);
            _tile_loadd(6, right, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (COLUMNS > 1) {
                _tile_loadd(7, right + TILE, 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (ROWS > 1) {
                _tile_loadd(5, a + parts * depth_tiles * TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
    _tile_stored(0, c, 4 * ldc);
    if constexpr (COLUMNS > 1) _tile_stored(1, c + 16, 4 * ldc);
    if constexpr (ROWS > 1) _tile_stored(2, c + 16 * ldc, 4 * ldc);
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
}

// C = A B or C + A B from packed factors; whole tiles of C are written.
void tile_product(long rows, long columns, long depth, long parts, const Half* a, const Half* b, float* c, long ldc,
                  bool accumulate) {
    asm volatile("" ::: "memory");  // the compiler does not know what the tile instructions read and write
    const long row_tiles = (rows + 15) / 16, b_tiles = columns / 16, depth_tiles = (depth + 31) / 32;
    for (long r = 0; r < row_tiles; r += 2)
        for (long j = 0; j < b_tiles; j += 2) {
            const Half *left = a + r * parts * depth_tiles * TILE, *right = b + j * TILE;
            float* to = c + 16 * r * ldc + 16 * j;
            const bool tall = r + 1 < row_tiles, wide = j + 1 < b_tiles;
            if (tall && wide) {
                tile_block<2, 2>(parts, depth_tiles, left, right, b_tiles, to, ldc, accumulate);
            } else if (tall) {
                tile_block<2, 1>(parts, depth_tiles, left, right, b_tiles, to, ldc, accumulate);
            } else if (wide) {
                tile_block<1, 2>(parts, depth_tiles, left, right, b_tiles, to, ldc, accumulate);
            } else {
                tile_block<1, 1>(parts, depth_tiles, left, right, b_tiles, to, ldc, accumulate);
            }
        }
    asm volatile("" ::: "memory");
}
#else
constexpr bool HAS_TILES = false;
bool tiles_allowed() { return false; }
struct TileShapes {
    explicit TileShapes(bool) {}
};
template <bool TRANSPOSED>
void pack_left(long, long, const float*, long, Half*) {}
void pack_right(long, long, const float*, long, Half*) {}
void tile_product(long, long, long, long, const Half*, const Half*, float*, long, bool) {}
#endif

// The right factor of a product: where it is, and in tiles if that is how it is multiplied.
struct Right {
    const float* data;
    long stride;
    const Half* tiles;
};

// ---------------------------------------------------------------------------------------------------------------------------
// What native.py passes.

extern "C" {

// Strides in elements; the last one is 1.
struct Tensor {
    void* data;
    std::int64_t batch, head, row;
};

struct Call {
    std::int64_t batch, heads, queries, keys, dim, value_dim, features;
    std::int64_t kernel;    // 0 exponential; 1 relu, 2 elu, 3 sigmoid, 4 tanh, 5 identity
    std::int64_t dtype;     // 0 float32, 1 bfloat16, 2 float16
    std::int64_t causal, fast, threads;
    std::int64_t segments;  // of cu_seqlens, or -1
    Tensor query, key, value;
    Tensor query_rows, key_rows, metric, bias;          // float; `row` unused for metric and bias
    Tensor past_numerator, past_denominator, past_log;  // float
    Tensor after_numerator, after_denominator, after_log;
    Tensor normaliser;  // (B, H, Lq) float, or null
    Tensor out;         // d_out in the backward pass
    const std::uint8_t* mask;  // (B, Lk), or null
    const std::int64_t* cu_seqlens;
    Tensor d_after_numerator, d_after_denominator;  // and the gradients, of the backward pass
    Tensor d_query, d_key, d_value, d_past_numerator, d_past_denominator;
};
}

enum Kernel { EXPONENTIAL, RELU, ELU, SIGMOID, TANH, IDENTITY };
enum Type { FLOAT32, BFLOAT16, FLOAT16 };

long rounded(long n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// Rows of one head of one sequence.
struct Rows {
    char* data;
    long stride;  // in elements
};

struct Sequence {
    Rows q, k, v, out, d_q, d_k, d_v;
    const std::uint8_t* mask;  // of the keys, or null
    float* normaliser;         // of the queries, or null
    long queries, keys;
    const float *query_rows, *key_rows, *metric, *bias;
    long query_rows_stride, key_rows_stride;
    const float *past_numerator, *past_denominator, *past_log;
    float *after_numerator, *after_denominator, *after_log;  // null where nobody asks
    const float *d_after_numerator, *d_after_denominator;    // null for zeros
    float *d_past_numerator, *d_past_denominator;            // null where nobody asks
};

inline float widened(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline std::uint16_t narrowed(float x) {  // to the nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t rounding = 0x7fff + ((bits >> 16) & 1);
    return static_cast<std::uint16_t>(x == x ? (bits + rounding) >> 16 : 0x7fc0);
}

typedef std::uint16_t HalfVec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef std::uint32_t WordVec __attribute__((vector_size(4 * LANES)));

// n elements; n need not be a multiple of anything.
void load_row(const void* from, Type type, long n, float* to) {
    if (type == FLOAT32) {
        std::memcpy(to, from, n * sizeof(float));
    } else if (type == BFLOAT16) {
        const std::uint16_t* p = static_cast<const std::uint16_t*>(from);
        long d = 0;
        for (; d + LANES <= n; d += LANES)
            store(to + d, (Vec)(__builtin_convertvector(*reinterpret_cast<const HalfVec*>(p + d), WordVec) << 16));
        for (; d < n; d++) to[d] = widened(p[d]);
    } else {
#ifdef __FLT16_MAX__
        for (long d = 0; d < n; d++) to[d] = static_cast<float>(static_cast<const _Float16*>(from)[d]);
#endif
    }
}

void store_row(const float* from, Type type, long n, void* to) {
    if (type == FLOAT32) {
        std::memcpy(to, from, n * sizeof(float));
    } else if (type == BFLOAT16) {
        std::uint16_t* p = static_cast<std::uint16_t*>(to);
        long d = 0;
        for (; d + LANES <= n; d += LANES) {
            const Vec x = load(from + d);
            const WordVec bits = (WordVec)x;
            const WordVec rounded_bits = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
            const WordVec result = x == x ? rounded_bits : WordVec{} + 0x7fc0;
            *reinterpret_cast<HalfVec*>(p + d) = __builtin_convertvector(result, HalfVec);
        }
        for (; d < n; d++) p[d] = narrowed(from[d]);
    } else {
#ifdef __FLT16_MAX__
        for (long d = 0; d < n; d++) static_cast<_Float16*>(to)[d] = static_cast<_Float16>(from[d]);
#endif
    }
}

long size_of(Type type) { return type == FLOAT32 ? 4 : 2; }

// n rows as floats, zeros up to `width` columns and a multiple of BLOCK rows.
void load_rows(const Rows& rows, Type type, long first, int n, long dim, long width, float* to) {
    for (int i = 0; i < n; i++, to += width) {
        load_row(rows.data + (first + i) * rows.stride * size_of(type), type, dim, to);
        for (long d = dim; d < width; d++) to[d] = 0;
    }
    std::memset(to, 0, (rounded(n) - n) * width * sizeof(float));
}

void store_rows(const Rows& rows, Type type, long first, int n, long dim, long width, const float* from) {
    for (int i = 0; i < n; i++, from += width)
        store_row(from, type, dim, rows.data + (first + i) * rows.stride * size_of(type));
}

// Cache-aligned floats, carved from one allocation, which a thread keeps for its next call: fresh pages cost more than a token.
class Arena {
    struct Kept {
        float* memory = nullptr;
        std::size_t floats = 0;
        ~Kept() { std::free(memory); }
    };
    float* next_ = nullptr;

   public:
    void reserve(std::size_t floats) {
        static thread_local Kept kept;
        if (kept.floats < floats) {
            std::free(kept.memory);
            kept.floats = 0;
            kept.memory = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
            if (kept.memory == nullptr) throw std::bad_alloc();
            kept.floats = floats;
        }
        next_ = kept.memory;
    }
    float* take(std::size_t floats) {
        float* taken = next_;
        next_ += (floats + 15) / 16 * 16;
        return taken;
    }
};

// The state S, z, c, or in the backward pass R, r, rho.
struct Summary {
    float* numerator;    // (M, value width)
    float* denominator;  // (M)
    float* log;          // (M)
};

// ---------------------------------------------------------------------------------------------------------------------------
// The features of a panel.

inline Vec pointwise(Kernel kernel, Vec u) {
    switch (kernel) {
        case RELU: return larger(u, Vec{}) + RELU_EPSILON;
        case ELU: return u > 0.0f ? u + 1.0f : exponential(u);
        case SIGMOID: return 1.0f / (1.0f + exponential(-u));
        case TANH: return 1.0f - 2.0f / (1.0f + exponential(2.0f * u));
        default: return u;
    }
}

// d phi / d u, as a function of phi.
inline Vec derivative(Kernel kernel, Vec phi) {
    switch (kernel) {
        case EXPONENTIAL: return phi;
        case RELU: return phi > RELU_EPSILON ? all(1.0f) : Vec{};
        case ELU: return phi < 1.0f ? phi : all(1.0f);
        case SIGMOID: return phi * (1.0f - phi);
        case TANH: return 1.0f - phi * phi;
        default: return all(1.0f);
    }
}

inline float finite(float log) { return log == -INF ? 0.0f : log; }

inline Vec guarded(Vec denominator) {
    const Vec floor = denominator < 0.0f ? all(-FLOOR) : all(FLOOR);
    const Vec magnitude = denominator < 0.0f ? -denominator : denominator;
    return magnitude < FLOOR ? floor : denominator;
}

// One thread's scratch memory, and the passes over one sequence.
class Worker {
    const Type type_;
    const Kernel kernel_;
    const long dim_, value_dim_, features_;
    const long width_, value_width_;  // padded
    const bool causal_;

    Arena arena_;
    float *x_, *x_t_;                  // (64, D) queries or keys, and transposed
    float *v_, *v_t_, *d_o_, *d_o_t_;  // (64, Dv)
    float *o_, *g_;                    // (64, Dv) and (64, D): results
    float *phi_q_, *phi_k_, *aux_;     // (M, 64)
    float *weights_, *slopes_;         // (64, 64)
    float *query_rows_, *key_rows_;    // (M, D), padded copies
    float *added_, *top_;              // (M)
    Summary state_, reverse_;
    // Per token of the panel.
    float *log_weight_, *peak_, *denominator_, *slope_, *log_sum_, *total_;

    const float *wq_ = nullptr, *wk_ = nullptr;
    long wq_stride_ = 0, wk_stride_ = 0;
    const float *padded_q_ = nullptr, *padded_k_ = nullptr;
    const Sequence* s_ = nullptr;

    const bool tiles_;       // whether products are taken in tiles
    const long block_;       // features per step of the passes that end a product at once
    const long parts_;       // W is rounded to a sum of so many
    Half *left_, *right_[2];               // packed factors of the product at hand
    Half *x_tiles_;                        // packed queries or keys
    Half *query_tiles_, *key_tiles_;       // packed rows
    const float *packed_q_ = nullptr, *packed_k_ = nullptr;

    struct Ahead {
        const char* data;
        long step, size, left;
    } ahead_[4];  // of q, k, v and d_out
    int direction_ = 1;
    const int ahead_rows_;

    bool exponential_kernel() const { return kernel_ == EXPONENTIAL; }

   public:
    explicit Worker(const Call& call)
        : type_(static_cast<Type>(call.dtype)),
          kernel_(static_cast<Kernel>(call.kernel)),
          dim_(call.dim),
          value_dim_(call.value_dim),
          features_(call.features),
          width_(rounded(call.dim)),
          value_width_(rounded(call.value_dim)),
          causal_(call.causal != 0),
          tiles_(HAS_TILES && call.dtype == BFLOAT16 && tiles_allowed()),
          block_(tiles_ ? 32 : TILE_ROWS),
          parts_(call.fast ? 1 : 2),
          ahead_rows_(static_cast<int>(TOKENS * block_ / features_) + 1) {
        const long tall = (features_ + 31) / 32 * 32;  // rows that a product in tiles may write
        const std::size_t per_token = 4 * (TOKENS + 16) * (width_ + 2 * value_width_) + 2 * TOKENS * STRIDE + 16 * TOKENS;
        const std::size_t per_feature = 3 * STRIDE + 2 * width_ + 2 * value_width_ + 16;
        const long deep = std::max(width_, value_width_) + 32, packed = (tall + 32) * (deep + TOKENS);
        arena_.reserve(per_token + (tall + 16) * per_feature + (tiles_ ? 6 * packed : 0));
        x_ = arena_.take(TOKENS * width_), x_t_ = arena_.take(TOKENS * width_), g_ = arena_.take(TOKENS * width_);
        v_ = arena_.take(TOKENS * value_width_), v_t_ = arena_.take(TOKENS * value_width_);
        d_o_ = arena_.take(TOKENS * value_width_), d_o_t_ = arena_.take(TOKENS * value_width_);
        o_ = arena_.take(TOKENS * value_width_);
        weights_ = arena_.take(TOKENS * STRIDE), slopes_ = arena_.take(TOKENS * STRIDE);
        for (float** token : {&log_weight_, &peak_, &denominator_, &slope_, &log_sum_, &total_}) *token = arena_.take(TOKENS);
        for (float** panel : {&phi_q_, &phi_k_, &aux_}) *panel = arena_.take(tall * STRIDE);
        query_rows_ = arena_.take(features_ * width_), key_rows_ = arena_.take(features_ * width_);
        added_ = arena_.take(features_), top_ = arena_.take(features_);
        for (Summary* summary : {&state_, &reverse_}) {
            summary->numerator = arena_.take(tall * value_width_);
            summary->denominator = arena_.take(features_), summary->log = arena_.take(features_);
        }
        if (tiles_)
            for (Half** part : {&left_, &right_[0], &right_[1], &x_tiles_, &query_tiles_, &key_tiles_})
                *part = reinterpret_cast<Half*>(arena_.take(packed));
    }

    void open(const Sequence& sequence) {
        s_ = &sequence;
        for (Ahead& rows : ahead_) rows.left = 0;
        direction_ = 1;
        wq_ = padded(sequence.query_rows, sequence.query_rows_stride, query_rows_, padded_q_, wq_stride_);
        wk_ = padded(sequence.key_rows, sequence.key_rows_stride, key_rows_, padded_k_, wk_stride_);
        if (tiles_) {
            if (packed_q_ != sequence.query_rows) pack_rows(wq_, wq_stride_, query_tiles_);
            if (packed_k_ != sequence.key_rows) pack_rows(wk_, wk_stride_, key_tiles_);
            packed_q_ = sequence.query_rows, packed_k_ = sequence.key_rows;
        }
        for (long m = 0; m < features_; m++) {
            float* row = state_.numerator + m * value_width_;
            std::memcpy(row, sequence.past_numerator + m * value_dim_, value_dim_ * sizeof(float));
            for (long d = value_dim_; d < value_width_; d++) row[d] = 0;
        }
        std::memcpy(state_.denominator, sequence.past_denominator, features_ * sizeof(float));
        std::memcpy(state_.log, sequence.past_log, features_ * sizeof(float));
    }

    bool in_tiles() const { return tiles_; }

    void forward() {
        if (causal_) {
            forward_causal();
        } else {
            absorb(0, s_->keys);
            read(0, s_->queries);
        }
        save_state();
    }

    void backward() {
        if (causal_) {
            backward_causal();
        } else {
            if (s_->after_numerator != nullptr) {
                take_state(s_->after_numerator, s_->after_denominator, s_->after_log);
            } else {
                absorb(0, s_->keys);
            }
            start_reverse();
            pull_queries(0, s_->queries);
            pull_keys(0, s_->keys);
        }
        save_past_gradient();
    }

   private:
    // Rows of features that vectors can be read from: themselves, or a copy with zeros at the end.
    const float* padded(const float* rows, long stride, float* copy, const float*& copied, long& result_stride) {
        if (dim_ == width_) {
            result_stride = stride;
            return rows;
        }
        result_stride = width_;
        if (copied != rows)
            for (long m = 0; m < features_; m++) {
                std::memcpy(copy + m * width_, rows + m * stride, dim_ * sizeof(float));
                for (long d = dim_; d < width_; d++) copy[m * width_ + d] = 0;
            }
        copied = rows;
        return copy;
    }

    void save_state() {
        if (s_->after_numerator == nullptr) return;
        for (long m = 0; m < features_; m++)
            std::memcpy(s_->after_numerator + m * value_dim_, state_.numerator + m * value_width_, value_dim_ * sizeof(float));
        std::memcpy(s_->after_denominator, state_.denominator, features_ * sizeof(float));
        std::memcpy(s_->after_log, state_.log, features_ * sizeof(float));
    }

    void take_state(const float* numerator, const float* denominator, const float* log) {
        for (long m = 0; m < features_; m++)
            std::memcpy(state_.numerator + m * value_width_, numerator + m * value_dim_, value_dim_ * sizeof(float));
        std::memcpy(state_.denominator, denominator, features_ * sizeof(float));
        std::memcpy(state_.log, log, features_ * sizeof(float));
    }

    // ----- loading a panel

    void load_queries(long first, int n) {
        look_ahead(0, s_->q, first, n, s_->queries, dim_);
        load_rows(s_->q, type_, first, n, dim_, width_, x_);
        transpose(x_, width_, x_t_, TOKENS, rounded(n), width_);
        if (tiles_) pack_right(dim_, rounded(n), x_t_, TOKENS, x_tiles_);
    }

    // Also t, the log weight of each key: -inf where it is padding, past the end, or so far out that its square overflows. Such
    // keys are set to zero, so that nothing that is computed from them is ever NaN.
    void load_keys(long first, int n) {
        look_ahead(1, s_->k, first, n, s_->keys, dim_);
        load_rows(s_->k, type_, first, n, dim_, width_, x_);
        if (s_->mask != nullptr)
            for (int i = 0; i < n; i++)
                if (!s_->mask[first + i]) std::memset(x_ + i * width_, 0, width_ * sizeof(float));
        transpose(x_, width_, x_t_, TOKENS, rounded(n), width_);
        bool far = false;
        for (int j = 0; j < rounded(n); j += LANES) {
            Vec squares = {};
            if (exponential_kernel())
                for (long d = 0; d < dim_; d++) {
                    const Vec x = load(x_t_ + d * TOKENS + j);
                    squares += x * x * s_->metric[d];
                }
            store(log_weight_ + j, squares * -0.5f);
        }
        for (int i = 0; i < TOKENS; i++) {
            const bool real = i < n && (s_->mask == nullptr || s_->mask[first + i]);
            if (real && std::isfinite(log_weight_[i])) continue;
            far |= real;
            log_weight_[i] = -INF;
        }
        if (far) {
            for (int i = 0; i < n; i++)
                if (log_weight_[i] == -INF) std::memset(x_ + i * width_, 0, width_ * sizeof(float));
            transpose(x_, width_, x_t_, TOKENS, rounded(n), width_);
        }
        if (tiles_) pack_right(dim_, rounded(n), x_t_, TOKENS, x_tiles_);
    }

    void load_values(long first, int n) {
        look_ahead(2, s_->v, first, n, s_->keys, value_dim_);
        load_rows(s_->v, type_, first, n, value_dim_, value_width_, v_);
    }

    void load_d_out(long first, int n) {
        look_ahead(3, s_->out, first, n, s_->queries, value_dim_);
        load_rows(s_->out, type_, first, n, value_dim_, value_width_, d_o_);
    }

    // Has the rows of the next panel fetched, a few at each call of fetch_ahead.
    void look_ahead(int tensor, const Rows& rows, long first, int n, long length, long dim) {
        const long size = size_of(type_), next = first + direction_ * n;
        const long left = next < 0 ? 0 : std::min<long>(n, length - next);
        ahead_[tensor] = {rows.data + next * rows.stride * size, rows.stride * size, dim * size, left};
    }

    void fetch_ahead() {
        for (Ahead& rows : ahead_)
            for (int i = 0; i < ahead_rows_ && rows.left > 0; i++, rows.left--, rows.data += rows.step)
                for (long at = 0; at < rows.size; at += 64) __builtin_prefetch(rows.data + at, 0, 2);
    }

    // ----- products: in registers, or rounded and in tiles

    // Rows of features in tiles, `parts_` of them after each other: W rounded, and what rounding took away.
    void pack_rows(const float* w, long stride, Half* to) {
        std::vector<float> parts(16 * parts_ * rounded_depth(dim_));
        for (long m = 0; m < features_; m += 16) {
            std::fill(parts.begin(), parts.end(), 0.0f);
            const long line = parts_ * rounded_depth(dim_);
            for (long i = 0; i < std::min<long>(16, features_ - m); i++)
                for (long d = 0; d < dim_; d++) {
                    const float x = w[(m + i) * stride + d], high = widened(narrowed(x));
                    parts[i * line + d] = high;
                    if (parts_ > 1) parts[i * line + rounded_depth(dim_) + d] = x - high;
                }
            pack_left<false>(16, line, parts.data(), line, to);
            to += 16 * line;
        }
    }

    static long rounded_depth(long depth) { return (depth + 31) / 32 * 32; }

    // The right factor (depth, columns) of the products to come, until the next one in the same slot.
    Right right(int slot, const float* b, long ldb, long depth, long columns) {
        if (tiles_) pack_right(depth, columns, b, ldb, right_[slot]);
        return {b, ldb, tiles_ ? right_[slot] : nullptr};
    }

    // C = A B or C + A B, where A is (rows, depth), or (depth, rows) if TRANSPOSED.
    template <bool TRANSPOSED>
    void multiply(long rows, long columns, long depth, const float* a, long lda, const Right& b, float* c, long ldc,
                  bool accumulate) {
        if (tiles_) {
            pack_left<TRANSPOSED>(rows, depth, a, lda, left_);
            tile_product(rows, columns, depth, 1, left_, b.tiles, c, ldc, accumulate);
        } else {
            product<TRANSPOSED>(rows, columns, depth, a, lda, b.data, b.stride, c, ldc, accumulate);
        }
    }

    // u = W x of some features from m on, into rows of phi.
    void project(const float* w, long stride, const Half* w_tiles, long m, long rows, long columns, float* phi) {
        fetch_ahead();
        if (s_->queries == 1 && s_->keys == 1) {
            project_token(w, stride, m, rows, phi);
        } else if (tiles_) {
            tile_product(rows, columns, dim_, parts_, w_tiles + m * parts_ * rounded_depth(dim_), x_tiles_, phi + m * STRIDE,
                         STRIDE, false);
        } else {
            product<false>(rows, columns, dim_, w + m * stride, stride, x_t_, TOKENS, phi + m * STRIDE, STRIDE, false);
        }
    }

    // The same for a call on a single token: dot products along the rows of W.
    void project_token(const float* w, long stride, long m, long rows, float* phi) {
        for (long i = m; i < m + rows; i++) {
            Vec total = {};
            for (long d = 0; d < width_; d += LANES) total += load(w + i * stride + d) * load(x_ + d);
            std::memset(phi + i * STRIDE, 0, BLOCK * sizeof(float));
            phi[i * STRIDE] = sum(total);
        }
    }

    void project_queries(long m, long rows, long columns) { project(wq_, wq_stride_, query_tiles_, m, rows, columns, phi_q_); }
    void project_keys(long m, long rows, long columns) { project(wk_, wk_stride_, key_tiles_, m, rows, columns, phi_k_); }

    // S += phi^T x, a sum over the n tokens of the panel.
    void add_outer(int n, const float* phi, const float* x, float* sums) {
        const Right tokens = right(0, x, value_width_, n, value_width_);
        multiply<false>(features_, value_width_, n, phi, STRIDE, tokens, sums, value_width_, true);
    }

    // result (n, columns) = phi^T B, a sum over all features.
    void contract(int n, const float* phi, const float* b, long ldb, float* result, long columns) {
        const long depth = tiles_ ? features_ : DEPTH;
        for (long m = 0; m < features_; m += depth) {
            const long here = std::min(depth, features_ - m);
            const Right rows = right(0, b + m * ldb, ldb, here, columns);
            multiply<true>(n, columns, here, phi + m * STRIDE, STRIDE, rows, result, columns, m > 0);
        }
    }

    // S of feature m is divided by exp(log - S's scale so far).
    void rescale(Summary& summary, long m, float log) {
        const float factor = exponential(summary.log[m] - log);
        float* row = summary.numerator + m * value_width_;
        for (long d = 0; d < value_width_; d += LANES) store(row + d, load(row + d) * factor);
        summary.denominator[m] *= factor;
        summary.log[m] = log;
    }

    // ----- the state alone: bidirectional attention, and tokens before the causal part

    void absorb(long first, long last) {
        for (long at = first; at < last; at += TOKENS) {
            const int n = static_cast<int>(std::min<long>(TOKENS, last - at));
            load_keys(at, n);
            load_values(at, n);
            const int columns = rounded(n);
            for (long m0 = 0; m0 < features_; m0 += block_) {
                const long m1 = std::min(m0 + block_, features_);
                project_keys(m0, m1 - m0, columns);
                for (long m = m0; m < m1; m++) {
                    if (exponential_kernel()) {
                        absorb_log(m, columns);
                    } else {
                        state_.denominator[m] += pointwise_row(m, columns, phi_k_, true);
                    }
                }
            }
            add_outer(n, phi_k_, v_, state_.numerator);
        }
    }

    // phi of the panel's keys for feature m, whose scale is raised first if need be.
    void absorb_log(long m, int columns) {
        float* row = phi_k_ + m * STRIDE;
        const float bias = s_->bias[m];
        Vec top = all(-INF);
        for (int j = 0; j < columns; j += LANES) {
            const Vec b = load(row + j) + (load(log_weight_ + j) + bias);
            store(row + j, b);
            top = larger(b, top);
        }
        if (any_greater(top, all(state_.log[m]))) rescale(state_, m, largest(top));
        const float scale = finite(state_.log[m]);
        Vec total = {};
        for (int j = 0; j < columns; j += LANES) {
            const Vec phi = exponential(load(row + j) - scale);
            store(row + j, phi);
            total += phi;
        }
        state_.denominator[m] += sum(total);
    }

    // f of one row of projections, zero for keys that do not count; returns its sum.
    float pointwise_row(long m, int columns, float* panel, bool keys) {
        float* row = panel + m * STRIDE;
        Vec total = {};
        for (int j = 0; j < columns; j += LANES) {
            Vec phi = pointwise(kernel_, load(row + j));
            if (keys) phi = load(log_weight_ + j) > -INF ? phi : Vec{};
            store(row + j, phi);
            total += phi;
        }
        return keys ? sum(total) : 0.0f;
    }

    // phi of the queries that are loaded, at the scales `log` and divided by the exponential of their own largest; and the
    // denominators over the state.
    void query_features(int columns, const float* log) {
        for (int j = 0; j < columns; j += LANES) store(peak_ + j, all(-INF)), store(denominator_ + j, Vec{});
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            project_queries(m0, m1 - m0, columns);
            for (long m = m0; m < m1; m++) {
                float* row = phi_q_ + m * STRIDE;
                if (exponential_kernel()) {
                    for (int j = 0; j < columns; j += LANES) {
                        const Vec a = load(row + j) + log[m];
                        store(row + j, a);
                        store(peak_ + j, larger(a, load(peak_ + j)));
                    }
                } else {
                    pointwise_row(m, columns, phi_q_, false);
                    for (int j = 0; j < columns; j += LANES)
                        store(denominator_ + j, load(denominator_ + j) + load(row + j) * state_.denominator[m]);
                }
            }
        }
        if (!exponential_kernel()) return;
        for (int j = 0; j < columns; j += LANES) {
            const Vec peak = load(peak_ + j);
            store(total_ + j, peak > -INF ? peak : Vec{});
        }
        for (long m = 0; m < features_; m++)
            for (int j = 0; j < columns; j += LANES) {
                const Vec phi = exponential(load(phi_q_ + m * STRIDE + j) - load(total_ + j));
                store(phi_q_ + m * STRIDE + j, phi);
                store(denominator_ + j, load(denominator_ + j) + phi * state_.denominator[m]);
            }
    }

    void scale_rows(float* rows, int n, const float* factors) {
        for (int i = 0; i < n; i++, rows += value_width_)
            for (long d = 0; d < value_width_; d += LANES) store(rows + d, load(rows + d) * factors[i]);
    }

    void save_normaliser(long first, int n) {
        for (int i = 0; i < n; i++)
            s_->normaliser[first + i] = !exponential_kernel()     ? denominator_[i]
                                        : denominator_[i] > 0.0f ? peak_[i] + std::log(denominator_[i])
                                                                  : -INF;
    }

    void read(long first, long last) {
        for (long at = first; at < last; at += TOKENS) {
            const int n = static_cast<int>(std::min<long>(TOKENS, last - at));
            load_queries(at, n);
            query_features(rounded(n), state_.log);
            contract(n, phi_q_, state_.numerator, value_width_, o_, value_width_);
            store_out(at, n);
        }
    }

    void store_out(long at, int n) {
        if (s_->normaliser != nullptr) save_normaliser(at, n);
        for (int j = 0; j < TOKENS; j += LANES) store(denominator_ + j, 1.0f / guarded(load(denominator_ + j)));
        scale_rows(o_, n, denominator_);
        store_rows(s_->out, type_, at, n, value_dim_, value_width_, o_);
    }

    // ----- the backward pass over the state alone

    void start_reverse() {
        for (long m = 0; m < features_; m++) {
            float* row = reverse_.numerator + m * value_width_;
            if (s_->d_after_numerator == nullptr) {
                std::memset(row, 0, value_width_ * sizeof(float));
                reverse_.denominator[m] = 0;
            } else {
                std::memcpy(row, s_->d_after_numerator + m * value_dim_, value_dim_ * sizeof(float));
                for (long d = value_dim_; d < value_width_; d++) row[d] = 0;
                reverse_.denominator[m] = s_->d_after_denominator[m];
            }
            reverse_.log[m] = -finite(s_->after_log == nullptr ? state_.log[m] : s_->after_log[m]);
        }
    }

    void save_past_gradient() {
        if (s_->d_past_numerator == nullptr) return;
        for (long m = 0; m < features_; m++) {
            const float keep = exponential_kernel() ? exponential(s_->past_log[m] + reverse_.log[m]) : 1.0f;
            for (long d = 0; d < value_dim_; d++)
                s_->d_past_numerator[m * value_dim_ + d] = reverse_.numerator[m * value_width_ + d] * keep;
            s_->d_past_denominator[m] = reverse_.denominator[m] * keep;
        }
    }

    // Gradients of queries that see the state alone, and what they owe to R and r, at the scale of the state.
    void pull_queries(long first, long last) {
        for (long at = first; at < last; at += TOKENS) {
            const int n = static_cast<int>(std::min<long>(TOKENS, last - at)), columns = rounded(n);
            load_queries(at, n);
            load_d_out(at, n);
            query_features(columns, state_.log);
            // Everything is linear in d_out: it is divided by the denominators in place of phi.
            for (int j = 0; j < columns; j += LANES) store(denominator_ + j, 1.0f / guarded(load(denominator_ + j)));
            scale_rows(d_o_, n, denominator_);
            transpose(d_o_, value_width_, d_o_t_, TOKENS, columns, value_width_);
            query_slopes(columns, 0);
            for (int j = 0; j < columns; j += LANES) store(slope_ + j, load(slope_ + j) * load(denominator_ + j));
            for (long m = 0; m < features_; m++) {
                const float z = state_.denominator[m];
                Vec owed = {};
                for (int j = 0; j < columns; j += LANES) {
                    const Vec phi = load(phi_q_ + m * STRIDE + j), slope = load(slope_ + j);
                    owed += phi * slope;
                    store(aux_ + m * STRIDE + j, derivative(kernel_, phi) * (load(aux_ + m * STRIDE + j) - slope * z));
                }
                reverse_.denominator[m] -= sum(owed);
            }
            add_outer(n, phi_q_, d_o_, reverse_.numerator);
            contract(n, aux_, wq_, wq_stride_, g_, width_);
            store_rows(s_->d_q, type_, at, n, dim_, width_, g_);
        }
    }

    // aux = S d_out^T, with the panel's own n keys (0 for none) phi_k slopes as well; and slope, its sums with phi_q.
    void query_slopes(int columns, int n) {
        const int half = TOKENS / 2;
        for (int j = 0; j < columns; j += LANES) store(slope_ + j, Vec{});
        const Right d_out = right(0, d_o_t_, TOKENS, value_dim_, columns);
        const Right own = n > 0 ? right(1, slopes_, STRIDE, n, columns) : Right{};
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            multiply<false>(m1 - m0, columns, value_dim_, state_.numerator + m0 * value_width_, value_width_, d_out,
                            aux_ + m0 * STRIDE, STRIDE, false);
            if (n > 0 && tiles_)
                multiply<false>(m1 - m0, columns, n, phi_k_ + m0 * STRIDE, STRIDE, own, aux_ + m0 * STRIDE, STRIDE, true);
            for (int i = 0; n > 0 && !tiles_ && i < columns; i += half)
                product<false>(m1 - m0, std::min(half, columns - i), std::min(n, i + half), phi_k_ + m0 * STRIDE, STRIDE,
                               slopes_ + i, STRIDE, aux_ + m0 * STRIDE + i, STRIDE, true);
            add_slopes(m0, m1, columns);
        }
    }

    void add_slopes(long m0, long m1, int columns) {
        for (int j = 0; j < columns; j += LANES) {
            Vec slope = load(slope_ + j);
            for (long m = m0; m < m1; m++) slope += load(phi_q_ + m * STRIDE + j) * load(aux_ + m * STRIDE + j);
            store(slope_ + j, slope);
        }
    }

    // Gradients of keys and values that all the queries collected in R and r see.
    void pull_keys(long first, long last) {
        for (long at = first; at < last; at += TOKENS) {
            const int n = static_cast<int>(std::min<long>(TOKENS, last - at)), columns = rounded(n);
            load_keys(at, n);
            load_values(at, n);
            transpose(v_, value_width_, v_t_, TOKENS, columns, value_width_);
            reverse_key_features(columns);
            for (int j = 0; j < columns; j += LANES) store(total_ + j, Vec{});
            const Right values = right(0, v_t_, TOKENS, value_dim_, columns);
            for (long m0 = 0; m0 < features_; m0 += block_) {
                const long m1 = std::min(m0 + block_, features_);
                multiply<false>(m1 - m0, columns, value_dim_, reverse_.numerator + m0 * value_width_, value_width_, values,
                                aux_ + m0 * STRIDE, STRIDE, false);
                key_slopes(m0, m1, columns);
            }
            contract(n, phi_k_, reverse_.numerator, value_width_, o_, value_width_);
            store_key_gradients(at, n);
        }
    }

    // phi of the keys that are loaded, at the scale of R.
    void reverse_key_features(int columns) {
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            project_keys(m0, m1 - m0, columns);
            for (long m = m0; m < m1; m++) {
                if (exponential_kernel()) {
                    const float shift = finite(reverse_.log[m]), bias = s_->bias[m];
                    for (int j = 0; j < columns; j += LANES) {
                        const Vec b = load(phi_k_ + m * STRIDE + j) + (load(log_weight_ + j) + bias);
                        store(phi_k_ + m * STRIDE + j, exponential(b + shift));
                    }
                } else {
                    pointwise_row(m, columns, phi_k_, true);
                }
            }
        }
    }

    // aux = R v^T + ... becomes the gradient of the projections; total its sum over the features.
    void key_slopes(long m0, long m1, int columns) {
        for (long m = m0; m < m1; m++)
            for (int j = 0; j < columns; j += LANES) {
                const Vec phi = load(phi_k_ + m * STRIDE + j);
                const Vec d_u = derivative(kernel_, phi) * (load(aux_ + m * STRIDE + j) + reverse_.denominator[m]);
                store(aux_ + m * STRIDE + j, d_u);
                store(total_ + j, load(total_ + j) + d_u);
            }
    }

    // dk from aux, and dv from o.
    void store_key_gradients(long at, int n) {
        contract(n, aux_, wk_, wk_stride_, g_, width_);
        for (int i = 0; i < n; i++) {
            float* row = g_ + i * width_;
            if (log_weight_[i] == -INF) {
                std::memset(row, 0, width_ * sizeof(float));
            } else if (exponential_kernel()) {
                for (long d = 0; d < dim_; d++) row[d] -= x_[i * width_ + d] * s_->metric[d] * total_[i];
            }
        }
        store_rows(s_->d_k, type_, at, n, dim_, width_, g_);
        store_rows(s_->d_v, type_, at, n, value_dim_, value_width_, o_);
    }

    // ----- causal

    // Calls step(query, key, n) for the panels of n tokens that make up the causal part, with phi_k and the state at their scale.
    template <class Step>
    void scan(Step step) {
        const long early = std::max<long>(0, s_->queries - s_->keys), prefix = std::max<long>(0, s_->keys - s_->queries);
        const int most = tiles_ ? TOKENS : CAUSAL_TOKENS;
        int limit = most;
        for (long at = 0; at < s_->queries - early;) {
            const int wanted = static_cast<int>(std::min<long>(limit, s_->queries - early - at));
            const int n = causal_keys(prefix + at, wanted);
            load_values(prefix + at, n);
            step(early + at, prefix + at, n);
            absorb_panel(n);
            at += n;
            limit = n < wanted ? BLOCK : most;  // far-out keys tend to come together
        }
    }

    // Loads up to `n` keys and returns how many of them make up a panel. Sets phi_k to their features and, for exponential ones,
    // brings the state to the panel's scale; `added_` and `top_` are what absorb_panel needs.
    int causal_keys(long at, int n) {
        load_keys(at, n);
        const int columns = rounded(n);
        for (int j = 0; j < columns; j += LANES) store(total_ + j, all(-INF));
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            project_keys(m0, m1 - m0, columns);
            for (long m = m0; m < m1; m++) {
                if (!exponential_kernel()) {
                    added_[m] = pointwise_row(m, columns, phi_k_, true);
                    continue;
                }
                float* row = phi_k_ + m * STRIDE;
                const float bias = s_->bias[m];
                for (int j = 0; j < columns; j += LANES) store(row + j, load(row + j) + (load(log_weight_ + j) + bias));
                if (row[0] > state_.log[m]) rescale(state_, m, row[0]);
                const float scale = state_.log[m];
                for (int j = 0; j < columns; j += LANES) store(total_ + j, larger(load(row + j) - scale, load(total_ + j)));
            }
        }
        if (!exponential_kernel()) return n;
        for (int i = 1; i < n; i++)
            if (total_[i] > JUMP) n = i;
        for (int i = n; i < columns; i++) log_weight_[i] = -INF;
        for (long m = 0; m < features_; m++) {
            float* row = phi_k_ + m * STRIDE;
            const float scale = finite(state_.log[m]);
            Vec top = all(-INF), total = {};
            for (int j = 0; j < columns; j += LANES) {
                const Vec b = load(log_weight_ + j) > -INF ? load(row + j) : all(-INF);
                const Vec phi = exponential(b - scale);
                store(row + j, phi);
                top = larger(b, top);
                total += phi;
            }
            added_[m] = sum(total);
            top_[m] = any_greater(top, all(state_.log[m])) ? largest(top) : state_.log[m];
        }
        return n;
    }

    void absorb_panel(int n) {
        add_outer(n, phi_k_, v_, state_.numerator);
        for (long m = 0; m < features_; m++) {
            state_.denominator[m] += added_[m];
            if (exponential_kernel() && top_[m] > state_.log[m]) rescale(state_, m, top_[m]);
        }
    }

    // How many columns of row i of a (64, 64) matrix of pairs are computed, when those right of the diagonal are not wanted.
    int computed(int i, int n) const { return rounded(tiles_ ? n : std::min(n, i / TILE_ROWS * TILE_ROWS + TILE_ROWS)); }

    // weights = phi_q^T phi_k where the key does not come after the query, else zero.
    void panel_weights(int n) {
        const long depth = tiles_ ? features_ : DEPTH;
        const int step = tiles_ ? n : TILE_ROWS;
        for (long m = 0; m < features_; m += depth) {
            const long here = std::min(depth, features_ - m);
            const Right keys = right(0, phi_k_ + m * STRIDE, STRIDE, here, rounded(n));
            for (int i = 0; i < n; i += step)
                multiply<true>(std::min(step, n - i), computed(i, n), here, phi_q_ + m * STRIDE + i, STRIDE, keys,
                               weights_ + i * STRIDE, STRIDE, m > 0);
        }
        for (int i = 0; i < n; i++)
            for (int j = 0; j < computed(i, n); j += LANES) keep_until(weights_ + i * STRIDE + j, j, i, 0.0f);
    }

    // Of LANES entries from column j on, those up to column `last` less `shift`, and zeros.
    static void keep_until(float* p, int j, int last, float shift) {
        store(p, iota(j) <= static_cast<float>(last) ? load(p) - shift : Vec{});
    }

    void forward_causal() {
        absorb(0, std::max<long>(0, s_->keys - s_->queries));
        read(0, std::max<long>(0, s_->queries - s_->keys));
        scan([&](long query, long, int n) {
            load_queries(query, n);
            query_features(rounded(n), state_.log);
            panel_weights(n);
            for (int i = 0; i < n; i++) {
                Vec own = {};
                for (int j = 0; j < rounded(i + 1); j += LANES) own += load(weights_ + i * STRIDE + j);
                denominator_[i] += sum(own);
            }
            contract(n, phi_q_, state_.numerator, value_width_, o_, value_width_);
            const Right values = right(0, v_, value_width_, n, value_width_);
            const int step = tiles_ ? n : TILE_ROWS;
            for (int i = 0; i < n; i += step) {
                const int rows = std::min(step, n - i);
                multiply<false>(rows, value_width_, i + rows, weights_ + i * STRIDE, STRIDE, values, o_ + i * value_width_,
                                value_width_, true);
            }
            store_out(query, n);
        });
    }

    void backward_causal() {
        const long early = std::max<long>(0, s_->queries - s_->keys), prefix = std::max<long>(0, s_->keys - s_->queries);
        absorb(0, prefix);
        std::vector<float> slopes(s_->queries);  // d_out . out, over the denominator for pointwise features
        std::vector<int> panels;
        for (long at = 0; at < early; at += TOKENS)
            pull_causal_queries(at, static_cast<int>(std::min<long>(TOKENS, early - at)), false, slopes.data());
        scan([&](long query, long, int n) {
            pull_causal_queries(query, n, true, slopes.data());
            panels.push_back(n);
        });
        start_reverse();
        direction_ = -1;
        for (long at = s_->queries - early; !panels.empty(); panels.pop_back()) {
            at -= panels.back();
            pull_causal_keys(early + at, prefix + at, panels.back(), slopes.data());
        }
        for (long at = 0; at < early; at += TOKENS) {
            const int n = static_cast<int>(std::min<long>(TOKENS, early - at));
            load_reverse_queries(at, n, slopes.data());
            collect(n);
        }
        pull_keys(0, prefix);
    }

    // What the normaliser says: log denominators, +inf where nothing counts, or inverse denominators.
    void load_normaliser(long first, int n) {
        for (int i = 0; i < TOKENS; i++) {
            const float saved = i < n ? s_->normaliser[first + i] : -INF;
            log_sum_[i] = saved == -INF ? INF : saved;
            denominator_[i] = 1.0f;
        }
        if (exponential_kernel()) return;
        for (int i = 0; i < n; i++) denominator_[i] = s_->normaliser[first + i];
        for (int j = 0; j < TOKENS; j += LANES) store(denominator_ + j, 1.0f / guarded(load(denominator_ + j)));
        scale_rows(d_o_, n, denominator_);
    }

    // dq of queries that see the state and, if `own`, the panel's keys.
    void pull_causal_queries(long at, int n, bool own, float* slopes) {
        const int columns = rounded(n);
        load_queries(at, n);
        load_d_out(at, n);
        load_normaliser(at, n);
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            project_queries(m0, m1 - m0, columns);
            for (long m = m0; m < m1; m++) {
                if (!exponential_kernel()) {
                    pointwise_row(m, columns, phi_q_, false);
                    continue;
                }
                for (int j = 0; j < columns; j += LANES) {
                    float* p = phi_q_ + m * STRIDE + j;
                    store(p, exponential((load(p) + state_.log[m]) - load(log_sum_ + j)));
                }
            }
        }
        transpose(d_o_, value_width_, d_o_t_, TOKENS, columns, value_width_);
        if (own) {  // slopes[j][i] = v_j . d_out_i where key j does not come after query i, else zero
            const Right d_out = right(0, d_o_t_, TOKENS, value_dim_, columns);
            const int step = tiles_ ? n : TILE_ROWS;
            for (int j = 0; j < n; j += step) {
                const int rows = std::min(step, n - j), start = tiles_ ? 0 : j / BLOCK * BLOCK;
                multiply<false>(rows, columns - start, value_dim_, v_ + j * value_width_, value_width_,
                                {d_out.data + start, d_out.stride, d_out.tiles}, slopes_ + j * STRIDE + start, STRIDE, false);
                for (int r = j; r < j + rows; r++)
                    for (int i = 0; i < rounded(r + 1); i += LANES) {
                        float* p = slopes_ + r * STRIDE + i;
                        store(p, iota(i) < static_cast<float>(r) ? Vec{} : load(p));
                    }
            }
        }
        query_slopes(columns, own ? n : 0);
        for (int j = 0; j < columns; j += LANES) store(slope_ + j, load(slope_ + j) * load(denominator_ + j));
        std::memcpy(slopes + at, slope_, n * sizeof(float));
        for (long m = 0; m < features_; m++) {
            Vec z = all(state_.denominator[m]);
            for (int j = 0; j < columns; j += LANES) {
                float* p = aux_ + m * STRIDE + j;
                if (own) z = running_sum(load(phi_k_ + m * STRIDE + j)) + z[LANES - 1];
                store(p, derivative(kernel_, load(phi_q_ + m * STRIDE + j)) * (load(p) - load(slope_ + j) * z));
            }
        }
        contract(n, aux_, wq_, wq_stride_, g_, width_);
        store_rows(s_->d_q, type_, at, n, dim_, width_, g_);
    }

    // phi of queries at the scale of R, which is raised first if need be; d_out and slopes as they go into R and r.
    void load_reverse_queries(long at, int n, const float* slopes) {
        const int columns = rounded(n);
        load_queries(at, n);
        load_d_out(at, n);
        load_normaliser(at, n);
        for (int i = 0; i < TOKENS; i++) slope_[i] = i < n ? slopes[at + i] : 0.0f;
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            project_queries(m0, m1 - m0, columns);
            for (long m = m0; m < m1; m++) {
                if (!exponential_kernel()) {
                    pointwise_row(m, columns, phi_q_, false);
                    continue;
                }
                float* row = phi_q_ + m * STRIDE;
                Vec top = all(-INF);
                for (int j = 0; j < columns; j += LANES) {
                    const Vec a = load(row + j) - load(log_sum_ + j);
                    store(row + j, a);
                    top = larger(a, top);
                }
                if (any_greater(top, all(reverse_.log[m]))) rescale(reverse_, m, largest(top));
                for (int j = 0; j < columns; j += LANES) store(row + j, exponential(load(row + j) - reverse_.log[m]));
            }
        }
    }

    // R and r with the queries of the panel.
    void collect(int n) {
        add_outer(n, phi_q_, d_o_, reverse_.numerator);
        for (long m = 0; m < features_; m++) {
            Vec owed = {};
            for (int j = 0; j < n; j += LANES) owed += load(phi_q_ + m * STRIDE + j) * load(slope_ + j);
            reverse_.denominator[m] -= sum(owed);
        }
    }

    // dk and dv of a panel, which its own queries and those collected in R and r see; then its queries are collected.
    void pull_causal_keys(long query, long key, int n, const float* slopes) {
        const int columns = rounded(n), half = TOKENS / 2;
        load_reverse_queries(query, n, slopes);
        load_keys(key, n);
        load_values(key, n);
        transpose(v_, value_width_, v_t_, TOKENS, columns, value_width_);
        reverse_key_features(columns);
        panel_weights(n);
        const Right values = right(0, v_t_, TOKENS, value_dim_, columns);
        const int step = tiles_ ? n : TILE_ROWS;
        for (int i = 0; i < n; i += step) {  // slopes[i][j] = d_out_i . (v_j - out_i)
            const int rows = std::min(step, n - i);
            multiply<false>(rows, computed(i, n), value_dim_, d_o_ + i * value_width_, value_width_, values,
                            slopes_ + i * STRIDE, STRIDE, false);
            for (int r = i; r < i + rows; r++)
                for (int j = 0; j < columns; j += LANES) keep_until(slopes_ + r * STRIDE + j, j, r, slope_[r]);
        }
        for (int j = 0; j < columns; j += LANES) store(total_ + j, Vec{});
        const Right own = right(1, slopes_, STRIDE, n, columns);
        for (long m0 = 0; m0 < features_; m0 += block_) {
            const long m1 = std::min(m0 + block_, features_);
            multiply<false>(m1 - m0, columns, value_dim_, reverse_.numerator + m0 * value_width_, value_width_, values,
                            aux_ + m0 * STRIDE, STRIDE, false);
            if (tiles_) multiply<false>(m1 - m0, columns, n, phi_q_ + m0 * STRIDE, STRIDE, own, aux_ + m0 * STRIDE, STRIDE, true);
            for (int j = 0; !tiles_ && j < columns; j += half)
                product<false>(m1 - m0, std::min(half, columns - j), n - j, phi_q_ + m0 * STRIDE + j, STRIDE,
                               slopes_ + j * STRIDE + j, STRIDE, aux_ + m0 * STRIDE + j, STRIDE, true);
            key_slopes(m0, m1, columns);
        }
        contract(n, phi_k_, reverse_.numerator, value_width_, o_, value_width_);
        const Right d_out = right(0, d_o_, value_width_, n, value_width_);
        for (int j = 0; j < n; j += step)
            multiply<true>(std::min(step, n - j), value_width_, n - j, weights_ + j * STRIDE + j, STRIDE,
                           {d_out.data + j * value_width_, value_width_, d_out.tiles}, o_ + j * value_width_, value_width_, true);
        store_key_gradients(key, n);
        collect(n);
    }
};

// ---------------------------------------------------------------------------------------------------------------------------
// One call: which sequences there are, and who works on them.

const float* head_of(const Tensor& tensor, long batch, long head) {
    return static_cast<const float*>(tensor.data) + batch * tensor.batch + head * tensor.head;
}

float* maybe_head_of(const Tensor& tensor, long batch, long head) {
    return tensor.data == nullptr ? nullptr : const_cast<float*>(head_of(tensor, batch, head));
}

Rows rows_of(const Tensor& tensor, const Call& call, long batch, long head, long first) {
    if (tensor.data == nullptr) return {nullptr, 0};
    const long at = batch * tensor.batch + head * tensor.head + first * tensor.row;
    return {static_cast<char*>(tensor.data) + size_of(static_cast<Type>(call.dtype)) * at, tensor.row};
}

// The sequence of task number `task`: heads run fastest.
Sequence sequence_of(const Call& call, long task) {
    const long head = task % call.heads, row = task / call.heads;  // row: of the batch, or of cu_seqlens
    const bool packed = call.segments >= 0;
    const long batch = packed ? 0 : row, first = packed ? call.cu_seqlens[row] : 0;
    Sequence s = {};
    s.queries = packed ? call.cu_seqlens[row + 1] - first : call.queries;
    s.keys = packed ? s.queries : call.keys;
    s.q = rows_of(call.query, call, batch, head, first), s.k = rows_of(call.key, call, batch, head, first);
    s.v = rows_of(call.value, call, batch, head, first), s.out = rows_of(call.out, call, batch, head, first);
    s.d_q = rows_of(call.d_query, call, batch, head, first), s.d_k = rows_of(call.d_key, call, batch, head, first);
    s.d_v = rows_of(call.d_value, call, batch, head, first);
    s.mask = call.mask == nullptr ? nullptr : call.mask + batch * call.keys;
    if (call.normaliser.data != nullptr) s.normaliser = maybe_head_of(call.normaliser, batch, head) + first;
    s.query_rows = head_of(call.query_rows, batch, head), s.query_rows_stride = call.query_rows.row;
    s.key_rows = head_of(call.key_rows, batch, head), s.key_rows_stride = call.key_rows.row;
    s.metric = head_of(call.metric, batch, head), s.bias = head_of(call.bias, batch, head);
    s.past_numerator = head_of(call.past_numerator, batch, head), s.past_log = head_of(call.past_log, batch, head);
    s.past_denominator = head_of(call.past_denominator, batch, head);
    if (!packed) {  // packed sequences start from the empty state, and nobody asks for their last one
        s.after_numerator = maybe_head_of(call.after_numerator, batch, head);
        s.after_denominator = maybe_head_of(call.after_denominator, batch, head);
        s.after_log = maybe_head_of(call.after_log, batch, head);
        s.d_after_numerator = maybe_head_of(call.d_after_numerator, batch, head);
        s.d_after_denominator = maybe_head_of(call.d_after_denominator, batch, head);
        s.d_past_numerator = maybe_head_of(call.d_past_numerator, batch, head);
        s.d_past_denominator = maybe_head_of(call.d_past_denominator, batch, head);
    }
    return s;
}

constexpr double SMALL = 2e7;  // operations, for which a thread is not worth its start

// Runs run(worker, task) for all tasks, on as many threads as are wanted and useful. Returns whether there was memory enough.
template <class Run>
bool for_each(const Call& call, long tasks, Run run) {
    const double tokens = static_cast<double>(call.batch * call.heads * std::max(call.queries, call.keys));
    const double work = 8.0 * tokens * call.features * call.dim;
    const long threads = work < SMALL ? 1 : std::min<long>(call.threads, tasks);
    std::atomic<long> next{0};
    std::atomic<bool> enough{true};
    const auto work_off = [&] {
        try {
            const FlushDenormals flush;
            Worker worker(call);
            const TileShapes shapes(worker.in_tiles());
            for (long task; (task = next.fetch_add(1)) < tasks;) run(worker, task);
        } catch (const std::bad_alloc&) {
            enough = false;
        }
    };
    std::vector<std::thread> others;
    try {
        for (long i = 1; i < threads; i++) others.emplace_back(work_off);
    } catch (...) {  // no more threads to be had: those that started, and this one, do it
    }
    work_off();
    for (std::thread& other : others) other.join();
    return enough;
}

// Has fresh memory come in large pages: a first touch of every 4 KB costs as much as a tenth of all the arithmetic.
void in_large_pages(const Tensor& tensor, long batch, std::size_t item) {
#if defined(__linux__)
    if (tensor.data == nullptr) return;
    const std::uintptr_t page = 1 << 21, start = reinterpret_cast<std::uintptr_t>(tensor.data);
    const std::uintptr_t first = (start + page - 1) / page * page, last = (start + batch * tensor.batch * item) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

long sequences(const Call& call) { return call.heads * (call.segments >= 0 ? call.segments : call.batch); }

}  // namespace

// Both return 0, or 1 where memory ran out.

extern "C" int performers_favor_forward(const Call* call) {
    in_large_pages(call->out, call->batch, size_of(static_cast<Type>(call->dtype)));
    return for_each(*call, sequences(*call), [&](Worker& worker, long task) {
               const Sequence sequence = sequence_of(*call, task);
               worker.open(sequence);
               worker.forward();
           })
               ? 0
               : 1;
}

extern "C" int performers_favor_backward(const Call* call) {
    for (const Tensor* gradient : {&call->d_query, &call->d_key, &call->d_value})
        in_large_pages(*gradient, call->batch, size_of(static_cast<Type>(call->dtype)));
    return for_each(*call, sequences(*call), [&](Worker& worker, long task) {
               const Sequence sequence = sequence_of(*call, task);
               worker.open(sequence);
               worker.backward();
           })
               ? 0
               : 1;
}
