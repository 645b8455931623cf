// activation(gate) * up and its gradients, in float32: kernels.gated on CPU.

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kShare = 1 << 15;  // numbers that a thread claims at a time

// The activations, by the number that gated/cpu.py gives them: value and slope.
struct Both {
  Vec value, slope;
};

struct Silu {  // x sigmoid(x)
  static Both At(Vec x) {
    const Vec e = Exp(x < 0.0f ? x : -x), part = 1.0f / (1.0f + e);
    const Vec sigmoid = x < 0.0f ? e * part : part;
    return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
  }
};

struct GeluTanh {  // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
  static Both At(Vec x) {
    constexpr float kRoot = 0.7978845608f, kCubic = 0.044715f;
    const Vec square = x * x, t = Tanh(kRoot * x * (1.0f + kCubic * square)), half = 0.5f * (1.0f + t);
    return {x * half, half + 0.5f * x * (1.0f - t * t) * (kRoot * (1.0f + 3.0f * kCubic * square))};
  }
};

template <typename Run>
void Everywhere(ffi::ThreadPool& pool, int64_t count, Run run) {
  OnAllThreads(pool, CeilDiv(count, kShare), [=](int64_t part) {
    for (int64_t i = part * kShare; i < std::min(count, (part + 1) * kShare); i += kLanes) run(i);
  });
}

using Numbers = ffi::AnyBuffer;

bool Fits(const Numbers& a, const Numbers& b) {
  return a.element_type() == ffi::F32 && b.element_type() == ffi::F32 && a.element_count() == b.element_count() &&
         a.element_count() % kLanes == 0;
}

ffi::Error Misfit() { return ffi::Error::InvalidArgument("gated: arrays do not fit"); }

const float* In(const Numbers& x) { return static_cast<const float*>(x.untyped_data()); }

template <typename Activation>
void Forward(ffi::ThreadPool& pool, int64_t count, const float* gate, const float* up, float* out) {
  Everywhere(pool, count, [=](int64_t i) { Store(out + i, Activation::At(Load(gate + i)).value * Load(up + i)); });
}

template <typename Activation>
void Backward(ffi::ThreadPool& pool, int64_t count, const float* gate, const float* up, const float* d_out, float* d_gate,
              float* d_up) {
  Everywhere(pool, count, [=](int64_t i) {
    const Both at = Activation::At(Load(gate + i));
    const Vec d = Load(d_out + i), factor = Load(up + i);
    Store(d_gate + i, d * factor * at.slope);
    Store(d_up + i, d * at.value);
  });
}

ffi::Error RunForward(ffi::ThreadPool pool, Numbers gate, Numbers up, int64_t activation, ffi::Result<Numbers> out) {
  if (!Fits(gate, up) || !Fits(gate, *out)) return Misfit();
  float* to = static_cast<float*>(out->untyped_data());
  (activation ? Forward<GeluTanh> : Forward<Silu>)(pool, gate.element_count(), In(gate), In(up), to);
  return ffi::Error::Success();
}

ffi::Error RunBackward(ffi::ThreadPool pool, Numbers gate, Numbers up, Numbers d_out, int64_t activation,
                       ffi::Result<Numbers> d_gate, ffi::Result<Numbers> d_up) {
  if (!Fits(gate, up) || !Fits(gate, d_out) || !Fits(*d_gate, *d_up) || !Fits(gate, *d_up)) return Misfit();
  (activation ? Backward<GeluTanh> : Backward<Silu>)(pool, gate.element_count(), In(gate), In(up), In(d_out),
                                                     static_cast<float*>(d_gate->untyped_data()),
                                                     static_cast<float*>(d_up->untyped_data()));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackGatedForward, RunForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Attr<int64_t>("activation")
                                  .Ret<Numbers>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackGatedBackward, RunBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Attr<int64_t>("activation")
                                  .Ret<Numbers>()
                                  .Ret<Numbers>());
