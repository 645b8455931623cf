// base + low @ b in place, in float32: kernels.low_rank_add on CPU.
//
// With the narrow inner axis the product is all writing: XLA stores it, then reads it and the base to add them, in one
// thread. Here the base passes through the registers once, on all threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "threads.h"
#include "tile.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kShare = 1 << 15;  // numbers that a thread claims at a time, at least

using Rows2 = ffi::Buffer<ffi::F32, 2>;

ffi::Error LowRankAdd(ffi::ThreadPool pool, Rows2 base, Rows2 low, Rows2 b, ffi::Result<Rows2> out) {
  const int64_t rows = base.dimensions()[0], width = base.dimensions()[1], rank = low.dimensions()[1];
  if (low.dimensions()[0] != rows || b.dimensions()[0] != rank || b.dimensions()[1] != width || width % kLanes ||
      out->element_count() != base.element_count()) {
    return ffi::Error::InvalidArgument("low_rank_add: base, low and b do not fit");
  }
  if (rows * width == 0) return ffi::Error::Success();
  const float *from = base.typed_data(), *narrow = low.typed_data(), *factor = b.typed_data();
  float* to = out->typed_data();
  const int64_t share = std::max<int64_t>(1, kShare / (width * kTileRows)) * kTileRows;
  OnAllThreads(pool, CeilDiv(rows, share), [=](int64_t part) {
    const int64_t begin = part * share, count = std::min(share, rows - begin);
    if (to != from) std::memcpy(to + begin * width, from + begin * width, count * width * sizeof(float));
    Multiply(count, width, rank, {narrow + begin * rank, rank, 1}, factor, width, to + begin * width, width, true);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackLowRankAdd, LowRankAdd,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows2>()
                                  .Arg<Rows2>()
                                  .Arg<Rows2>()
                                  .Ret<Rows2>());
