// Sixteen float32 at a time, for the kernels in C++: whatever the processor, a register is an array of sixteen numbers.

#ifndef JAXSTACK_KERNELS_SIMD_H_
#define JAXSTACK_KERNELS_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// The compiler maps them to one AVX-512 register, two of AVX2 or four of SSE or NEON.
using Vec = float __attribute__((vector_size(64)));
using Int = int32_t __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

inline Vec Load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
struct Bf16 { uint16_t bits; };
using Halves = uint16_t __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(64)));

inline Vec Load(const Bf16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vec v;
  std::memcpy(&v, &words, sizeof v);
  return v;
}
// To the nearest, ties to even; a NaN stays one.
inline void Store(Bf16* p, Vec v) {
  Words words;
  std::memcpy(&words, &v, sizeof words);
  words = (words & 0x7FFFFFFF) > 0x7F800000 ? words | 0x400000 : words + 0x7FFF + ((words >> 16) & 1);
  const Halves halves = __builtin_convertvector(words >> 16, Halves);
  std::memcpy(p, &halves, sizeof halves);
}
inline Vec Splat(float a) { return a - Vec{}; }
inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// All lanes of a vector by halves, down to four, which `join` takes as scalars: a fixed order.
template <typename Join>
inline float Reduce(Vec v, Join join) {
  using Half = float __attribute__((vector_size(32)));
  using Quarter = float __attribute__((vector_size(16)));
  Half h[2];
  std::memcpy(h, &v, sizeof h);
  h[0] = join(h[0], h[1]);
  Quarter q[2];
  std::memcpy(q, h, sizeof q);
  q[0] = join(q[0], q[1]);
  return join(join(q[0][0], q[0][1]), join(q[0][2], q[0][3]));
}
inline float Highest(Vec v) {
  return Reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline float Sum(Vec v) {
  return Reduce(v, [](auto a, auto b) { return a + b; });
}

// e^x for x <= 0, within 2 units in the last place; below -87 the result is 0. Cody-Waite reduction and a polynomial.
inline Vec Exp(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666668e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vec{} : p * power;
}

// tanh within a few units in the last place: the series where 1 - e^-2|x| would cancel, else by e^-2|x|.
inline Vec Tanh(Vec x) {
  const Vec size = x < 0.0f ? -x : x, square = x * x;
  Vec p = square * 2.1869488e-2f - 5.3968254e-2f;
  p = p * square + 1.3333334e-1f;
  p = p * square - 3.3333334e-1f;
  const Vec small = size + size * square * p;
  const Vec e = Exp(size * -2.0f);
  const Vec result = size < 0.25f ? small : (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -result : result;
}

// to[i * stride + t] = rows[t][d + i] for 16 rows and 16 columns.
template <typename Element>
inline void Turn(const Element* const* rows, int64_t d, float* to, int64_t stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = reinterpret_cast<__m512>(Load(rows[i] + d));
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  // Pairs of pairs: a[4g + j] holds, in each 128-bit lane l, column 4l + j of rows 4g .. 4g + 3.
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // Gather the same lane of the four groups of tokens.
  for (int j = 0; j < 4; ++j) {
    const __m512 low02 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), low13 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xDD);
    const __m512 high02 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xDD);
    _mm512_storeu_ps(to + j * stride, _mm512_shuffle_f32x4(low02, high02, 0x88));
    _mm512_storeu_ps(to + (4 + j) * stride, _mm512_shuffle_f32x4(low13, high13, 0x88));
    _mm512_storeu_ps(to + (8 + j) * stride, _mm512_shuffle_f32x4(low02, high02, 0xDD));
    _mm512_storeu_ps(to + (12 + j) * stride, _mm512_shuffle_f32x4(low13, high13, 0xDD));
  }
#else
  for (int64_t t = 0; t < kLanes; ++t) {
    const Vec row = Load(rows[t] + d);
    for (int64_t i = 0; i < kLanes; ++i) to[i * stride + t] = row[i];
  }
#endif
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

#endif  // JAXSTACK_KERNELS_SIMD_H_
