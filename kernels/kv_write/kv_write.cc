// Copies the keys and values of new tokens into their slots of a paged KV cache, in place: kernels.kv_write on CPU.
//
// XLA's own scatter does that in place for float32, but for bfloat16 older versions of it convert the whole cache to
// float32 and back at every layer. Here a row is a few copies of head_dim numbers, whatever their type.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Integer = ffi::BufferR0<ffi::S32>;
using Integers = ffi::Buffer<ffi::S32, 1>;

// cache and out [layers, pages, page_size, 2 * kv_heads, head_dim], which are the same memory; k, v [rows, kv_heads,
// head_dim] of the same type.
ffi::Error KvWrite(ffi::AnyBuffer cache, ffi::AnyBuffer k, ffi::AnyBuffer v, Integer layer, Integers slots,
                   ffi::Result<ffi::AnyBuffer> out) {
  const auto cs = cache.dimensions(), ks = k.dimensions();
  if (cs.size() != 5 || ks.size() != 3 || cs[3] != 2 * ks[1] || cs[4] != ks[2] || slots.dimensions()[0] != ks[0] ||
      k.element_type() != cache.element_type() || v.element_type() != cache.element_type() ||
      v.element_count() != k.element_count()) {
    return ffi::Error::InvalidArgument("kv_write: cache, k, v and slots do not fit");
  }
  char* to = static_cast<char*>(out->untyped_data());
  if (to != cache.untyped_data()) std::memcpy(to, cache.untyped_data(), cache.size_bytes());
  const int64_t head_bytes = cs[4] * static_cast<int64_t>(ffi::ByteWidth(cache.element_type()));
  const int64_t slot_bytes = cs[3] * head_bytes, n_slots = cs[1] * cs[2], chosen = *layer.typed_data();
  if (chosen < 0 || chosen >= cs[0]) return ffi::Error::InvalidArgument("kv_write: layer outside the cache");
  to += chosen * n_slots * slot_bytes;
  const char *key = static_cast<const char*>(k.untyped_data()), *value = static_cast<const char*>(v.untyped_data());
  for (int64_t row = 0; row < ks[0]; ++row) {
    const int64_t slot = slots.typed_data()[row];
    if (slot < 0 || slot >= n_slots) return ffi::Error::InvalidArgument("kv_write: slot outside the cache");
    char* at = to + slot * slot_bytes;
    for (int64_t head = 0; head < ks[1]; ++head, key += head_bytes, value += head_bytes, at += 2 * head_bytes) {
      std::memcpy(at, key, head_bytes);
      std::memcpy(at + head_bytes, value, head_bytes);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackKvWrite, KvWrite,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Integer>()
                                  .Arg<Integers>()
                                  .Ret<ffi::AnyBuffer>());
