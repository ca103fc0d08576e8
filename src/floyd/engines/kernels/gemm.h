// Matrix products: rows times a matrix packed in panels, [panel][k][PANEL], the last panel [k][LANES] if that is enough.
#pragma once
#include "simd.h"

namespace floyd {

struct Epilogue {  // out = a b + bias + alpha add
  const float* bias = nullptr;
  const float* add = nullptr;
  int64_t add_stride = 0;
  float alpha = 1;
};

template <int R, int V>
static inline void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                        int64_t depth, const Epilogue& end) {
  vec acc[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = vec{};
  for (int64_t k = 0; k < depth; k++) {
    vec row[V];
    for (int v = 0; v < V; v++) {
      row[v] = load(b + k * b_stride + v * LANES);
      __builtin_prefetch(b + (k + 8) * b_stride + v * LANES);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec left = splat(a[r * a_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] += left * row[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      vec value = acc[r][v];
      if (end.bias) value += load(end.bias + v * LANES);
      if (end.add) value += load(end.add + r * end.add_stride + v * LANES) * end.alpha;
      store(c + r * c_stride + v * LANES, value);
    }
}

template <int V, int R = ROWS>
static inline void rows_of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                           int64_t c_stride, int64_t depth, const Epilogue& end) {
  if (rows == R) return tile<R, V>(a, a_stride, b, b_stride, c, c_stride, depth, end);
  if constexpr (R > 1) rows_of<V, R - 1>(rows, a, a_stride, b, b_stride, c, c_stride, depth, end);
}

// All rows against the columns [from, from + width) of one panel; width is LANES or PANEL.
static inline void panel(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                         int64_t c_stride, int64_t depth, int64_t width, Epilogue end) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t from = i * rows / blocks, count = (i + 1) * rows / blocks - from;
    Epilogue own = end;
    if (own.add) own.add += from * own.add_stride;
    if (width == PANEL)
      rows_of<2>(count, a + from * a_stride, a_stride, b, b_stride, c + from * c_stride, c_stride, depth, own);
    else
      rows_of<1>(count, a + from * a_stride, a_stride, b, b_stride, c + from * c_stride, c_stride, depth, own);
  }
}

// c [rows, columns] = a [rows, depth] b + ...; columns is a multiple of LANES.
static inline void gemm(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
                        float* c, int64_t c_stride, const Epilogue& end, int threads) {
  const int64_t fits = std::max<int64_t>(ROWS, (int64_t{1} << 16) / std::max<int64_t>(depth, 1) / ROWS * ROWS);
  const int64_t blocks = (rows + fits - 1) / fits, panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; i++)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t from = i * fits, count = std::min(fits, rows - from), column = p * PANEL;
      const int64_t width = std::min<int64_t>(PANEL, columns - column);
      Epilogue own = end;
      if (own.bias) own.bias += column;
      if (own.add) own.add += from * own.add_stride + column;
      panel(count, a + from * a_stride, a_stride, b + column * depth, width, c + from * c_stride + column, c_stride,
            depth, width, own);
    }
}

}  // namespace floyd
