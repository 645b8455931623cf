// Softmax attention of ragged query rows over a paged KV cache, float32 or bfloat16: the CPU form of
// kernels.paged_attention. Whatever the storage, all arithmetic is float32.
//
// A unit of work is a few query rows of one sequence with one key/value head: all queries that share that head (grouped-query
// attention) meet each key once. Keys are read page by page in blocks of kTokens, aligned to position 0 of the sequence, and turned
// so that a register holds one dimension of 16 tokens; scores, softmax and the sum of values then run over whole registers.
//
// The result of a query is a function of the query and of the keys and values it sees alone: blocks are fixed by position, within a block
// every sum runs in a fixed order, and a token that is not visible adds an exact zero. So neither the other rows of the batch, nor
// where a chunk of the prompt began, nor the number of threads change a bit of it. Tokens past a sequence's length are never read, so
// whatever an earlier owner left in a page cannot reach anybody.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kTokens = 64;                   // tokens of a block
constexpr int64_t kTokenVecs = kTokens / kLanes;  // registers for their scores
constexpr int64_t kMostQueries = 7;               // queries that share the loads of keys and values: their sums fill the registers
constexpr int64_t kUnitQueries = 64;              // queries (rows x heads of a group) of a unit, at most, if a row has fewer

struct Unit {
  int32_t sequence, first_row, rows, kv_head;
};

// What one thread needs while it works; kept for its next call.
struct Scratch {
  std::vector<float> query, keys, scores, out, top, total;
};

// Query: element type of the queries and the result; Cached: of the cache.
template <typename Query, typename Cached>
struct Attention {
  const Query* q;
  const Cached *kv, *staged;  // the wanted layer, and more pages of it
  const int32_t *tables, *kv_lens, *starts;
  const float* sinks;  // one logit a head, or null
  Query* out;
  int64_t heads, kv_heads, head_dim, page_size, table_pages, pages, window;  // pages: of the cache; beyond are the staged ones
  float scale, softcap;  // softcap 0: none
  std::vector<Unit> units;
  std::atomic<int64_t> next{0}, done{0};

  // A unit is claimed while the one before it is computed, so that its first keys can be on their way by then.
  void Work() {
    static thread_local Scratch scratch;
    const int64_t n = static_cast<int64_t>(units.size());
    for (int64_t i = next.fetch_add(1), after; i < n; i = after, done.fetch_add(1)) {
      after = next.fetch_add(1);
      Compute(units[i], after < n ? &units[after] : nullptr, scratch);
    }
  }

  // Waits only for units that a running thread has claimed, so calls side by side on a full pool cannot wait for each other.
  void WaitForAll() const {
    const int64_t n = static_cast<int64_t>(units.size());
    for (int spins = 0; done.load(std::memory_order_acquire) < n; ++spins) {
      if (spins > 4096) std::this_thread::yield();
    }
  }

  // Positions of a unit's first row, of the row behind its last, and of the first block that they see.
  struct Span {
    int64_t first, end, begin;
  };
  Span SpanOf(const Unit& unit) const {
    // The rows of a sequence are its last tokens.
    const int64_t first = kv_lens[unit.sequence] - (starts[unit.sequence + 1] - unit.first_row);
    return {first, first + unit.rows, std::max<int64_t>(0, first - window + 1) / kTokens * kTokens};
  }

  // Where the tokens of a block lie, key first and value right behind it. Past the end of what is wanted the last token again: masked,
  // but finite.
  void Find(const Unit& unit, int64_t base, int64_t end, const Cached** rows) const {
    const int64_t count = std::min(kTokens, end - base), stride = 2 * kv_heads * head_dim;
    const int32_t* table = tables + unit.sequence * table_pages + base / page_size;
    int64_t slot = base % page_size;
    const Cached* page = nullptr;
    for (int64_t t = 0; t < count; ++t, ++slot) {
      if (slot == page_size) {
        slot = 0;
        ++table;
        page = nullptr;
      }
      if (!page) {
        page = *table < pages ? kv + *table * page_size * stride : staged + (*table - pages) * page_size * stride;
        page += 2 * unit.kv_head * head_dim;
      }
      rows[t] = page + slot * stride;
    }
    std::fill(rows + count, rows + kTokens, rows[count - 1]);
  }

  // Has the way of one key or value to the cache begin.
  void Fetch(const Cached* vector) const {
    const char* bytes = reinterpret_cast<const char*>(vector);
    for (size_t b = 0; b < head_dim * sizeof(Cached); b += 64) __builtin_prefetch(bytes + b, 0, 2);
  }

  void Compute(const Unit& unit, const Unit* after, Scratch& s) const {
    const int64_t group = heads / kv_heads, dim = head_dim;
    const auto [first, end, begin] = SpanOf(unit);
    // One block is on its way from memory while the block before it is worked on: a little of it at a time, since the processor
    // waits when too much is.
    const Cached* found[2][kTokens];
    Find(unit, begin, end, found[0]);
    // As many queries at a time as need the least padding, zeros whose results nobody reads; of several, the most.
    const int64_t n = unit.rows * group;
    int64_t together = kMostQueries;
    for (int64_t fewer = together - 1; fewer > 0; --fewer) {
      if (CeilDiv(n, fewer) * fewer < CeilDiv(n, together) * together) together = fewer;
    }
    const int64_t padded = CeilDiv(n, together) * together;
    s.query.assign(padded * dim, 0.0f);
    s.out.assign(padded * dim, 0.0f);
    s.scores.assign(padded * kTokens, 0.0f);
    s.top.assign(padded, -std::numeric_limits<float>::infinity());
    s.total.assign(padded, 0.0f);
    s.keys.resize(dim * kTokens);
    for (int64_t i = 0; i < n; ++i) {
      const Query* from = q + Offset(unit, i);
      for (int64_t d = 0; d < dim; d += kLanes) Store(&s.query[i * dim + d], Load(from + d) * scale);
    }
    for (int64_t base = begin; base < end; base += kTokens) {
      const int64_t count = std::min(kTokens, end - base);
      const int64_t turn = (base - begin) / kTokens % 2;
      const Cached *const *rows = found[turn], *const *coming = found[1 - turn];
      if (base + kTokens < end) {
        Find(unit, base + kTokens, end, found[1 - turn]);
      } else if (after) {
        const Span span = SpanOf(*after);
        Find(*after, span.begin, span.end, found[1 - turn]);
      } else {
        coming = nullptr;
      }
      for (int64_t t = 0; t < count; t += kLanes) {
        for (int64_t d = 0; d < dim; d += kLanes) Turn(rows + t, d, &s.keys[d * kTokens + t], kTokens);
      }
      for (int64_t i = 0; i < padded; i += together) {
        Together(together, [&](auto queries) { Scores<queries>(&s.query[i * dim], s.keys.data(), &s.scores[i * kTokens], i ? nullptr : coming); });
      }
      if (softcap != 0.0f) Cap(s.scores.data(), padded * kTokens);
      for (int64_t i = 0; i < padded; ++i) {
        const int64_t position = first + std::min(i, n - 1) / group;
        const int64_t from = std::clamp<int64_t>(position - window + 1 - base, 0, kTokens);
        const int64_t to = std::clamp<int64_t>(position + 1 - base, 0, kTokens);
        Softmax(&s.scores[i * kTokens], from, to, s.top[i], s.total[i], &s.out[i * dim]);
      }
      for (int64_t i = 0; i < padded; i += together) {
        Together(together, [&](auto queries) { AddValues<queries>(&s.scores[i * kTokens], rows, count, &s.out[i * dim], i ? nullptr : coming); });
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      Query* to = out + Offset(unit, i);
      const float inverse = sinks ? InverseWithSink(s.top[i], s.total[i], sinks[unit.kv_head * group + i % group])
                                  : 1.0f / s.total[i];
      for (int64_t d = 0; d < dim; d += kLanes) Store(to + d, Load(&s.out[i * dim + d]) * inverse);
    }
  }

  // Where query i of a unit lies: rows outside, heads of the group inside.
  int64_t Offset(const Unit& unit, int64_t i) const {
    const int64_t group = heads / kv_heads;
    return ((unit.first_row + i / group) * heads + unit.kv_head * group + i % group) * head_dim;
  }

  // What the sums, taken relative to `top`, are multiplied by when a sink joins the denominator.
  static float InverseWithSink(float top, float total, float sink) {
    const float high = std::max(top, sink);
    const float kept = Exp(Splat(top - high))[0], added = Exp(Splat(sink - high))[0];
    return kept / (total * kept + added);
  }

  // Soft cap of all scores of a block: c * tanh(score / c).
  void Cap(float* scores, int64_t n) const {
    for (int64_t i = 0; i < n; i += kLanes) Store(scores + i, Tanh(Load(scores + i) / softcap) * softcap);
  }

  // Calls `run` with a number of queries that the compiler knows.
  template <typename Function>
  static void Together(int64_t queries, Function run) {
    switch (queries) {
      case 1: return run(std::integral_constant<int64_t, 1>());
      case 2: return run(std::integral_constant<int64_t, 2>());
      case 3: return run(std::integral_constant<int64_t, 3>());
      case 4: return run(std::integral_constant<int64_t, 4>());
      case 5: return run(std::integral_constant<int64_t, 5>());
      case 6: return run(std::integral_constant<int64_t, 6>());
      default: return run(std::integral_constant<int64_t, kMostQueries>());
    }
  }

  // kQueries rows of scores: query . key for all tokens of the block. Meanwhile the keys of the coming block are fetched.
  template <int64_t kQueries>
  void Scores(const float* query, const float* keys, float* scores, const Cached* const* coming) const {
    Vec sum[kQueries][kTokenVecs] = {};
    int64_t fetched = coming ? 0 : kTokens;
    for (int64_t d = 0; d < head_dim; ++d) {
      for (; fetched < kTokens && fetched * head_dim <= d * kTokens; ++fetched) Fetch(coming[fetched]);
      Vec key[kTokenVecs];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kTokenVecs; ++v) key[v] = Load(keys + d * kTokens + v * kLanes);
#pragma GCC unroll 7
      for (int64_t i = 0; i < kQueries; ++i) {
        const Vec x = Splat(query[i * head_dim + d]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kTokenVecs; ++v) sum[i][v] += x * key[v];
      }
    }
    for (int64_t i = 0; i < kQueries; ++i) {
      for (int64_t v = 0; v < kTokenVecs; ++v) Store(scores + i * kTokens + v * kLanes, sum[i][v]);
    }
  }

  // Turns the scores of visible tokens [from, to) into weights, all others into zeros, and rescales what was summed before.
  void Softmax(float* scores, int64_t from, int64_t to, float& top, float& total, float* out) const {
    if (from >= to) {
      std::fill(scores, scores + kTokens, 0.0f);
      return;
    }
    std::fill(scores, scores + from, -std::numeric_limits<float>::infinity());
    std::fill(scores + to, scores + kTokens, -std::numeric_limits<float>::infinity());
    Vec high = Load(scores);
    for (int64_t v = 1; v < kTokenVecs; ++v) high = Max(high, Load(scores + v * kLanes));
    const float higher = std::max(top, Highest(high));
    Vec sum = {};
    for (int64_t v = 0; v < kTokenVecs; ++v) {
      const Vec weight = Exp(Load(scores + v * kLanes) - higher);
      Store(scores + v * kLanes, weight);
      sum += weight;
    }
    const float factor = Exp(Splat(top - higher))[0];
    total = total * factor + Sum(sum);
    if (factor != 1.0f) {
      for (int64_t d = 0; d < head_dim; d += kLanes) Store(out + d, Load(out + d) * factor);
    }
    top = higher;
  }

  // out[i] += sum over tokens of weight * value, for kQueries queries, four registers of the head at a time.
  // A value lies behind its key. Meanwhile the values of the coming block are fetched.
  template <int64_t kQueries>
  void AddValues(const float* weights, const Cached* const* rows, int64_t count, float* out, const Cached* const* coming) const {
    for (int64_t d = 0; d < head_dim; d += 4 * kLanes) {
      if (d) coming = nullptr;
      const int64_t vecs = std::min<int64_t>(4, (head_dim - d) / kLanes);
      vecs == 4 ? AddSlab<kQueries, 4>(weights, rows, count, out + d, head_dim + d, coming)
      : vecs == 3 ? AddSlab<kQueries, 3>(weights, rows, count, out + d, head_dim + d, coming)
      : vecs == 2 ? AddSlab<kQueries, 2>(weights, rows, count, out + d, head_dim + d, coming)
                  : AddSlab<kQueries, 1>(weights, rows, count, out + d, head_dim + d, coming);
    }
  }

  template <int64_t kQueries, int64_t kVecs>
  void AddSlab(const float* weights, const Cached* const* rows, int64_t count, float* out, int64_t at,
               const Cached* const* coming) const {
    Vec sum[kQueries][kVecs];
    for (int64_t i = 0; i < kQueries; ++i) {
      for (int64_t v = 0; v < kVecs; ++v) sum[i][v] = Load(out + i * head_dim + v * kLanes);
    }
    for (int64_t t = 0; t < count; ++t) {
      if (coming) Fetch(coming[t] + head_dim);
      Vec value[kVecs];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVecs; ++v) value[v] = Load(rows[t] + at + v * kLanes);
#pragma GCC unroll 7
      for (int64_t i = 0; i < kQueries; ++i) {
        const Vec weight = Splat(weights[i * kTokens + t]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVecs; ++v) sum[i][v] += weight * value[v];
      }
    }
    for (int64_t i = 0; i < kQueries; ++i) {
      for (int64_t v = 0; v < kVecs; ++v) Store(out + i * head_dim + v * kLanes, sum[i][v]);
    }
  }
};

using Tables = ffi::Buffer<ffi::S32, 2>;
using Integers = ffi::Buffer<ffi::S32, 1>;
using Integer = ffi::BufferR0<ffi::S32>;
using Sinks = ffi::Buffer<ffi::F32, 1>;

template <typename Query, typename Cached>
ffi::Error Run(ffi::ThreadPool& pool, ffi::AnyBuffer q, ffi::AnyBuffer kv, Integer layer, Integer window, Tables tables,
               Integers kv_lens, Integers starts, Sinks sinks, ffi::AnyBuffer staged, float scale, float softcap, ffi::AnyBuffer out) {
  const auto qs = q.dimensions(), ks = kv.dimensions(), ts = tables.dimensions();
  const int64_t sequences = ts[0], rows = qs[0], kv_heads = ks[3] / 2, group = qs[1] / kv_heads;
  auto work = std::make_shared<Attention<Query, Cached>>();
  const int64_t chosen = std::clamp<int64_t>(*layer.typed_data(), 0, ks[0] - 1);
  work->q = static_cast<const Query*>(q.untyped_data());
  work->kv = static_cast<const Cached*>(kv.untyped_data()) + chosen * ks[1] * ks[2] * ks[3] * ks[4];
  work->staged = static_cast<const Cached*>(staged.untyped_data());
  work->pages = ks[1];
  work->tables = tables.typed_data();
  work->kv_lens = kv_lens.typed_data();
  work->starts = starts.typed_data();
  work->sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  work->out = static_cast<Query*>(out.untyped_data());
  work->heads = qs[1];
  work->kv_heads = kv_heads;
  work->head_dim = qs[2];
  work->page_size = ks[2];
  work->table_pages = ts[1];
  work->window = *window.typed_data();
  work->scale = scale;
  work->softcap = softcap;
  const int64_t unit_rows = std::max<int64_t>(1, kUnitQueries / group);
  int64_t tokens = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = work->starts[s], end = work->starts[s + 1], length = work->kv_lens[s];
    if (begin < 0 || end < begin || end > rows || length < end - begin || length > ts[1] * ks[2]) {
      return ffi::Error::InvalidArgument("paged_attention: query_starts and kv_lens do not fit");
    }
    for (int64_t row = begin; row < end; row += unit_rows) {
      const int64_t count = std::min(unit_rows, end - row);
      for (int64_t head = 0; head < kv_heads; ++head) {
        work->units.push_back({static_cast<int32_t>(s), static_cast<int32_t>(row), static_cast<int32_t>(count),
                               static_cast<int32_t>(head)});
      }
      tokens += length;
    }
  }
  const int64_t used = sequences ? work->starts[sequences] : 0;
  std::memset(work->out + used * qs[1] * qs[2], 0, (rows - used) * qs[1] * qs[2] * sizeof(Query));
  // Less than this is not worth waking another thread.
  const int64_t worth = tokens * qs[1] * qs[2] < (1 << 16) ? 1 : static_cast<int64_t>(work->units.size());
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), worth) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([work] { work->Work(); });  // one that starts too late finds nothing to claim and returns
  }
  work->Work();
  work->WaitForAll();
  return ffi::Error::Success();
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer kv, Integer layer, Integer window,
                          Tables tables, Integers kv_lens, Integers starts, Sinks sinks, ffi::AnyBuffer staged, float scale,
                          float softcap, ffi::Result<ffi::AnyBuffer> out) {
  const auto qs = q.dimensions(), ks = kv.dimensions(), ps = staged.dimensions();
  if (qs.size() != 3 || ks.size() != 5 || qs[2] != ks[4] || qs[2] % kLanes || ks[3] < 2 || ks[3] % 2 || qs[1] % (ks[3] / 2) ||
      kv_lens.dimensions()[0] != tables.dimensions()[0] || starts.dimensions()[0] != tables.dimensions()[0] + 1 ||
      (sinks.element_count() && static_cast<int64_t>(sinks.element_count()) != qs[1]) || ps.size() != 4 ||
      staged.element_type() != kv.element_type() || !std::equal(ps.begin() + 1, ps.end(), ks.begin() + 2)) {
    return ffi::Error::InvalidArgument("paged_attention: shapes of q, kv, sinks and the batch do not fit");
  }
  const auto run = [&](auto form) {
    return form(pool, q, kv, layer, window, tables, kv_lens, starts, sinks, staged, scale, softcap, *out);
  };
  if (out->element_type() == q.element_type()) {
    if (q.element_type() == ffi::F32 && kv.element_type() == ffi::F32) return run(Run<float, float>);
    if (q.element_type() == ffi::F32 && kv.element_type() == ffi::BF16) return run(Run<float, Bf16>);
    if (q.element_type() == ffi::BF16 && kv.element_type() == ffi::BF16) return run(Run<Bf16, Bf16>);
  }
  return ffi::Error::InvalidArgument("paged_attention: expected float32, or bfloat16 with a bfloat16 cache");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxstackPagedAttention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Integer>()
                                  .Arg<Integer>()
                                  .Arg<Tables>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Sinks>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Ret<ffi::AnyBuffer>());
