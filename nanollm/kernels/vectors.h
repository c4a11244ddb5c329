// Numbers, vectors of sixteen of them, and products of rows with a panel of 32 outputs: what our C++ files share.
//
// A panel holds 32 outputs of a matrix: [input / 2][32][2] for bfloat16 and int8, [input][32] for float32, groups of 32
// inputs for int4. Sums are float32, and the order of each depends on nothing but its own row and output.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};
struct int4 {  // of one input of two outputs, number j and j + 16: lower and upper bits, 0 to 15 for -8 to 7
    uint8_t both;
};

using f32x16 = float __attribute__((vector_size(64), aligned(4), may_alias));
using u32x16 = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
using i32x16 = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
using u16x16 = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int PANEL = 32;  // outputs of a panel: two vectors
constexpr int SHARE = 32;  // inputs whose int4 share a scale, one of each output, float16
struct Group {
    int4 numbers[SHARE * PANEL / 2];
    uint16_t scales[PANEL];
};
#ifdef __AVX512F__
constexpr int TALL = 12;  // rows of a tile, as many as the registers hold
#else
constexpr int TALL = 3;
#endif

// --- numbers ---

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void narrow(float x, float& y) { y = x; }
inline uint32_t rounded(float x) {  // the upper half, to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline void narrow(float x, bf16& y) { y.bits = uint16_t(rounded(x)); }
inline f32x16 load(const float* p) { return *(const f32x16*)p; }
inline f32x16 load(const bf16* p) { return (f32x16)(__builtin_convertvector(*(const u16x16*)p, u32x16) << 16); }

inline f32x16 load_f16(const uint16_t* p) {  // exact, subnormal ones too
    u32x16 bits = __builtin_convertvector(*(const u16x16*)p, u32x16);
    return (f32x16)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
}

inline float sum(f32x16 x) {
    float parts[16];
    std::memcpy(parts, &x, 64);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

// 2^n times a polynomial of the rest (the coefficients of Cephes' expf); relative error 2e-7.
inline f32x16 exp(f32x16 x) {
    x = x < -87.0f ? f32x16{} - 87.0f : x;
    x = x > 88.0f ? f32x16{} + 88.0f : x;
    f32x16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 y = f32x16{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = y * r + c;
    y = y * r * r + r + 1.0f;
    return y * (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
}

// Every work item is a range of a loop; thread t of n takes the t-th part.
struct Range {
    int begin, end;
};
inline Range part(int count, int t, int n) { return {int(int64_t(count) * t / n), int(int64_t(count) * (t + 1) / n)}; }

// --- matrix products ---

template <int M> inline void tile(const float* a, int64_t stride, const float* panel, int inputs, float* out) {
    f32x16 acc[M][2] = {};
    for (int k = 0; k < inputs; k++, panel += PANEL) {
        f32x16 low = load(panel), high = load(panel + 16);
        for (int m = 0; m < M; m++) {
            acc[m][0] += a[m * stride + k] * low;
            acc[m][1] += a[m * stride + k] * high;
        }
    }
    std::memcpy(out, acc, sizeof acc);
}

// Two inputs of 16 outputs, as pairs of bfloat16; int8 fits in it exactly.
inline u32x16 pairs(const bf16* p) { return *(const u32x16*)p; }
inline u32x16 pairs(const int8_t* p) {
#ifdef __AVX512BF16__
    auto floats = [](const int8_t* q) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
    };
    return (u32x16)_mm512_cvtne2ps_pbh(floats(p + 16), floats(p));
#else
    i32x16 both = __builtin_convertvector(*(const u16x16*)p, i32x16);
    f32x16 first = __builtin_convertvector((both << 24) >> 24, f32x16),
           second = __builtin_convertvector((both << 16) >> 24, f32x16);
    return ((u32x16)first >> 16) | ((u32x16)second & 0xffff0000u);
#endif
}

// Two inputs of all outputs, and how many W they are.
template <class W> inline void pairs(const W* p, u32x16& low, u32x16& high) { low = pairs(p), high = pairs(p + PANEL); }
inline void pairs(const int4* p, u32x16& low, u32x16& high) {
#ifdef __AVX512BF16__
    // -8 to 7 in bfloat16, twice: the fifth bit of an index is a bit of another number.
    const __m512i table = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(short(0xc100), short(0xc0e0), short(0xc0c0), short(0xc0a0), short(0xc080), short(0xc040),
                          short(0xc000), short(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
    __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    low = (u32x16)_mm512_permutexvar_epi16(bytes, table);
    high = (u32x16)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
#else
    auto widened = [](i32x16 two) {
        f32x16 first = __builtin_convertvector((two & 15) - 8, f32x16),
               second = __builtin_convertvector((two >> 8 & 15) - 8, f32x16);
        return ((u32x16)first >> 16) | ((u32x16)second & 0xffff0000u);
    };
    i32x16 bytes = __builtin_convertvector(*(const u16x16*)p, i32x16);
    low = widened(bytes), high = widened(bytes >> 4);
#endif
}
template <class W> constexpr int PAIRS = 2 * PANEL;
template <> constexpr int PAIRS<int4> = PANEL;

// Row m's inputs k and k + 1 lie at a + m * stride + k / 2 * step.
template <int M, class W>
inline void tile(const bf16* a, int64_t stride, const W* panel, int inputs, float* out, int64_t step = 2) {
    f32x16 acc[M][2] = {};
    for (int k = 0; k < inputs; k += 2, panel += PAIRS<W>, a += step) {
        u32x16 low, high;
        pairs(panel, low, high);
        for (int m = 0; m < M; m++) {
            uint32_t pair;
            std::memcpy(&pair, a + m * stride, 4);
            u32x16 both = u32x16{} + pair;
#ifdef __AVX512BF16__
            acc[m][0] = (f32x16)_mm512_dpbf16_ps((__m512)acc[m][0], (__m512bh)both, (__m512bh)low);
            acc[m][1] = (f32x16)_mm512_dpbf16_ps((__m512)acc[m][1], (__m512bh)both, (__m512bh)high);
#else
            f32x16 first = (f32x16)(both << 16), second = (f32x16)(both & 0xffff0000u);
            acc[m][0] += first * (f32x16)(low << 16) + second * (f32x16)(low & 0xffff0000u);
            acc[m][1] += first * (f32x16)(high << 16) + second * (f32x16)(high & 0xffff0000u);
#endif
        }
    }
    std::memcpy(out, acc, sizeof acc);
}

// out (rows, 32) = a (rows, inputs) times one panel, in tiles of M rows, then of fewer.
template <class T, class W, int M = TALL>
void tiles(const T* a, int64_t stride, int rows, const W* panel, int inputs, float* out) {
    int row = 0;
    for (; row + M <= rows; row += M) tile<M>(a + row * stride, stride, panel, inputs, out + row * PANEL);
    if constexpr (M > 1)
        if (row < rows) tiles<T, W, M - 1>(a + row * stride, stride, rows - row, panel, inputs, out + row * PANEL);
}

// Where input k of output `lane` lies in a panel.
template <class T> inline int64_t place(int k, int lane) {
    return sizeof(T) == 2 ? int64_t(k / 2) * 2 * PANEL + lane * 2 + k % 2 : int64_t(k) * PANEL + lane;
}

// Inputs k and k + 1, k even, of the output whose place for k is `to`.
inline void put(float a, float b, float* to) { to[0] = a, to[PANEL] = b; }
inline void put(float a, float b, bf16* to) {
    uint32_t both = rounded(a) | rounded(b) << 16;
    std::memcpy(to, &both, 4);
}

// In place: exp(scale * (x - greatest)) of `count` numbers; returns 1 / sum. There is room up to the next multiple of 16.
inline float soften(float* x, int count, float scale, float* greatest_of = nullptr) {
    int whole = count / 16 * 16;
    f32x16 most = f32x16{} - INFINITY, total = {};
    for (int i = 0; i < whole; i += 16) most = load(x + i) > most ? load(x + i) : most;
    float greatest = -INFINITY;
    for (int j = 0; j < 16; j++) greatest = std::max(greatest, most[j]);
    for (int i = whole; i < count; i++) greatest = std::max(greatest, x[i]);
    if (greatest_of) *greatest_of = greatest;
    for (int i = 0; i < whole; i += 16) {
        f32x16 y = exp((load(x + i) - greatest) * scale);
        *(f32x16*)(x + i) = y;
        total += y;
    }
    if (whole < count) {
        f32x16 y = exp((load(x + whole) - greatest) * scale);
        for (int j = count - whole; j < 16; j++) y[j] = 0;
        *(f32x16*)(x + whole) = y;
        total += y;
    }
    return 1.0f / sum(total);
}

}  // namespace
