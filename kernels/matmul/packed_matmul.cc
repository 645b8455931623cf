// out[M, N] = x[M, K] @ w, float32, with w stored as panels[n_panels, K, 64]: kernels.matmul on packed weights, on CPU.
//
// Decoding multiplies a few rows by weights that come from DRAM every time, so two things decide the speed: the weights
// must arrive as one sequential stream that does not wait for the arithmetic, and the FMA ports must be kept busy.
//   * A panel (64 columns, all of K) is contiguous. While block k of a panel is multiplied, block k+1 is prefetched to
//     L2, the prefetches spread evenly over the row tiles, so DRAM streams during the arithmetic and not between it.
//   * The register tile is up to 6 rows x 64 columns (AVX-512): 24 accumulators, 4 registers of weights, 1 broadcast of
//     x. Wide and low beats the usual 14 x 32: 10 loads for 24 FMAs, not 16 for 28, and on loads the FMA ports wait.
//   * Threads (XLA's own pool and the calling thread) claim panels from an atomic counter, so a core that is busy with
//     something else delays one panel, not half of the product.
// The value of out[m, n] is a function of x[m, :] and w[:, n] alone: within each block of kBlock values of k a chain of
// FMAs in order of k, and the blocks summed in order. Neither the number of rows, nor the row's place among them, nor
// the threads change a bit of it.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Matrix = ffi::Buffer<ffi::F32, 2>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using Panels = ffi::Buffer<ffi::F32, 4>;  // [layers, n_panels, K, 64]

// ---- One SIMD register, by instruction set. ----
#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kMaxRows = 6, kVecs = 4;
inline Vec Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec Broadcast(float a) { return _mm512_set1_ps(a); }
inline Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vec = __m256;
constexpr int kMaxRows = 6, kVecs = 2;
inline Vec Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec Broadcast(float a) { return _mm256_set1_ps(a); }
inline Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#else  // GCC vector extensions: NEON, SSE, anything; -ffp-contract=fast makes the FMA where the machine has one.
using Vec = float __attribute__((vector_size(16)));
constexpr int kMaxRows = 6, kVecs = 2;
inline Vec Load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec Broadcast(float a) { return Vec{a, a, a, a}; }
inline Vec Add(Vec a, Vec b) { return a + b; }
inline Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int64_t kColumns = 64;  // columns of a panel (packed.PANEL_COLUMNS)
constexpr int kLanes = static_cast<int>(sizeof(Vec) / sizeof(float));
constexpr int64_t kBlock = 128;  // k values summed in registers: 32 KiB of panel, which stays in L1 for all row tiles
constexpr int64_t kUnroll = 4;  // k values between two looks at the prefetch cursor
constexpr int64_t kChunkBytes = 5 << 18;  // rows of x worked on at once: they stay in L2 while panels pass by
constexpr int64_t kSerialBytes = 1 << 16;  // weights of less than this are not worth waking another thread

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A cursor over memory that will be needed soon: the micro-kernel touches `lines` cache lines of it per kUnroll steps.
struct Prefetch {
  const char* next;
  int64_t lines;
};

// c[kRows, kVecs * kLanes] (+)= a[kRows, depth] @ b[depth, the same columns of a panel]. Rows of `a` are kBlock apart:
// a constant, so every operand is one base register plus a displacement.
template <int kRows>
void Tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride, bool accumulate, Prefetch& ahead) {
  Vec sum[kRows][kVecs] = {};
  auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec w[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) w[v] = Load(b + k * kColumns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Broadcast(a[r * kBlock + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = Fma(x, w[v], sum[r][v]);
    }
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

using TileFn = void (*)(const float*, const float*, int64_t, float*, int64_t, bool, Prefetch&);

template <int... kRows>
TileFn TileFor(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr TileFn table[] = {Tile<kRows + 1>...};
  return table[rows - 1];
}

// ---- One product, shared by all threads that work on it. ----
struct Product {
  const float* x;       // [rows, depth]
  const float* panels;  // [n_panels, depth, kColumns] of the wanted layer
  float* out;           // [rows, columns]
  float* blocked;       // [n_blocks, rows, kBlock]: x cut along depth; unused for one row, where x is just that
  int64_t rows, depth, columns, n_panels, n_blocks, n_chunks, chunk_rows, n_units;
  std::atomic<int64_t> next_block{0}, blocks_done{0}, next_unit{0}, units_done{0};

  // Called by every thread. A thread only ever waits for work that a running thread has claimed, never for a thread
  // that has yet to start, so products side by side on a full pool, or on a pool of one, cannot wait for each other.
  void Work() {
    if (rows > 1) {
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
    const int64_t begin = block * kBlock, bytes = std::min(kBlock, depth - begin) * sizeof(float);
    float* to = blocked + block * rows * kBlock;
    for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * kBlock, x + row * depth + begin, bytes);
  }

  // Computes one unit (a chunk of rows x a panel) and claims the next, in time to prefetch its first weights.
  int64_t Multiply(int64_t unit) {
    const int64_t first_row = unit / n_panels * chunk_rows, panel = unit % n_panels;
    const int64_t chunk = std::min(chunk_rows, rows - first_row);
    const int64_t n_tiles = CeilDiv(chunk, kMaxRows);
    const int64_t valid = std::min(kColumns, columns - panel * kColumns);
    const float* weights = panels + panel * depth * kColumns;
    const float* source = rows > 1 ? blocked : x;
    // A panel that sticks out of the result is summed aside (this is the rare last one).
    std::unique_ptr<float[]> aside(valid < kColumns ? new float[chunk * kColumns] : nullptr);
    float* result = aside ? aside.get() : out + first_row * columns + panel * kColumns;
    const int64_t result_stride = aside ? kColumns : columns;
    const int64_t lines = CeilDiv(kUnroll * kVecs * kLanes * sizeof(float) / 64, n_tiles);
    int64_t next = 0;
    for (int64_t block = 0; block < n_blocks; ++block) {
      const int64_t begin = block * kBlock, length = std::min(kBlock, depth - begin);
      const float* soon = weights + (begin + kBlock) * kColumns;
      if (block + 1 == n_blocks) {
        next = next_unit.fetch_add(1);
        soon = panels + next % n_panels * depth * kColumns;
      }
      Prefetch ahead{reinterpret_cast<const char*>(soon), next < n_units ? lines : 0};
      // Tiles of nearly equal height: 14 rows are 4 + 5 + 5, not 6 + 6 + 2.
      for (int64_t tile = 0; tile < n_tiles; ++tile) {
        const int64_t row = tile * chunk / n_tiles, end = (tile + 1) * chunk / n_tiles;
        const float* a = source + (block * rows + first_row + row) * kBlock;
        const TileFn multiply = TileFor(static_cast<int>(end - row), std::make_integer_sequence<int, kMaxRows>());
        for (int64_t column = 0; column < kColumns; column += kVecs * kLanes) {
          multiply(a, weights + begin * kColumns + column, length, result + row * result_stride + column, result_stride,
                   block > 0, ahead);
        }
      }
    }
    if (aside) {
      for (int64_t row = 0; row < chunk; ++row) {
        float* to = out + (first_row + row) * columns + panel * kColumns;
        std::memcpy(to, result + row * kColumns, valid * sizeof(float));
      }
    }
    return next;
  }
};

ffi::Error PackedMatmul(ffi::ThreadPool pool, Matrix x, Panels panels, ffi::BufferR0<ffi::S32> layer,
                        ffi::Result<Matrix> out, ffi::Result<Vector> blocked) {
  const auto xs = x.dimensions(), ps = panels.dimensions(), os = out->dimensions();
  auto product = std::make_shared<Product>();
  product->rows = xs[0];
  product->depth = xs[1];
  product->columns = os[1];
  product->n_panels = ps[1];
  product->n_blocks = CeilDiv(xs[1], kBlock);
  if (ps[2] != xs[1] || ps[3] != kColumns || os[0] != xs[0] || CeilDiv(os[1], kColumns) != ps[1]) {
    return ffi::Error::InvalidArgument("packed_matmul: shapes of x, panels and out do not fit");
  }
  if (xs[0] > 1 && static_cast<int64_t>(blocked->element_count()) < product->n_blocks * kBlock * xs[0]) {
    return ffi::Error::InvalidArgument("packed_matmul: the buffer for the blocked x is too small");
  }
  // Like lax.dynamic_slice, an index outside the stack is moved inside.
  const int64_t chosen = std::clamp<int64_t>(*layer.typed_data(), 0, ps[0] - 1);
  product->x = x.typed_data();
  product->panels = panels.typed_data() + chosen * ps[1] * ps[2] * ps[3];
  product->out = out->typed_data();
  product->blocked = blocked->typed_data();
  product->n_chunks = CeilDiv(xs[0] * xs[1] * static_cast<int64_t>(sizeof(float)), kChunkBytes);
  product->chunk_rows = CeilDiv(xs[0], product->n_chunks);
  product->n_chunks = CeilDiv(xs[0], product->chunk_rows);
  product->n_units = product->n_chunks * product->n_panels;

  const int64_t bytes = ps[1] * ps[2] * ps[3] * static_cast<int64_t>(sizeof(float));
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
                                  .Arg<Matrix>()
                                  .Arg<Panels>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<Matrix>()
                                  .Ret<Vector>());
