// Matrix products of float32 by tiles of sums that stay in registers, for operands that stay in a cache.

#ifndef JAXSTACK_KERNELS_TILE_H_
#define JAXSTACK_KERNELS_TILE_H_

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace {

// Rows and registers of a tile of sums: they fill the registers there are.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 6, kTileVecs = 1;
#endif

// c[m, n] (+)= a[m, depth] @ b[depth, n], n a multiple of 16; `a` may lie transposed.
struct Matrix {
  const float* at;
  int64_t row, column;  // strides
};

template <int kRows, int kVecs>
inline void Tile(Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool accumulate) {
  Vec sum[kRows][kVecs] = {};
  if (accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] = Load(c + r * c_row + v * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) row[v] = Load(b + k * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = Splat(a.at[r * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) Store(c + r * c_row + v * kLanes, sum[r][v]);
  }
}

template <int kVecs>
inline void Rows(int64_t rows, Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row,
                 bool accumulate) {
  switch (rows) {
    case 1: return Tile<1, kVecs>(a, b, b_row, depth, c, c_row, accumulate);
    case 2: return Tile<2, kVecs>(a, b, b_row, depth, c, c_row, accumulate);
    case 3: return Tile<3, kVecs>(a, b, b_row, depth, c, c_row, accumulate);
    case 4: return Tile<4, kVecs>(a, b, b_row, depth, c, c_row, accumulate);
    case 5: return Tile<5, kVecs>(a, b, b_row, depth, c, c_row, accumulate);
    default: return Tile<kTileRows, kVecs>(a, b, b_row, depth, c, c_row, accumulate);
  }
}

void Multiply(int64_t m, int64_t n, int64_t depth, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row,
              bool accumulate) {
  for (int64_t i = 0; i < m; i += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, m - i);
    const Matrix part{a.at + i * a.row, a.row, a.column};
    int64_t j = 0;
    for (; j + kTileVecs * kLanes <= n; j += kTileVecs * kLanes) {
      Rows<kTileVecs>(rows, part, b + j, b_row, depth, c + i * c_row + j, c_row, accumulate);
    }
    for (; j < n; j += kLanes) Rows<1>(rows, part, b + j, b_row, depth, c + i * c_row + j, c_row, accumulate);
  }
}

}  // namespace

#endif  // JAXSTACK_KERNELS_TILE_H_
