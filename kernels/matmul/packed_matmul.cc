// out[M, N] = x[M, K] @ w (+ bias), summed in float32, with w stored in panels of 64 columns: kernels.matmul on packed
// weights, on CPU. x and w are float32 or bfloat16, both the same; out is either.
//
// Everything moves in words of 32 bits: one float32, or the two bfloat16 of neighbouring k, which is what AVX512-BF16's
// dot product takes. A panel is [words of K, 64] words either way, and only the innermost instruction knows the type.
//
// Decoding multiplies a few rows by weights that come from DRAM every time, so two things decide the speed: the weights
// must arrive as one sequential stream that does not wait for the arithmetic, and the FMA ports must be kept busy.
//   * A panel (64 columns, all of K) is contiguous. While block k of a panel is multiplied, block k+1 is prefetched to
//     L2, the prefetches spread evenly over the row tiles, so DRAM streams during the arithmetic and not between it.
//   * The register tile is up to 6 rows x 64 columns (AVX-512): 24 accumulators, 4 registers of weights, 1 broadcast of
//     x. Wide and low beats the usual 14 x 32: 10 loads for 24 FMAs, not 16 for 28, and on loads the FMA ports wait.
//   * Threads (XLA's own pool and the calling thread) claim panels from an atomic counter, so a core that is busy with
//     something else delays one panel, not half of the product.
// The value of out[m, n] is a function of x[m, :] and w[:, n] alone: within each block of kBlock words of k a chain of
// FMAs in order of k, and the blocks summed in order. Neither the number of rows, nor the row's place among them, nor
// the threads change a bit of it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Vector = ffi::Buffer<ffi::F32, 1>;
using Integer = ffi::BufferR0<ffi::S32>;

// ---- One SIMD register, of float32 or of words, by instruction set. ----
#if defined(__AVX512F__)
using Vec = __m512;
using Words = __m512i;
constexpr int kMaxRows = 6, kVecs = 4;
inline Vec Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Words Load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Words Broadcast(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
inline Vec AsFloats(Words w) { return _mm512_castsi512_ps(w); }
inline Vec LowHalves(Words w) { return AsFloats(_mm512_slli_epi32(w, 16)); }
inline Vec HighHalves(Words w) { return AsFloats(_mm512_and_si512(w, _mm512_set1_epi32(-65536))); }
inline Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vec = __m256;
using Words = __m256i;
constexpr int kMaxRows = 6, kVecs = 2;
inline Vec Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Words Load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Words Broadcast(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
inline Vec AsFloats(Words w) { return _mm256_castsi256_ps(w); }
inline Vec LowHalves(Words w) { return AsFloats(_mm256_slli_epi32(w, 16)); }
inline Vec HighHalves(Words w) { return AsFloats(_mm256_and_si256(w, _mm256_set1_epi32(-65536))); }
inline Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#else  // GCC vector extensions: NEON, SSE, anything; -ffp-contract=fast makes the FMA where the machine has one.
using Vec = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
constexpr int kMaxRows = 6, kVecs = 2;
inline Vec Load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Words Load(const uint32_t* p) { Words w; std::memcpy(&w, p, sizeof w); return w; }
inline Words Broadcast(uint32_t a) { return Words{a, a, a, a}; }
inline Vec AsFloats(Words w) { Vec v; std::memcpy(&v, &w, sizeof v); return v; }
inline Vec LowHalves(Words w) { return AsFloats(w << 16); }
inline Vec HighHalves(Words w) { return AsFloats(w & 0xFFFF0000u); }
inline Vec Add(Vec a, Vec b) { return a + b; }
inline Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

// ---- What a word holds, and how a register of them is multiplied and added: in kParts turns. ----
struct Float32 {
  static constexpr int64_t kPerWord = 1, kParts = 1;
  using Operand = Vec;
  template <int> static Operand Part(Words w) { return AsFloats(w); }
  static Vec MultiplyAdd(Operand x, Operand w, Vec sum) { return Fma(x, w, sum); }
};

struct BFloat16 {
  static constexpr int64_t kPerWord = 2;
#if defined(__AVX512F__) && defined(__AVX512BF16__)
  static constexpr int64_t kParts = 1;
  using Operand = __m512bh;
  template <int> static Operand Part(Words w) { return (__m512bh)w; }
  static Vec MultiplyAdd(Operand x, Operand w, Vec sum) { return _mm512_dpbf16_ps(sum, x, w); }
#else  // A bfloat16 is the upper half of the float32 of the same value.
  static constexpr int64_t kParts = 2;
  using Operand = Vec;
  template <int kPart> static Operand Part(Words w) { return kPart ? HighHalves(w) : LowHalves(w); }
  static Vec MultiplyAdd(Operand x, Operand w, Vec sum) { return Fma(x, w, sum); }
#endif
};

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int64_t kColumns = 64;  // columns of a panel (packed.PANEL_COLUMNS)
constexpr int kLanes = static_cast<int>(sizeof(Vec) / sizeof(float));
constexpr int64_t kBlock = 128;  // words of k summed in registers: 32 KiB of panel, which stays near for all row tiles
constexpr int64_t kUnroll = 4;  // words of k between two looks at the prefetch cursor
constexpr int64_t kChunkBytes = 5 << 18;  // rows of x worked on at once: they stay in L2 while panels pass by
constexpr int64_t kSerialBytes = 1 << 16;  // weights of less than this are not worth waking another thread

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t RoundToBFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

#if defined(__AVX512F__)
inline void RoundToBFloat16(__m512 values, uint16_t* to) {  // the same, sixteen at once
  const __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#endif

// A cursor over memory that will be needed soon: the micro-kernel touches `lines` cache lines of it per kUnroll steps.
struct Prefetch {
  const char* next;
  int64_t lines;
};

// c[kRows, kVecs * kLanes] (+)= a[kRows, depth] @ b[depth, the same columns of a panel], depth in words. Rows of `a` are
// kBlock apart: a constant, so every operand is one base register plus a displacement.
template <typename Kind, int kRows>
void Tile(const uint32_t* a, const uint32_t* b, int64_t depth, float* c, int64_t c_stride, bool accumulate,
          Prefetch& ahead) {
  Vec sum[kRows][kVecs] = {};
  auto part = [&](int64_t k, auto which) __attribute__((always_inline)) {
    typename Kind::Operand w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) w[v] = Kind::template Part<decltype(which)::value>(Load(b + k * kColumns + v * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Kind::Operand x = Kind::template Part<decltype(which)::value>(Broadcast(a[r * kBlock + k]));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = Kind::MultiplyAdd(x, w[v], sum[r][v]);
    }
  };
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    part(k, std::integral_constant<int, 0>());
    if constexpr (Kind::kParts == 2) part(k, std::integral_constant<int, 1>());
  };
  // The tile's result is needed only at the end, all of it at once, and may be cold: ask for it now.
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) __builtin_prefetch(c + r * c_stride + v * kLanes, 1, 3);
  }
  int64_t k = 0;
  const char* soon = ahead.next;
  for (; k + kUnroll <= depth; k += kUnroll) {
    for (int64_t line = 0; line < ahead.lines; ++line, soon += 64) __builtin_prefetch(soon, 0, 2);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(k + u);
  }
  ahead.next = soon;
  for (; k < depth; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* at = c + r * c_stride + v * kLanes;
      Store(at, accumulate ? Add(Load(at), sum[r][v]) : sum[r][v]);
    }
  }
}

using TileFn = void (*)(const uint32_t*, const uint32_t*, int64_t, float*, int64_t, bool, Prefetch&);

template <typename Kind, int... kRows>
TileFn TileFor(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr TileFn table[] = {Tile<Kind, kRows + 1>...};
  return table[rows - 1];
}

// ---- One product, shared by all threads that work on it. Depth is in words, except where it is said to be in k. ----
struct Product {
  TileFn (*tile)(int64_t rows);
  const char* x;           // [rows, depth_k]
  const uint32_t* panels;  // [n_panels, depth, kColumns] of the wanted layer
  const float* bias;       // [columns] or null
  void* out;               // [rows, columns]
  bool out_is_bfloat16;
  const uint32_t* source;  // [n_blocks, rows, kBlock]: x cut along depth; x itself where that is the same
  uint32_t* blocked;       // where it is cut; null where `source` is x
  int64_t rows, row_bytes, depth, columns, n_panels, n_blocks, n_chunks, chunk_rows, n_units;
  std::atomic<int64_t> next_block{0}, blocks_done{0}, next_unit{0}, units_done{0};

  // Called by every thread. A thread only ever waits for work that a running thread has claimed, never for a thread
  // that has yet to start, so products side by side on a full pool, or on a pool of one, cannot wait for each other.
  void Work() {
    if (blocked != nullptr) {
      for (int64_t block; (block = next_block.fetch_add(1)) < n_blocks; blocks_done.fetch_add(1)) CutBlock(block);
      WaitFor(blocks_done, n_blocks);
    }
    int64_t unit = next_unit.fetch_add(1);
    while (unit < n_units) {
      unit = Multiply(unit);
      units_done.fetch_add(1);
    }
  }

  void WaitForAll() { WaitFor(units_done, n_units); }

 private:
  static void WaitFor(const std::atomic<int64_t>& count, int64_t target) {
    for (int spins = 0; count.load(std::memory_order_acquire) < target; ++spins) {
      if (spins < 4096) Pause(); else std::this_thread::yield();
    }
  }

  void CutBlock(int64_t block) {
    const int64_t begin = block * kBlock, words = std::min(kBlock, depth - begin);
    const int64_t bytes = std::min<int64_t>(words * sizeof(uint32_t), row_bytes - begin * sizeof(uint32_t));
    uint32_t* to = blocked + block * rows * kBlock;
    for (int64_t row = 0; row < rows; ++row, to += kBlock) {
      to[words - 1] = 0;  // an odd number of bfloat16 leaves half of the last word
      std::memcpy(to, x + row * row_bytes + begin * sizeof(uint32_t), bytes);
    }
  }

  // Computes one unit (a chunk of rows x a panel) and claims the next, in time to prefetch its first weights.
  int64_t Multiply(int64_t unit) {
    const int64_t first_row = unit / n_panels * chunk_rows, panel = unit % n_panels;
    const int64_t chunk = std::min(chunk_rows, rows - first_row);
    const int64_t n_tiles = CeilDiv(chunk, kMaxRows);
    const int64_t valid = std::min(kColumns, columns - panel * kColumns);
    const uint32_t* weights = panels + panel * depth * kColumns;
    // Summed in place if the result is float32, no less wide than the panel and without a bias; else aside.
    const bool in_place = !out_is_bfloat16 && bias == nullptr && valid == kColumns;
    static thread_local std::vector<float> aside;
    if (!in_place && static_cast<int64_t>(aside.size()) < chunk * kColumns) aside.resize(chunk * kColumns);
    float* result = in_place ? static_cast<float*>(out) + first_row * columns + panel * kColumns : aside.data();
    const int64_t result_stride = in_place ? columns : kColumns;
    const int64_t lines = CeilDiv(kUnroll * kVecs * kLanes * sizeof(float) / 64, n_tiles);
    int64_t next = 0;
    for (int64_t block = 0; block < n_blocks; ++block) {
      const int64_t begin = block * kBlock, length = std::min(kBlock, depth - begin);
      const uint32_t* soon = weights + (begin + kBlock) * kColumns;
      if (block + 1 == n_blocks) {
        next = next_unit.fetch_add(1);
        soon = panels + next % n_panels * depth * kColumns;
      }
      Prefetch ahead{reinterpret_cast<const char*>(soon), next < n_units ? lines : 0};
      // Tiles of nearly equal height: 14 rows are 4 + 5 + 5, not 6 + 6 + 2.
      for (int64_t i = 0; i < n_tiles; ++i) {
        const int64_t row = i * chunk / n_tiles, end = (i + 1) * chunk / n_tiles;
        const uint32_t* a = source + (block * rows + first_row + row) * kBlock;
        const TileFn multiply = tile(end - row);
        for (int64_t column = 0; column < kColumns; column += kVecs * kLanes) {
          multiply(a, weights + begin * kColumns + column, length, result + row * result_stride + column, result_stride,
                   block > 0, ahead);
        }
      }
    }
    if (!in_place) {
      for (int64_t row = 0; row < chunk; ++row) Finish(result + row * kColumns, first_row + row, panel, valid);
    }
    return next;
  }

  // Adds the bias to one row of a panel's sums and puts it where it belongs.
  void Finish(float* sums, int64_t row, int64_t panel, int64_t valid) const {
    const int64_t at = row * columns + panel * kColumns;
    if (bias != nullptr) {
      for (int64_t i = 0; i < valid; ++i) sums[i] += bias[panel * kColumns + i];
    }
    if (out_is_bfloat16) {
      uint16_t* to = static_cast<uint16_t*>(out) + at;
      int64_t i = 0;
#if defined(__AVX512F__)
      for (; i + 16 <= valid; i += 16) RoundToBFloat16(_mm512_loadu_ps(sums + i), to + i);
#endif
      for (; i < valid; ++i) to[i] = RoundToBFloat16(sums[i]);
    } else {
      std::memcpy(static_cast<float*>(out) + at, sums, valid * sizeof(float));
    }
  }
};

template <typename Kind>
TileFn TileOf(int64_t rows) {
  return TileFor<Kind>(rows, std::make_integer_sequence<int, kMaxRows>());
}

// x [M, K], panels [layers, n_panels, K, 64] (bfloat16: [.., ceil(K / 2), 64, 2]), bias [N] or [0], scratch in float32.
// Rows of x from `used` on are not multiplied; those of the result are zero.
ffi::Error PackedMatmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer panels, Integer layer, Integer used,
                        Vector bias, ffi::Result<ffi::AnyBuffer> out, ffi::Result<Vector> blocked) {
  const auto xs = x.dimensions(), ps = panels.dimensions(), os = out->dimensions();
  const ffi::DataType type = x.element_type();
  const bool half = type == ffi::BF16;
  if ((!half && type != ffi::F32) || panels.element_type() != type ||
      (out->element_type() != ffi::F32 && out->element_type() != ffi::BF16)) {
    return ffi::Error::InvalidArgument("packed_matmul: x and panels are to be both float32 or both bfloat16");
  }
  const int64_t per_word = half ? BFloat16::kPerWord : Float32::kPerWord;
  if (xs.size() != 2 || os.size() != 2 || ps.size() != (half ? 5u : 4u) || ps[2] != CeilDiv(xs[1], per_word) ||
      ps[3] != kColumns || (half && ps[4] != per_word) || os[0] != xs[0] || CeilDiv(os[1], kColumns) != ps[1] ||
      (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != os[1])) {
    return ffi::Error::InvalidArgument("packed_matmul: shapes of x, panels, bias and out do not fit");
  }
  const int64_t rows = std::clamp<int64_t>(*used.typed_data(), 0, xs[0]);
  const int64_t out_row_bytes = os[1] * static_cast<int64_t>(ffi::ByteWidth(out->element_type()));
  std::memset(static_cast<char*>(out->untyped_data()) + rows * out_row_bytes, 0, (xs[0] - rows) * out_row_bytes);
  if (rows == 0) return ffi::Error::Success();
  auto product = std::make_shared<Product>();
  product->tile = half ? TileOf<BFloat16> : TileOf<Float32>;
  product->rows = rows;
  product->row_bytes = xs[1] * static_cast<int64_t>(sizeof(float)) / per_word;
  product->depth = ps[2];
  product->columns = os[1];
  product->n_panels = ps[1];
  product->n_blocks = CeilDiv(ps[2], kBlock);
  product->x = static_cast<const char*>(x.untyped_data());
  product->bias = bias.element_count() ? bias.typed_data() : nullptr;
  product->out = out->untyped_data();
  product->out_is_bfloat16 = out->element_type() == ffi::BF16;
  // One row of whole words is cut as it is.
  const bool cut = rows > 1 || xs[1] % per_word;
  if (cut && static_cast<int64_t>(blocked->element_count()) < product->n_blocks * kBlock * rows) {
    return ffi::Error::InvalidArgument("packed_matmul: the buffer for the blocked x is too small");
  }
  product->blocked = cut ? reinterpret_cast<uint32_t*>(blocked->typed_data()) : nullptr;
  product->source = cut ? product->blocked : reinterpret_cast<const uint32_t*>(x.untyped_data());
  // Like lax.dynamic_slice, an index outside the stack is moved inside.
  const int64_t chosen = std::clamp<int64_t>(*layer.typed_data(), 0, ps[0] - 1);
  const int64_t words = ps[1] * ps[2] * kColumns, bytes = words * static_cast<int64_t>(sizeof(uint32_t));
  product->panels = static_cast<const uint32_t*>(panels.untyped_data()) + chosen * words;
  product->n_chunks = CeilDiv(rows * ps[2] * static_cast<int64_t>(sizeof(uint32_t)), kChunkBytes);
  product->chunk_rows = CeilDiv(rows, product->n_chunks);
  product->n_chunks = CeilDiv(rows, product->chunk_rows);
  product->n_units = product->n_chunks * product->n_panels;

  const int64_t helpers = bytes < kSerialBytes ? 0 : std::min(pool.num_threads(), product->n_units) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([product] { product->Work(); });  // one that starts too late finds nothing to claim and returns
  }
  product->Work();
  product->WaitForAll();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackPackedMatmul, PackedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Integer>()
                                  .Arg<Integer>()
                                  .Arg<Vector>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<Vector>());
