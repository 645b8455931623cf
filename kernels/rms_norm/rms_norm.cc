// Root-mean-square (or layer) norm of rows: kernels.rms_norm on CPU.
//
// One pass over a row for its sums, one to write it. XLA vectorises the sum of a row one way for four rows and another
// way for forty, so a token's norm would depend on how many others are in its step; here the order is fixed: sixteen
// running sums, added in pairs at the end.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Vec = float __attribute__((vector_size(64)));
using Half = uint16_t __attribute__((vector_size(32)));
using Bits = uint32_t __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;
constexpr int64_t kSerial = 1 << 15;  // numbers that are not worth waking another thread
constexpr int64_t kShare = 1 << 13;   // numbers a thread claims at a time, at least

inline Vec Load(const float* p) { Vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec Load(const uint16_t* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  const Bits wide = __builtin_convertvector(h, Bits) << 16;
  Vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
// float32 to bfloat16, to nearest, ties to even; a NaN stays one.
inline Half Rounded(Vec v) {
  Bits bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((v == v) ? rounded : nan, Half);
}
inline void Store(uint16_t* p, Vec v) { const Half h = Rounded(v); std::memcpy(p, &h, sizeof h); }
// The value as it is after a visit to type T.
inline Vec Through(const float*, Vec v) { return v; }
inline Vec Through(const uint16_t*, Vec v) {
  const Half h = Rounded(v);
  return Load(reinterpret_cast<const uint16_t*>(&h));
}

inline float Sum(Vec v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof part);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

struct Settings {
  float eps;
  bool offset, center;
};

template <typename T, typename W>
void Row(const T* x, const W* weight, T* out, int64_t width, Settings with) {
  float mean = 0;
  if (with.center) {
    Vec sum = {};
    for (int64_t i = 0; i < width; i += kLanes) sum += Load(x + i);
    mean = Sum(sum) / static_cast<float>(width);
  }
  Vec squares = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec v = Load(x + i) - mean;
    squares += v * v;
  }
  const float scale = 1.0f / std::sqrt(Sum(squares) / static_cast<float>(width) + with.eps);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec normed = (Load(x + i) - mean) * scale, w = Load(weight + i);
    // Gemma's and the layer norm multiply in float32; Llama's rounds to the row's type first.
    Store(out + i, with.offset ? normed * (w + 1.0f) : with.center ? normed * w : Through(x, normed) * Through(x, w));
  }
}

// Shared by the threads that work on one call; one that comes too late finds nothing to claim.
struct Work {
  int64_t rows, share, parts;
  std::atomic<int64_t> next{0}, done{0};

  template <typename F>
  void Run(const F& row) {
    for (int64_t part; (part = next.fetch_add(1)) < parts; done.fetch_add(1)) {
      for (int64_t r = part * share; r < std::min(rows, (part + 1) * share); ++r) row(r);
    }
  }
  void Wait() {
    while (done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
  }
};

template <typename T, typename W>
void AllRows(ffi::ThreadPool pool, const T* x, const W* weight, T* out, int64_t rows, int64_t width, Settings with) {
  auto row = [=](int64_t r) { Row(x + r * width, weight, out + r * width, width, with); };
  if (rows * width <= kSerial || pool.num_threads() < 2) {
    for (int64_t r = 0; r < rows; ++r) row(r);
    return;
  }
  auto work = std::make_shared<Work>();
  work->rows = rows;
  work->share = std::max<int64_t>(1, kShare / width);
  work->parts = (rows + work->share - 1) / work->share;
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), work->parts); ++i) {
    pool.Schedule([work, row] { work->Run(row); });
  }
  work->Run(row);
  work->Wait();
}

template <typename T>
ffi::Error Typed(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> out,
                 Settings with) {
  const int64_t width = weight.element_count(), rows = static_cast<int64_t>(x.element_count()) / width;
  const T* from = static_cast<const T*>(x.untyped_data());
  T* to = static_cast<T*>(out->untyped_data());
  if (weight.element_type() == ffi::F32) {
    AllRows(pool, from, static_cast<const float*>(weight.untyped_data()), to, rows, width, with);
  } else {
    AllRows(pool, from, static_cast<const uint16_t*>(weight.untyped_data()), to, rows, width, with);
  }
  return ffi::Error::Success();
}

// x and out [rows, width] of one type, weight [width]; float32 or bfloat16 each, width a multiple of kLanes.
ffi::Error RmsNorm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Result<ffi::AnyBuffer> out,
                   float eps, bool offset, bool center) {
  const int64_t width = weight.element_count();
  if (width == 0 || width % kLanes || x.element_count() % width || x.element_type() != out->element_type()) {
    return ffi::Error::InvalidArgument("rms_norm: x, weight and out do not fit");
  }
  const Settings with{eps, offset, center};
  return x.element_type() == ffi::F32 ? Typed<float>(pool, x, weight, out, with)
                                      : Typed<uint16_t>(pool, x, weight, out, with);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackRmsNorm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("offset")
                                  .Attr<bool>("center"));
