// Causal attention within the documents of packed rows, and its gradients, in float32: the CPU form of
// kernels.packed_attention.
//
// The work is proportional to what is visible: a few queries (with all heads that share their keys) meet the keys from
// the first that any of them sees to the last query itself, so documents far shorter than a row cost their own squares,
// not the row's. The backward pass computes the probabilities again from each query's log of the softmax's denominator
// (Dao et al. 2022, section 3.1). It works on stretches that begin and end with documents: no other stretch adds to
// their keys' gradients, so nothing is shared between threads and every sum has one order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "simd.h"
#include "tile.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kKeys = 64;     // keys of a block
constexpr int64_t kQueries = 32;  // tokens that meet a block of keys together
constexpr int64_t kStretch = 64;  // tokens of a stretch of documents, at least

// ---- Shapes, and the copies of a few queries and of a block of keys that the products run over. ----
struct Shape {
  int64_t rows, length, heads, kv_heads, dim;
  float softcap;  // 0: none
  const int32_t* first;  // [rows, length]: the first key that a query sees

  int64_t group() const { return heads / kv_heads; }
  int64_t query(int64_t row, int64_t token, int64_t kv) const { return (((row * length + token) * heads) + kv * group()) * dim; }
  int64_t key(int64_t row, int64_t token, int64_t kv) const { return ((row * length + token) * kv_heads + kv) * dim; }
  int64_t log_total(int64_t row, int64_t token, int64_t kv) const { return (row * length + token) * heads + kv * group(); }
};

struct Scratch {
  std::vector<float> query, d_out, out, keys, values, scores, d_scores, top, total, d_query, d_key, d_value;
};

// The heads of a group, of tokens [begin, end): `to` [tokens * group, dim].
void CopyIn(const Shape& s, const float* from, int64_t row, int64_t kv, int64_t begin, int64_t end, float* to) {
  const int64_t width = s.group() * s.dim;
  for (int64_t t = begin; t < end; ++t, to += width) std::memcpy(to, from + s.query(row, t, kv), width * sizeof(float));
}

// Keys (or values) [base, base + count) turned: to[d, key], zeros behind them.
void TurnBlock(const Shape& s, const float* from, int64_t row, int64_t kv, int64_t base, int64_t count, float* to) {
  const float* vectors[kKeys];
  for (int64_t t = 0; t < kKeys; ++t) vectors[t] = from + s.key(row, base + std::min(t, count - 1), kv);
  for (int64_t t = 0; t < kKeys; t += kLanes) {
    for (int64_t d = 0; d < s.dim; d += kLanes) Turn(vectors + t, d, to + d * kKeys + t, kKeys);
  }
}

// The keys of a block that a query sees: [from, to).
struct Visible {
  int64_t from, to;
};
Visible VisibleIn(const Shape& s, int64_t row, int64_t token, int64_t base) {
  const int64_t first = s.first[row * s.length + token];
  return {std::clamp<int64_t>(first - base, 0, kKeys), std::clamp<int64_t>(token + 1 - base, 0, kKeys)};
}

// Calls run(base, count, first) for the blocks of keys that tokens [begin, end) see.
template <typename Run>
void ForBlocks(const Shape& s, int64_t row, int64_t begin, int64_t end, Run run) {
  const int64_t low = s.first[row * s.length + begin];
  for (int64_t base = low; base < end; base += kKeys) run(base, std::min(kKeys, end - base), base == low);
}

// ---- Work shared by threads: units are claimed from a counter, and only claimed ones are waited for. ----
template <typename Unit>
struct Shared {
  std::vector<Unit> units;
  std::atomic<int64_t> next{0}, done{0};

  template <typename Compute>
  void Work(Compute compute) {
    static thread_local Scratch scratch;
    const int64_t n = static_cast<int64_t>(units.size());
    for (int64_t i; (i = next.fetch_add(1)) < n; done.fetch_add(1)) compute(units[i], scratch);
  }
  void WaitForAll() const {
    const int64_t n = static_cast<int64_t>(units.size());
    for (int spins = 0; done.load(std::memory_order_acquire) < n; ++spins) {
      if (spins > 4096) std::this_thread::yield();
    }
  }
};

template <typename Pass>
void RunOnAllThreads(ffi::ThreadPool& pool, std::shared_ptr<Pass> pass) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), pass->shared.units.size()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([pass] { pass->Work(); });
  pass->Work();
  pass->shared.WaitForAll();
}

struct Unit {
  int64_t row, kv, begin, end;  // tokens [begin, end) of a row, with one key/value head
};

// ---- Forward: out and each query's log of the softmax's denominator. ----
struct Forward {
  Shape s;
  const float *q, *k, *v;
  float *out, *log_total;
  Shared<Unit> shared;

  void Work() {
    shared.Work([this](const Unit& unit, Scratch& scratch) { Compute(unit, scratch); });
  }

  void Compute(const Unit& u, Scratch& x) const {
    const int64_t group = s.group(), dim = s.dim, m = (u.end - u.begin) * group;
    x.query.resize(m * dim);
    x.out.assign(m * dim, 0.0f);
    x.scores.resize(m * kKeys);
    x.keys.resize(dim * kKeys);
    x.top.assign(m, -std::numeric_limits<float>::infinity());
    x.total.assign(m, 0.0f);
    CopyIn(s, q, u.row, u.kv, u.begin, u.end, x.query.data());
    ForBlocks(s, u.row, u.begin, u.end, [&](int64_t base, int64_t count, bool) {
      TurnBlock(s, k, u.row, u.kv, base, count, x.keys.data());
      Multiply(m, kKeys, dim, {x.query.data(), dim, 1}, x.keys.data(), kKeys, x.scores.data(), kKeys, false);
      for (int64_t i = 0; i < m; ++i) {
        Softmax(VisibleIn(s, u.row, u.begin + i / group, base), &x.scores[i * kKeys], x.top[i], x.total[i], &x.out[i * dim]);
      }
      Multiply(m, dim, count, {x.scores.data(), kKeys, 1}, v + s.key(u.row, base, u.kv), s.kv_heads * dim, x.out.data(), dim, true);
    });
    for (int64_t i = 0; i < m; ++i) {
      const int64_t token = u.begin + i / group, head = i % group;
      float* to = out + s.query(u.row, token, u.kv) + head * dim;
      const float inverse = 1.0f / x.total[i];
      for (int64_t d = 0; d < dim; d += kLanes) Store(to + d, Load(&x.out[i * dim + d]) * inverse);
      log_total[s.log_total(u.row, token, u.kv) + head] = x.top[i] + std::log(x.total[i]);
    }
  }

  // Visible scores become weights relative to the highest so far, all others zeros; what was summed before is rescaled.
  void Softmax(Visible seen, float* scores, float& top, float& total, float* out) const {
    if (seen.from >= seen.to) {
      std::fill(scores, scores + kKeys, 0.0f);
      return;
    }
    if (s.softcap != 0.0f) {
      for (int64_t t = 0; t < kKeys; t += kLanes) Store(scores + t, Tanh(Load(scores + t) / s.softcap) * s.softcap);
    }
    std::fill(scores, scores + seen.from, -std::numeric_limits<float>::infinity());
    std::fill(scores + seen.to, scores + kKeys, -std::numeric_limits<float>::infinity());
    Vec high = Load(scores);
    for (int64_t t = kLanes; t < kKeys; t += kLanes) high = Max(high, Load(scores + t));
    const float higher = std::max(top, Highest(high));
    Vec sum = {};
    for (int64_t t = 0; t < kKeys; t += kLanes) {
      const Vec weight = Exp(Load(scores + t) - higher);
      Store(scores + t, weight);
      sum += weight;
    }
    const float factor = Exp(Splat(top - higher))[0];
    total = total * factor + Sum(sum);
    if (factor != 1.0f) {
      for (int64_t d = 0; d < s.dim; d += kLanes) Store(out + d, Load(out + d) * factor);
    }
    top = higher;
  }
};

// ---- Backward: gradients of q, k and v. ----
struct Backward {
  Shape s;
  const float *q, *k, *v, *out, *log_total, *d_out;
  float *d_q, *d_k, *d_v;
  Shared<Unit> shared;

  void Work() {
    shared.Work([this](const Unit& unit, Scratch& scratch) { Compute(unit, scratch); });
  }

  void Compute(const Unit& u, Scratch& x) const {
    const int64_t dim = s.dim, n = u.end - u.begin;
    x.d_key.assign(n * dim, 0.0f);
    x.d_value.assign(n * dim, 0.0f);
    for (int64_t begin = u.begin; begin < u.end; begin += kQueries) {
      Queries({u.row, u.kv, begin, std::min(begin + kQueries, u.end)}, u.begin, x);
    }
    for (int64_t t = 0; t < n; ++t) {
      std::memcpy(d_k + s.key(u.row, u.begin + t, u.kv), &x.d_key[t * dim], dim * sizeof(float));
      std::memcpy(d_v + s.key(u.row, u.begin + t, u.kv), &x.d_value[t * dim], dim * sizeof(float));
    }
  }

  // The part of a few queries in all gradients; keys of the stretch are counted from `start`.
  void Queries(const Unit& u, int64_t start, Scratch& x) const {
    const int64_t group = s.group(), dim = s.dim, m = (u.end - u.begin) * group;
    x.query.resize(m * dim);
    x.d_out.resize(m * dim);
    x.d_query.resize(m * dim);
    x.scores.resize(m * kKeys);
    x.d_scores.resize(m * kKeys);
    x.keys.resize(dim * kKeys);
    x.values.resize(dim * kKeys);
    x.total.resize(m);
    CopyIn(s, q, u.row, u.kv, u.begin, u.end, x.query.data());
    CopyIn(s, d_out, u.row, u.kv, u.begin, u.end, x.d_out.data());
    for (int64_t i = 0; i < m; ++i) {  // d(softmax) needs sum_s p_s dp_s: the output times its gradient
      const float* result = out + s.query(u.row, u.begin + i / group, u.kv) + i % group * dim;
      Vec inner = {};
      for (int64_t d = 0; d < dim; d += kLanes) inner += Load(result + d) * Load(&x.d_out[i * dim + d]);
      x.total[i] = Sum(inner);
    }
    ForBlocks(s, u.row, u.begin, u.end, [&](int64_t base, int64_t count, bool first) {
      TurnBlock(s, k, u.row, u.kv, base, count, x.keys.data());
      TurnBlock(s, v, u.row, u.kv, base, count, x.values.data());
      Multiply(m, kKeys, dim, {x.query.data(), dim, 1}, x.keys.data(), kKeys, x.scores.data(), kKeys, false);
      Multiply(m, kKeys, dim, {x.d_out.data(), dim, 1}, x.values.data(), kKeys, x.d_scores.data(), kKeys, false);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t token = u.begin + i / group;
        Slopes(VisibleIn(s, u.row, token, base), log_total[s.log_total(u.row, token, u.kv) + i % group], x.total[i],
               &x.scores[i * kKeys], &x.d_scores[i * kKeys]);
      }
      const int64_t at = (base - start) * dim;
      Multiply(count, dim, m, {x.scores.data(), 1, kKeys}, x.d_out.data(), dim, &x.d_value[at], dim, true);
      Multiply(count, dim, m, {x.d_scores.data(), 1, kKeys}, x.query.data(), dim, &x.d_key[at], dim, true);
      Multiply(m, dim, count, {x.d_scores.data(), kKeys, 1}, k + s.key(u.row, base, u.kv), s.kv_heads * dim,
               x.d_query.data(), dim, !first);
    });
    const float* from = x.d_query.data();
    for (int64_t t = u.begin; t < u.end; ++t, from += group * dim) {
      std::memcpy(d_q + s.query(u.row, t, u.kv), from, group * dim * sizeof(float));
    }
  }

  // Scores become probabilities, and the gradients of those the gradients of scores; zeros where nothing is visible.
  void Slopes(Visible seen, float log_total, float inner, float* scores, float* d_scores) const {
    for (int64_t t = 0; t < kKeys; t += kLanes) {
      Vec score = Load(scores + t), slope = Splat(1.0f);
      if (s.softcap != 0.0f) {
        const Vec bent = Tanh(score / s.softcap);
        score = bent * s.softcap;
        slope -= bent * bent;
      }
      const Vec p = Exp(Min(score - log_total, Vec{}));  // a score that is not visible may be any number
      Store(scores + t, p);
      Store(d_scores + t, p * (Load(d_scores + t) - inner) * slope);
    }
    for (float* row : {scores, d_scores}) {
      std::fill(row, row + std::min(seen.from, kKeys), 0.0f);
      std::fill(row + std::max<int64_t>(seen.to, 0), row + kKeys, 0.0f);
    }
  }

  static Vec Min(Vec a, Vec b) { return a < b ? a : b; }
};

using Firsts = ffi::Buffer<ffi::S32, 2>;
using Heads = ffi::Buffer<ffi::F32, 4>;  // [rows, length, heads, dim]
using Logs = ffi::Buffer<ffi::F32, 3>;   // [rows, length, heads]

bool Fits(Heads q, Heads k, Heads v, Firsts first) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), fs = first.dimensions();
  return std::equal(ks.begin(), ks.end(), vs.begin()) && qs[0] == ks[0] && qs[1] == ks[1] && qs[3] == ks[3] && ks[2] > 0 &&
         qs[2] % ks[2] == 0 && qs[3] % kLanes == 0 && fs[0] == qs[0] && fs[1] == qs[1];
}

// Every query sees itself and nothing before the first key of the one in front of it, or memory would be read that is not there.
bool Contiguous(Firsts first) {
  const auto fs = first.dimensions();
  const int32_t* at = first.typed_data();
  for (int64_t row = 0; row < fs[0]; ++row, at += fs[1]) {
    for (int64_t t = 0; t < fs[1]; ++t) {
      if (at[t] < (t ? at[t - 1] : 0) || at[t] > t) return false;
    }
  }
  return true;
}

Shape ShapeOf(Heads q, Heads k, Firsts first, float softcap) {
  const auto qs = q.dimensions();
  return {qs[0], qs[1], qs[2], k.dimensions()[2], qs[3], softcap, first.typed_data()};
}

ffi::Error Misfit() {
  return ffi::Error::InvalidArgument("packed_attention: shapes, or the first visible keys, do not fit");
}

ffi::Error RunForward(ffi::ThreadPool pool, Heads q, Heads k, Heads v, Firsts first, float softcap, ffi::Result<Heads> out,
                      ffi::Result<Logs> log_total) {
  if (!Fits(q, k, v, first) || !Contiguous(first)) return Misfit();
  auto pass = std::make_shared<Forward>();
  pass->s = ShapeOf(q, k, first, softcap);
  pass->q = q.typed_data();
  pass->k = k.typed_data();
  pass->v = v.typed_data();
  pass->out = out->typed_data();
  pass->log_total = log_total->typed_data();
  const Shape& s = pass->s;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t begin = 0; begin < s.length; begin += kQueries) {
      for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
        pass->shared.units.push_back({row, kv, begin, std::min(begin + kQueries, s.length)});
      }
    }
  }
  RunOnAllThreads(pool, pass);
  return ffi::Error::Success();
}

ffi::Error RunBackward(ffi::ThreadPool pool, Heads q, Heads k, Heads v, Firsts first, Heads out, Logs log_total, Heads d_out,
                       float softcap, ffi::Result<Heads> d_q, ffi::Result<Heads> d_k, ffi::Result<Heads> d_v) {
  if (!Fits(q, k, v, first) || !Contiguous(first)) return Misfit();
  auto pass = std::make_shared<Backward>();
  pass->s = ShapeOf(q, k, first, softcap);
  pass->q = q.typed_data();
  pass->k = k.typed_data();
  pass->v = v.typed_data();
  pass->out = out.typed_data();
  pass->log_total = log_total.typed_data();
  pass->d_out = d_out.typed_data();
  pass->d_q = d_q->typed_data();
  pass->d_k = d_k->typed_data();
  pass->d_v = d_v->typed_data();
  const Shape& s = pass->s;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int32_t* firsts = s.first + row * s.length;
    for (int64_t begin = 0, end; begin < s.length; begin = end) {
      // To where a later query sees nothing from before it.
      for (end = std::min(begin + kStretch, s.length); end < s.length && firsts[end] != end; ++end) {
      }
      for (int64_t kv = 0; kv < s.kv_heads; ++kv) pass->shared.units.push_back({row, kv, begin, end});
    }
  }
  RunOnAllThreads(pool, pass);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackPackedAttentionForward, RunForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Heads>()
                                  .Arg<Heads>()
                                  .Arg<Heads>()
                                  .Arg<Firsts>()
                                  .Attr<float>("softcap")
                                  .Ret<Heads>()
                                  .Ret<Logs>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackPackedAttentionBackward, RunBackward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Heads>()
                                  .Arg<Heads>()
                                  .Arg<Heads>()
                                  .Arg<Firsts>()
                                  .Arg<Heads>()
                                  .Arg<Logs>()
                                  .Arg<Heads>()
                                  .Attr<float>("softcap")
                                  .Ret<Heads>()
                                  .Ret<Heads>()
                                  .Ret<Heads>());
