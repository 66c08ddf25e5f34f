// The selective scan of S6 on a CPU: forward and backward of the operation that reference.py describes.
//
// b batch, k direction, l row, d channel, n state, g group of channels that share B and C.
//
// Channels lie side by side in SIMD registers, LANES to a vector and W vectors to a block. A block walks the
// sequence in chunks of T steps. In a chunk, NB states at a time go through all T steps, so that their values
// stay in registers; sums over the states wait in the Step records. The forward pass keeps the state at the
// start of every chunk; the backward pass takes the chunks from the last to the first, recomputes one, and
// runs the adjoint recurrence
//
//     g_t = C_t dy_t + a_{t+1} g_{t+1}          g: gradient with respect to h
//
// through it. Sums over channels (dB, dC) are made for a part of PART blocks, and the parts are added up in
// their order, whether one unit of work takes all of them or one each; sums over samples (dA, dD, dbias) and
// directions (du) have a fixed order too. So the result is bitwise the same at any number of threads.
//
// Denormal numbers are taken as zero on x86. NaN and infinity propagate: there is no -ffast-math in the flags.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef NF_CHUNK
#error "native.py defines NF_CHUNK, the number of steps between two states that are kept"
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define NF_LANES 16
#elif defined(__AVX__)
#define NF_LANES 8
#else
#define NF_LANES 4
#endif

// Loops over states and vectors vanish: the arrays they index live in registers.
#if defined(__clang__)
#define NF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NF_UNROLL _Pragma("GCC unroll 16")
#endif
#define NF_NOINLINE __attribute__((noinline))

namespace {

constexpr int LANES = NF_LANES;
constexpr int T = NF_CHUNK;
constexpr int W = 2;                            // vectors of channels in a block
constexpr int NB = LANES >= 8 ? 4 : 2;          // states that stay in registers together
constexpr int BLOCK = W * LANES;                // channels in a block
constexpr int64_t PART = 2;                     // blocks in a part
constexpr int64_t STATES_PER_THREAD = 1 << 17;  // states times steps for which a thread is worth starting
constexpr float LN2 = 0.693147180559945f;
constexpr float LOG2E = 1.44269504088896f;

static_assert(2 * NB <= LANES, "fold needs a lane for dB and dC of each state");

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef V VU __attribute__((aligned(4), may_alias));
typedef Half HalfU __attribute__((aligned(2), may_alias));

// ------------------------------------------------------------------------------------- what native.py passes

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct View {  // a tensor (b, k, l, d), d or l side by side: strides in elements, 0 for what is shared
    void* data;
    int64_t b, k, l, d, dtype;
};

struct Problem {
    int64_t batch, directions, length, channels, states, groups, threads, reverse;
    int64_t shared, softplus, tied, order_b, pieces;
    View u, delta, z, y, grad_y, du, ddelta, dz;
    const float *A, *B, *C, *D, *bias, *initial, *grad_last;
    const int64_t* order;
    float *last, *kept, *dA, *dB, *dC, *dD, *dbias, *dinitial;
};

// ------------------------------------------------------------------------------------------------ arithmetic

inline V splat(float x) { return x - V{}; }

inline V select(Lanes mask, V yes, V no) { return (V)((mask & (Lanes)yes) | (~mask & (Lanes)no)); }

// Lane i of the result is lane FROM::lane(i) of a, or of b from LANES on.
template <class FROM, size_t... I>
inline V shuffle(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, FROM::lane(I)...);
#else
    return __builtin_shuffle(a, b, Lanes{FROM::lane(I)...});
#endif
}
template <class FROM>
inline V shuffle(V a, V b) {
    return shuffle<FROM>(a, b, std::make_index_sequence<LANES>());
}

template <int FIRST>
struct Zip {  // a0 b0 a1 b1 ..., from lane FIRST on
    static constexpr int lane(int i) { return FIRST + i / 2 + i % 2 * LANES; }
};

// x[i] lane j becomes x[j] lane i.
inline void transpose(V* x) {
    for (int stage = 1; stage < LANES; stage *= 2) {
        V y[LANES];
        NF_UNROLL for (int i = 0; i < LANES / 2; ++i) {
            y[2 * i] = shuffle<Zip<0>>(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = shuffle<Zip<LANES / 2>>(x[i], x[i + LANES / 2]);
        }
        std::copy(y, y + LANES, x);
    }
}

template <int BIT>
struct Own {  // a where i lacks the bit, b where it has it: a blend
    static constexpr int lane(int i) { return i & BIT ? LANES + i : i; }
};
template <int BIT>
struct Other {  // the lanes that `Own` leaves out, next to those they belong to
    static constexpr int lane(int i) { return i & BIT ? LANES + (i ^ BIT) : i ^ BIT; }
};

// One vector whose lane i holds partial sums of x[i % COUNT].
template <int COUNT, int BIT = 1>
inline V fold(V* x) {
    if constexpr (COUNT == 1) {
        return x[0];
    } else {
        NF_UNROLL for (int i = 0; i < COUNT / 2; ++i)
            x[i] = shuffle<Own<BIT>>(x[2 * i], x[2 * i + 1]) + shuffle<Other<BIT>>(x[2 * i], x[2 * i + 1]);
        return fold<COUNT / 2, 2 * BIT>(x);
    }
}

// x within bounds; NaN stays NaN.
inline V bounded(V x, float low, float high) {
#if NF_LANES == 16
    return (V)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#elif NF_LANES == 8
    return (V)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)x));
#else
    x = select(x < low, splat(low), x);
    return select(x > high, splat(high), x);
#endif
}

// (2^f - 1) / f on [-1/2, 1/2]; the relative error of 2^f is 1e-7, and 0 at 0.
inline V power_slope(V f) {
    V p = f * 0.0013265119632706046f + 0.009671499952673912f;
    p = p * f + 0.05550732463598251f;
    p = p * f + 0.24022242426872253f;
    return p * f + 0.6931470036506653f;
}

// 2^x for finite x: 0 below 2^-126, infinite from 2^128.
#if NF_LANES == 16
inline V nearest(V x) { return (V)_mm512_roundscale_ps((__m512)x, 8); }
inline V scaled(V x, V n) { return (V)_mm512_scalef_ps((__m512)x, (__m512)n); }  // x 2^n

inline V exp2(V x) {
    V n = nearest(x), f = x - n;
    return scaled(f * power_slope(f) + 1.0f, n);
}
#else
// 2^n and f = x - n for the integer n nearest to x.
inline V split(V x, V& f) {
    const V magic = splat(12582912.0f);  // 1.5 2^23: adding it rounds to an integer, held in the lowest bits
    x = bounded(x, -127.0f, 128.0f);
    V shifted = x + magic;
    f = x - (shifted - magic);
    return (V)(((U)shifted + 127) << 23);
}
inline V exp2(V x) {
    V f, s = split(x, f);
    return s * (f * power_slope(f) + 1.0f);
}
#endif

inline V sigmoid(V x) { return 1.0f / (1.0f + exp2(bounded(x * -LOG2E, -200.0f, 200.0f))); }

// log(1 + exp(x)), with a small relative error everywhere, and its slope 1 / (1 + exp(-x)) if asked for.
template <bool SLOPE>
inline V softplus(V x, V& slope) {
    V e = exp2(bounded(select(x < 0.0f, x, -x) * LOG2E, -200.0f, 0.0f));  // exp(-|x|)
    if (SLOPE) slope = select(x < 0.0f, e, splat(1.0f)) / (1.0f + e);
    V s = e / (2.0f + e), q = s * s;  // log1p(e) = 2 artanh(e / (2 + e))
    V p = q * 0.2817833423614502f + 0.27960601449012756f;
    p = p * q + 0.40024909377098083f;
    p = p * q + 0.6666631698608398f;
    p = p * q + 2.0f;
    return select(x < 0.0f, V{}, x) + s * p;
}

// --------------------------------------------------------------------------------------------- tiles of rows

struct Block {
    V v[W];  // BLOCK channels
};

struct Vector {
    V v;
};

struct Rows {  // the rows that `count` steps visit
    int64_t at[T];
    int count;
    int walk;  // 1 or -1: rows follow each other upwards or downwards; 0: gathered
};

inline V load(const float* p) { return *(const VU*)p; }
inline V load(const uint16_t* p) { return (V)(__builtin_convertvector(*(const HalfU*)p, U) << 16); }
inline void store(float* p, V x) { *(VU*)p = x; }
inline void store(uint16_t* p, V x) {
    U bits = (U)x;
    U rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    rounded = (U)select(x == x, (V)rounded, (V)(bits | 0x400000));  // NaN stays NaN
    *(HalfU*)p = __builtin_convertvector(rounded >> 16, Half);
}

// Rows of `channels` channels from `offset` on into tile[0], tile[stride], ..., missing channels as 0; or back.
template <bool STORE, class S>
void move_rows(const View& x, int64_t offset, const Rows& rows, int channels, Block* tile, int stride) {
    for (int j = 0; j < W; ++j) {
        const int lanes = std::min(std::max(channels - j * LANES, 0), LANES);
        S* first = (S*)x.data + offset + j * LANES * x.d;
        int t = 0;
        for (; x.d != 1 && rows.walk && t + LANES <= rows.count; t += LANES) {  // rows side by side
            V square[LANES];
            const int from = rows.walk > 0 ? t : t + LANES - 1;
            S* corner = first + rows.at[from];
            for (int i = 0; i < LANES; ++i) {
                if (STORE) square[i] = tile[(from + i * rows.walk) * stride].v[j];
                if (!STORE) square[i] = i < lanes ? load(corner + i * x.d) : V{};
            }
            transpose(square);
            for (int i = 0; i < LANES; ++i) {
                if (STORE && i < lanes) store(corner + i * x.d, square[i]);
                if (!STORE) tile[(from + i * rows.walk) * stride].v[j] = square[i];
            }
        }
        for (; t < rows.count; ++t) {
            S *p = first + rows.at[t] * x.l, some[LANES] = {};
            V& value = tile[t * stride].v[j];
            const bool whole = lanes == LANES && x.d == 1;
            if (STORE) store(whole ? p : some, value);
            for (int c = 0; !whole && c < lanes; ++c) (STORE ? p[c * x.d] : some[c]) = STORE ? some[c] : p[c * x.d];
            if (!STORE) value = load(whole ? p : some);
        }
    }
}

// ------------------------------------------------------------------------------------------- the inner loops

struct Step {
    Block dt, dtu;   // step size; times u
    Block y;         // sum over n of C h; then the output
    Block e, power;  // tied decays: exp(dt A); e^n of the states done so far
    Block dy;        // gradient of y before the gate
    Block sum_B;     // sum over n of g B; then du
    Block sum_A;     // sum over n of g a h_before times A log2(e), tied decays times n + 1; then ddelta
    Block size;      // dt, whose own entry is kept finite so that exp2 never sees infinity
    Block u, slope;  // input; d dt / d delta
    Block z, raw_dy; // gate, then dz; gradient of y
};
constexpr int STEP = sizeof(Step) / sizeof(Block);

struct Carry {  // what a block of channels carries along the sequence, by state and for all states
    std::vector<Block> A2, state, grad, dA;  // A log2(e); h at the start of the chunk, g at its end; a sum
    Block D, bias, dD, dbias;
};

constexpr int STREAMS = 7;  // tensors whose next tile is fetched while this one is computed

// What a thread needs.
struct Work {
    Rows rows, next_rows;           // of this chunk and of the one after it
    const char* ahead[STREAMS][T];  // addresses in the next tile
    int streams, pass;              // how many, and the present pass over the steps
    Step step[T];
    Block h[(T + 1) * NB], a[T * NB];  // states and decays, NB states at a time
    const float *B[T], *C[T];       // one number for all channels at each step
    Carry* own;                     // of the present block
    int folds;                      // passes over the states
    std::vector<Vector> folded;     // (T, folds): dB and dC of the states of a pass, lanes still to be added
    std::vector<Carry> blocks;      // of a unit
};

// Each pass over the steps of a tile fetches another tensor of the next tile.
inline const char* const* next_stream(Work& w) {
    const int pass = w.pass++;
    return pass < w.streams ? w.ahead[pass] : nullptr;
}

inline void fetch(const char* p) {
    for (size_t byte = 0; byte < sizeof(Block); byte += 64) __builtin_prefetch(p + byte);
}

// States n0 ... n0 + M - 1 through the chunk. KEEP: for `retreat` to use, y only if it is wanted.
template <int M, bool TIED, bool KEEP>
NF_NOINLINE void advance(Work& w, int n0, bool want_y) {
    const Block* A2 = &w.own->A2[n0];
    const int count = w.rows.count;
    V h[M][W];
    NF_UNROLL for (int i = 0; i < M; ++i)
        NF_UNROLL for (int j = 0; j < W; ++j) {
            h[i][j] = w.own->state[n0 + i].v[j];
            if (KEEP) w.h[i].v[j] = h[i][j];
        }
    const char* const* ahead = next_stream(w);
    for (int t = 0; t < count; ++t) {
        if (ahead) fetch(ahead[t]);
        Step& s = w.step[t];
        V y[W], power[W];
        NF_UNROLL for (int j = 0; j < W; ++j) {
            if (!KEEP || want_y) y[j] = s.y.v[j];
            if (TIED) power[j] = s.power.v[j];
        }
        NF_UNROLL for (int i = 0; i < M; ++i) {
            const V B = splat(w.B[t][n0 + i]), C = splat(w.C[t][n0 + i]);
            NF_UNROLL for (int j = 0; j < W; ++j) {
                V a, x = s.dtu.v[j] * B;
                if (TIED) {
                    a = power[j] = power[j] * s.e.v[j];
                } else {
                    a = exp2(s.dt.v[j] * A2[i].v[j]);
                    if (KEEP) w.a[t * NB + i].v[j] = a;
                }
                h[i][j] = a * h[i][j] + x;
                if (KEEP) w.h[(t + 1) * NB + i].v[j] = h[i][j];
                if (!KEEP || want_y) y[j] += h[i][j] * C;
            }
        }
        NF_UNROLL for (int j = 0; j < W; ++j) {
            if (!KEEP || want_y) s.y.v[j] = y[j];
            if (TIED && !KEEP) s.power.v[j] = power[j];
        }
    }
    if (!KEEP) {
        NF_UNROLL for (int i = 0; i < M; ++i)
            NF_UNROLL for (int j = 0; j < W; ++j) w.own->state[n0 + i].v[j] = h[i][j];
    }
}

// Their gradients, from the last step to the first.
template <int M, bool TIED>
NF_NOINLINE void retreat(Work& w, int n0, int fold_at) {
    const Block* A2 = &w.own->A2[n0];
    V g[M][W], dA[M][W];
    NF_UNROLL for (int j = 0; j < W; ++j)
        NF_UNROLL for (int i = 0; i < M; ++i) {
            g[i][j] = w.own->grad[n0 + i].v[j];
            if (!TIED) dA[i][j] = w.own->dA[n0 + i].v[j];
        }
    const char* const* ahead = next_stream(w);
    for (int t = w.rows.count - 1; t >= 0; --t) {
        if (ahead) fetch(ahead[t]);
        Step& s = w.step[t];
        V sum_B[W], sum_A[W], power[W], partial[2 * M];
        NF_UNROLL for (int j = 0; j < W; ++j) {
            sum_B[j] = s.sum_B.v[j], sum_A[j] = s.sum_A.v[j];
            if (TIED) power[j] = s.power.v[j];
        }
        NF_UNROLL for (int i = 0; i < M; ++i) {
            const V B = splat(w.B[t][n0 + i]), C = splat(w.C[t][n0 + i]);
            partial[i] = partial[M + i] = V{};
            NF_UNROLL for (int j = 0; j < W; ++j) {
                const V dt = s.dt.v[j], dy = s.dy.v[j], before = w.h[t * NB + i].v[j];
                V total = g[i][j] + dy * C;
                partial[i] += total * s.dtu.v[j];
                partial[M + i] += dy * w.h[(t + 1) * NB + i].v[j];
                sum_B[j] += total * B;
                V a = TIED ? power[j] *= s.e.v[j] : w.a[t * NB + i].v[j];
                V back = total * a;
                V da = back * before;
                if (TIED) {
                    sum_A[j] += da * (float)(n0 + i + 1);
                } else {
                    sum_A[j] += da * A2[i].v[j];
                    dA[i][j] += da * dt;
                }
                g[i][j] = back;
            }
        }
        w.folded[t * w.folds + fold_at].v += fold<2 * M>(partial);
        NF_UNROLL for (int j = 0; j < W; ++j) {
            s.sum_B.v[j] = sum_B[j], s.sum_A.v[j] = sum_A[j];
            if (TIED) s.power.v[j] = power[j];
        }
    }
    NF_UNROLL for (int j = 0; j < W; ++j) {
        NF_UNROLL for (int i = 0; i < M; ++i) {
            w.own->grad[n0 + i].v[j] = g[i][j];
            if (!TIED) w.own->dA[n0 + i].v[j] = dA[i][j];
        }
    }
}

// --------------------------------------------------------------------------------------- a block of channels

struct Place {  // one block of channels of one direction of one sample
    int64_t b, k, g, channel;
    int channels;
};

struct Plan {
    int64_t width, blocks, chunks;  // channels and blocks of a group, chunks of the sequence
    explicit Plan(const Problem& p)
        : width(p.channels / p.groups),
          blocks((width + BLOCK - 1) / BLOCK),
          chunks((p.length + T - 1) / T) {}
    Place place(int64_t b, int64_t k, int64_t g, int64_t block) const {
        return {b, k, g, g * width + block * BLOCK, (int)std::min<int64_t>(BLOCK, width - block * BLOCK)};
    }
};

inline int64_t offset(const View& x, const Place& at) { return at.b * x.b + at.k * x.k + at.channel * x.d; }

template <bool STORE>
void move_tile(const View& x, const Place& at, const Rows& rows, Block* tile) {
    if (x.dtype == BFLOAT16)
        move_rows<STORE, uint16_t>(x, offset(x, at), rows, at.channels, tile, STEP);
    else
        move_rows<STORE, float>(x, offset(x, at), rows, at.channels, tile, STEP);
}

// How far apart the entries of a weight are.
struct Weight {
    int64_t channel, state;
};

// out[n] has the channels of state n; missing channels are 0.
void load_weight(const float* from, Weight stride, int states, int channels, Block* out) {
    for (int n = 0; n < states; ++n) {
        float lanes[BLOCK] = {};
        for (int c = 0; c < channels; ++c) lanes[c] = from[c * stride.channel + n * stride.state];
        std::memcpy(&out[n], lanes, sizeof lanes);
    }
}

void store_weight(float* to, Weight stride, int states, int channels, const Block* in) {
    for (int n = 0; n < states; ++n) {
        float lanes[BLOCK];
        std::memcpy(lanes, &in[n], sizeof lanes);
        for (int c = 0; c < channels; ++c) to[c * stride.channel + n * stride.state] = lanes[c];
    }
}

// The rows of one chunk; none for a chunk before the first or after the last.
void visit(const Problem& p, int64_t b, int64_t k, int64_t chunk, Rows& rows) {
    const int64_t first = chunk * T;
    const bool backwards = p.reverse >> k & 1;
    const int64_t* order = p.order ? p.order + b * p.order_b + k * p.length : nullptr;
    rows.count = chunk < 0 ? 0 : (int)std::clamp<int64_t>(p.length - first, 0, T);
    rows.walk = order ? 0 : backwards ? -1 : 1;
    for (int t = 0; t < rows.count; ++t) {
        const int64_t step = backwards ? p.length - 1 - (first + t) : first + t;
        rows.at[t] = order ? order[step] : step;
    }
}

// On to the next chunk of the walk, `after` being the one that follows it.
void move_on(const Problem& p, int64_t b, int64_t k, int64_t g, int64_t after, Work& w) {
    w.rows = w.next_rows;
    visit(p, b, k, after, w.next_rows);
    const int64_t base = ((b * p.directions + k) * p.groups + g) * p.length;
    for (int t = 0; t < w.rows.count; ++t) {
        const int64_t row = base + w.rows.at[t];
        w.B[t] = p.B + row * p.states;
        w.C[t] = p.C + row * p.states;
    }
}

// Choose one more tile to be fetched. Only whole tiles, and only where channels or rows are side by side.
void look_ahead(const View& x, const Place& at, const Rows& rows, Work& w) {
    if (!x.data || rows.count < T || (x.d != 1 && !rows.walk)) return;
    const int64_t size = x.dtype == BFLOAT16 ? 2 : 4, low = std::min(rows.at[0], rows.at[T - 1]);
    const char *base = (const char*)x.data + offset(x, at) * size, **out = w.ahead[w.streams++];
    for (int t = 0; t < T; ++t)
        out[t] = x.d == 1 ? base + rows.at[t] * x.l * size
                          : base + (low + t % at.channels * x.d) * size + t / BLOCK * sizeof(Block) % (T * size);
}

// Start a walk: `own` gets the weights of one block, and zeros for what is summed.
void prepare(const Problem& p, const Place& at, Carry& own) {
    const int N = (int)p.states;
    const int64_t channel = at.k * p.channels + at.channel;
    for (std::vector<Block>* x : {&own.A2, &own.state, &own.grad, &own.dA}) x->assign(N, Block{});
    own.D = own.bias = own.dD = own.dbias = Block{};
    if (p.D) load_weight(p.D + channel, {1, 0}, 1, at.channels, &own.D);
    if (p.bias) load_weight(p.bias + channel, {1, 0}, 1, at.channels, &own.bias);
    const Weight rates = p.tied ? Weight{1, 0} : Weight{N, 1};
    load_weight(p.A + channel * rates.channel, rates, N, at.channels, own.A2.data());
    for (int n = 0; n < N; ++n)
        for (int j = 0; j < W; ++j)
            own.A2[n].v[j] = bounded(own.A2[n].v[j] * (p.tied ? n + 1.0f : 1.0f) * LOG2E, -1e19f, 1e19f);
}

// Step sizes of a chunk and what follows from them.
template <bool BACKWARD>
void load_steps(const Problem& p, const Place& at, Work& w) {
    const Carry& own = *w.own;
    move_tile<false>(p.u, at, w.rows, &w.step[0].u);
    move_tile<false>(p.delta, at, w.rows, &w.step[0].dt);
    for (int t = 0; t < w.rows.count; ++t) {
        Step& s = w.step[t];
        for (int j = 0; j < W; ++j) {
            V dt = s.dt.v[j] + own.bias.v[j];
            if (p.softplus) dt = softplus<BACKWARD>(dt, s.slope.v[j]);
            if (BACKWARD) s.size.v[j] = dt;
            s.dt.v[j] = bounded(dt, -1e18f, 1e18f);
            s.dtu.v[j] = dt * s.u.v[j];
            if (!BACKWARD || p.z.data) s.y.v[j] = V{};
            if (p.tied) {
                s.e.v[j] = exp2(s.dt.v[j] * own.A2[0].v[j]);
                s.power.v[j] = splat(1.0f);
            }
        }
    }
}

int64_t state_at(const Problem& p, const Place& at) {  // of a tensor (b, k, d, n)
    return ((at.b * p.directions + at.k) * p.channels + at.channel) * p.states;
}

float* kept_state(const Problem& p, const Plan& plan, const Place& at, int64_t chunk) {
    return p.kept + ((at.b * p.directions + at.k) * plan.chunks + chunk) * p.states * p.channels + at.channel;
}

template <bool TIED>
void forward_unit(const Problem& p, const Plan& plan, Work& w, int64_t unit) {
    const int N = (int)p.states;
    const int64_t block = unit % plan.blocks, g = unit / plan.blocks % p.groups;
    const int64_t k = unit / plan.blocks / p.groups % p.directions;
    const int64_t b = unit / plan.blocks / p.groups / p.directions;
    const Place at = plan.place(b, k, g, block);
    w.own = &w.blocks[0];
    prepare(p, at, *w.own);
    if (p.initial) load_weight(p.initial + state_at(p, at), {N, 1}, N, at.channels, w.own->state.data());
    visit(p, b, k, 0, w.next_rows);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        move_on(p, b, k, g, chunk + 1, w);
        w.streams = w.pass = 0;
        for (const View* x : {&p.u, &p.delta, &p.z}) look_ahead(*x, at, w.next_rows, w);
        look_ahead(p.y, at, w.rows, w);
        if (p.kept) store_weight(kept_state(p, plan, at, chunk), {1, p.channels}, N, at.channels, w.own->state.data());
        load_steps<false>(p, at, w);
        if (p.z.data) move_tile<false>(p.z, at, w.rows, &w.step[0].z);
        int n = 0;
        for (; n + NB <= N; n += NB) advance<NB, TIED, false>(w, n, true);
        for (; n < N; ++n) advance<1, TIED, false>(w, n, true);
        for (int t = 0; t < w.rows.count; ++t) {
            Step& s = w.step[t];
            for (int j = 0; j < W; ++j) {
                if (p.D) s.y.v[j] += w.own->D.v[j] * s.u.v[j];
                if (p.z.data) s.y.v[j] *= s.z.v[j] * sigmoid(s.z.v[j]);
            }
        }
        move_tile<true>(p.y, at, w.rows, &w.step[0].y);
    }
    store_weight(p.last + state_at(p, at), {N, 1}, N, at.channels, w.own->state.data());
}

// The gradients of one chunk of one block; those with respect to B and C are added to w.folded.
template <bool TIED>
void backward_chunk(const Problem& p, Work& w, const Place& at) {
    const int N = (int)p.states;
    Carry& own = *w.own;
    load_steps<true>(p, at, w);
    move_tile<false>(p.grad_y, at, w.rows, p.z.data ? &w.step[0].raw_dy : &w.step[0].dy);
    if (p.z.data) move_tile<false>(p.z, at, w.rows, &w.step[0].z);
    for (int t = 0; t < w.rows.count; ++t) {
        Step& s = w.step[t];
        s.sum_B = s.sum_A = Block{};
        for (int j = 0; p.z.data && j < W; ++j) s.dy.v[j] = s.raw_dy.v[j] * s.z.v[j] * sigmoid(s.z.v[j]);
    }
    int n = 0, pass = 0;
    for (; n + NB <= N; n += NB, ++pass) {
        advance<NB, TIED, true>(w, n, p.z.data != nullptr);
        retreat<NB, TIED>(w, n, pass);
    }
    for (; n < N; ++n, ++pass) {
        advance<1, TIED, true>(w, n, p.z.data != nullptr);
        retreat<1, TIED>(w, n, pass);
    }

    for (int t = 0; t < w.rows.count; ++t) {
        Step& s = w.step[t];
        for (int j = 0; j < W; ++j) {
            const V u = s.u.v[j], dy = s.dy.v[j];
            if (p.z.data) {
                V gate = sigmoid(s.z.v[j]), y = s.y.v[j];
                if (p.D) y += own.D.v[j] * u;
                s.z.v[j] = s.raw_dy.v[j] * y * gate * (1.0f + s.z.v[j] * (1.0f - gate));
            }
            if (p.tied) own.dA[0].v[j] += s.dt.v[j] * s.sum_A.v[j];
            V ddelta = s.sum_A.v[j] * (p.tied ? own.A2[0].v[j] * LN2 : splat(LN2));
            ddelta += u * s.sum_B.v[j];
            if (p.softplus) ddelta *= s.slope.v[j];
            s.sum_A.v[j] = ddelta;
            own.dbias.v[j] += ddelta;
            s.sum_B.v[j] *= s.size.v[j];
            if (p.D) {
                s.sum_B.v[j] += dy * own.D.v[j];
                own.dD.v[j] += dy * u;
            }
        }
    }
    move_tile<true>(p.ddelta, at, w.rows, &w.step[0].sum_A);
    if (p.z.data) move_tile<true>(p.dz, at, w.rows, &w.step[0].z);
    if (p.shared && at.k > 0) {
        move_tile<false>(p.du, at, w.rows, &w.step[0].u);
        for (int t = 0; t < w.rows.count; ++t)
            for (int j = 0; j < W; ++j) w.step[t].sum_B.v[j] += w.step[t].u.v[j];
    }
    move_tile<true>(p.du, at, w.rows, &w.step[0].sum_B);
}

// Add the lanes of w.folded; write rows of dB and dC, or add to them.
void unfold(const Problem& p, const Work& w, bool add, float* dB, float* dC) {
    const int N = (int)p.states;
    for (int t = 0; t < w.rows.count; ++t) {
        const int64_t row = w.rows.at[t] * N;
        int n = 0;
        for (int pass = 0; pass < w.folds; ++pass) {
            const int M = n + NB <= N ? NB : 1;
            float lanes[LANES];
            std::memcpy(lanes, &w.folded[t * w.folds + pass], sizeof lanes);
            for (int half = LANES / 2; half >= 2 * M; half /= 2)
                for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
            for (int i = 0; i < M; ++i) {
                dB[row + n + i] = (add ? dB[row + n + i] : 0.0f) + lanes[i];
                dC[row + n + i] = (add ? dC[row + n + i] : 0.0f) + lanes[M + i];
            }
            n += M;
        }
    }
}

// Blocks first ... last - 1 of a group in one direction, chunk by chunk; dB and dC (l, n) are their share.
template <bool TIED>
void backward_blocks(const Problem& p, const Plan& plan, Work& w, const Place& group, int64_t first,
                     int64_t last, float* dB, float* dC) {
    const int N = (int)p.states;
    const int64_t b = group.b, k = group.k, g = group.g;
    for (int64_t block = first; block < last; ++block) {
        const Place at = plan.place(b, k, g, block);
        prepare(p, at, w.blocks[block - first]);
        Block* grad = w.blocks[block - first].grad.data();
        if (p.grad_last) load_weight(p.grad_last + state_at(p, at), {N, 1}, N, at.channels, grad);
    }
    visit(p, b, k, plan.chunks - 1, w.next_rows);
    for (int64_t chunk = plan.chunks - 1; chunk >= 0; --chunk) {
        move_on(p, b, k, g, chunk - 1, w);
        for (int64_t block = first; block < last; ++block) {
            const Place at = plan.place(b, k, g, block);
            w.own = &w.blocks[block - first];
            w.streams = w.pass = 0;
            const bool more = block + 1 < last;
            const Place next = plan.place(b, k, g, more ? block + 1 : first);
            for (const View* x : {&p.u, &p.delta, &p.grad_y, &p.z})
                look_ahead(*x, next, more ? w.rows : w.next_rows, w);
            for (const View* x : {&p.du, &p.ddelta, &p.dz}) look_ahead(*x, at, w.rows, w);
            load_weight(kept_state(p, plan, at, chunk), {1, p.channels}, N, at.channels, w.own->state.data());
            if (block % PART == 0) std::fill(w.folded.begin(), w.folded.end(), Vector{});
            backward_chunk<TIED>(p, w, at);
            if (block % PART == PART - 1 || !more) unfold(p, w, block >= first + PART, dB, dC);
        }
    }
    for (int64_t block = first; block < last; ++block) {
        const Place at = plan.place(b, k, g, block);
        const int64_t channel = (b * p.directions + k) * p.channels + at.channel;
        const Carry& own = w.blocks[block - first];
        const Weight rates = p.tied ? Weight{1, 0} : Weight{N, 1};
        store_weight(p.dA + channel * rates.channel, rates, p.tied ? 1 : N, at.channels, own.dA.data());
        if (p.dinitial) store_weight(p.dinitial + state_at(p, at), {N, 1}, N, at.channels, own.grad.data());
        if (p.D) store_weight(p.dD + channel, {1, 0}, 1, at.channels, &own.dD);
        if (p.bias) store_weight(p.dbias + channel, {1, 0}, 1, at.channels, &own.dbias);
    }
}

// --------------------------------------------------------------------------------------------------- threads

// Denormal numbers cost up to a hundred cycles each: a decaying state would meet them.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// run(work, unit) for every unit, on `workers.size()` threads, this one included.
template <class F>
void parallel(std::vector<std::unique_ptr<Work>>& workers, int64_t units, F run) {
    std::atomic<int64_t> next{0};
    auto loop = [&](Work& work) {
        FlushDenormals guard;
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) run(work, unit);
    };
    std::vector<std::thread> threads;
    threads.reserve(workers.size());
    for (size_t i = 1; i < workers.size() && (int64_t)i < units; ++i) {
        try {
            threads.emplace_back(loop, std::ref(*workers[i]));
        } catch (const std::exception&) {
            break;  // no memory for another thread, or too many: those that run do the work
        }
    }
    loop(*workers[0]);
    for (std::thread& thread : threads) thread.join();
}

std::vector<std::unique_ptr<Work>> hire(const Problem& p, int64_t units, int64_t blocks) {
    const int64_t states = p.batch * p.directions * p.length * p.channels * p.states;
    const int64_t count = std::max<int64_t>(1, std::min({p.threads, units, 1 + states / STATES_PER_THREAD}));
    std::vector<std::unique_ptr<Work>> workers;
    for (int64_t i = 0; i < count; ++i) {
        workers.emplace_back(new Work());
        Work& w = *workers.back();
        w.folds = (int)(p.states / NB + p.states % NB);
        w.folded.resize(T * w.folds);
        w.blocks.resize(blocks);
    }
    return workers;
}

template <bool TIED>
void run_forward(const Problem& p) {
    const Plan plan(p);
    const int64_t units = p.batch * p.directions * p.groups * plan.blocks;
    auto workers = hire(p, units, 1);
    parallel(workers, units, [&](Work& w, int64_t unit) { forward_unit<TIED>(p, plan, w, unit); });
}

template <bool TIED>
void run_backward(const Problem& p) {
    const Plan plan(p);
    // Directions that share u stay in one unit, which adds up du.
    const int64_t inside = p.shared ? p.directions : 1, outside = p.directions / inside;
    const int64_t blocks = p.pieces == 1 ? plan.blocks : PART;  // of a unit
    const int64_t units = p.batch * outside * p.groups * p.pieces;
    auto workers = hire(p, units, blocks);
    parallel(workers, units, [&](Work& w, int64_t unit) {
        const int64_t piece = unit % p.pieces, g = unit / p.pieces % p.groups;
        const int64_t b = unit / p.pieces / p.groups / outside;
        const int64_t first = piece * blocks, last = std::min(first + blocks, plan.blocks);
        for (int64_t i = 0; i < inside; ++i) {
            const int64_t k = unit / p.pieces / p.groups % outside * inside + i;
            const int64_t group = ((piece * p.batch + b) * p.directions + k) * p.groups + g;
            const int64_t rows = group * p.length * p.states;
            backward_blocks<TIED>(p, plan, w, plan.place(b, k, g, 0), first, last, p.dB + rows, p.dC + rows);
        }
    });
}

// A unit takes all parts of a group, or a single one where threads would be idle otherwise: pieces of dB, dC.
int64_t pieces(const Problem& p) {
    const int64_t groups = p.batch * (p.shared ? 1 : p.directions) * p.groups;
    return p.threads == 1 || groups >= 2 * p.threads ? 1 : (Plan(p).blocks + PART - 1) / PART;
}

int64_t guarded(void run(const Problem&), const Problem& p) {  // 1: no memory
    try {
        run(p);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

#define NF_EXPORT extern "C" __attribute__((visibility("default")))
NF_EXPORT int64_t nf_pieces(const Problem* p) { return pieces(*p); }
NF_EXPORT int64_t nf_forward(const Problem* p) {
    return guarded(p->tied ? run_forward<true> : run_forward<false>, *p);
}
NF_EXPORT int64_t nf_backward(const Problem* p) {
    return guarded(p->tied ? run_backward<true> : run_backward<false>, *p);
}
