// Convolutions. 3 x 3 at stride 1: Winograd's F(4 x 4, 3 x 3) (Lavin and Gray, arXiv:1509.09308), which needs 36 products
// for the 16 x 9 of a tile. All others: pixels gathered into rows, times a matrix.
#pragma once
#include "gemm.h"
#include "op.h"

namespace floyd {

// B^T d, for the points 0, +-1, +-2.
static inline void to_points(const vec* d, int step, vec* out, int out_step) {
  const vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  out[0] = d0 * 4.0f + (d4 - d2 * 5.0f);
  vec even = d4 - d2 * 4.0f, odd = d3 - d1 * 4.0f;
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  even = d4 - d2, odd = (d3 - d1) * 2.0f;
  out[3 * out_step] = even + odd;
  out[4 * out_step] = even - odd;
  out[5 * out_step] = d1 * 4.0f + (d5 - d3 * 5.0f);
}

// A^T m
static inline void from_points(const vec* m, int step, vec* out, int out_step) {
  const vec plus = m[step] + m[2 * step], minus = m[step] - m[2 * step];
  const vec plus2 = m[3 * step] + m[4 * step], minus2 = m[3 * step] - m[4 * step];
  out[0] = m[0] + plus + plus2;
  out[out_step] = minus + minus2 * 2.0f;
  out[2 * out_step] = plus + plus2 * 4.0f;
  out[3 * out_step] = minus + minus2 * 8.0f + m[5 * step];
}

struct Tiling {
  int64_t down, across, count;  // tiles of 4 x 4 pixels
  int64_t block;                // tiles whose products stay in the cache
  explicit Tiling(const Op& op) {
    down = (op.height + 3) / 4, across = (op.width + 3) / 4, count = op.batch * down * across;
    const int64_t fits = (int64_t{3} << 18) / (36 * (op.channels + op.out_channels));
    const int64_t weights = 36 * op.channels * op.out_channels;
    block = weights > (int64_t{1} << 18) ? std::max<int64_t>(fits, 8 * ROWS) : fits;
    block = std::max<int64_t>(block / ROWS * ROWS, ROWS);
    const int64_t blocks = (count + block - 1) / block;
    block = (count + blocks - 1) / blocks;
  }
  int64_t blocks() const { return (count + block - 1) / block; }
  int64_t v_step(const Op& op) const { return block * op.channels + 16; }  // +16: off the powers of two
  int64_t m_step(const Op& op) const { return block * op.out_channels + 16; }
  int64_t work(const Op& op) const { return 36 * (v_step(op) + m_step(op)); }
};

static inline const float* zeros() {
  alignas(64) static const float none[16384] = {};
  return none;
}

static inline void into_points(const Op& op, const Tiling& tiling, int64_t tile, float* v, int64_t v_step) {
  const int64_t image = tile / (tiling.down * tiling.across), row = tile / tiling.across % tiling.down;
  const int64_t top = row * 4 - 1, left = tile % tiling.across * 4 - 1;
  const float* from[36];
  for (int64_t i = 0; i < 36; i++) {
    const int64_t y = top + i / 6, x = left + i % 6;
    const bool inside = y >= 0 && y < op.height && x >= 0 && x < op.width;
    from[i] = zeros();
    if (!inside) continue;
    const int64_t own_y = op.rows ? op.rows[y] : y, own_x = op.columns ? op.columns[x] : x;
    from[i] = op.x + ((image * op.x_height + own_y) * op.x_width + own_x) * op.channels;
  }
  for (int64_t k = 0; k < op.channels; k += LANES) {
    vec d[6], half[36], out[6];
    for (int x = 0; x < 6; x++) {
      for (int y = 0; y < 6; y++) d[y] = load(from[y * 6 + x] + k);
      to_points(d, 1, half + x, 6);
    }
    for (int y = 0; y < 6; y++) {
      to_points(half + y * 6, 1, out, 1);
      for (int x = 0; x < 6; x++) store(v + (y * 6 + x) * v_step + k, out[x]);
    }
  }
}

static inline void out_of_points(const Op& op, const Tiling& tiling, int64_t tile, const float* m, int64_t m_step) {
  const int64_t image = tile / (tiling.down * tiling.across), row = tile / tiling.across % tiling.down;
  const int64_t top = row * 4, left = tile % tiling.across * 4;
  const int64_t high = std::min<int64_t>(4, op.height - top), wide = std::min<int64_t>(4, op.width - left);
  const int64_t halved = op.add_is_halved ? 1 : 0, add_height = op.height >> halved, add_width = op.width >> halved;
  const float* bias = op.bias + image * op.bias_stride;
  for (int64_t k = 0; k < op.out_channels; k += LANES) {
    vec points[6], half[24], out[4];
    for (int x = 0; x < 6; x++) {
      for (int y = 0; y < 6; y++)
        points[y] = op.is_doubled && (x == 2 || y == 2) ? vec{} : load(m + (y * 6 + x) * m_step + k);
      from_points(points, 1, half + x, 6);
    }
    const vec shift = load(bias + k);
    for (int64_t y = 0; y < high; y++) {
      from_points(half + y * 6, 1, out, 1);
      for (int64_t x = 0; x < wide; x++) {
        vec value = out[x] + shift;
        if (op.add) {
          const int64_t at = (image * add_height + ((top + y) >> halved)) * add_width + ((left + x) >> halved);
          value += load(op.add + at * op.out_channels + k) * op.alpha;
        }
        store(op.out + ((image * op.height + top + y) * op.width + left + x) * op.out_channels + k, value);
      }
    }
  }
}

// Tiles [first, first + count): to the points, 36 matrix products, back. Where every pixel stands twice, what belongs to
// the third point is zero.
static inline void tiles(const Op& op, const Tiling& tiling, int64_t first, int64_t count, float* work, int threads) {
  const int64_t v_step = tiling.v_step(op), m_step = tiling.m_step(op);
  const int64_t panels = (op.out_channels + PANEL - 1) / PANEL;
  float *v = work, *m = work + 36 * v_step;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) into_points(op, tiling, first + i, v + i * op.channels, v_step);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < 36 * panels; i++) {
    const int64_t point = i / panels, column = i % panels * PANEL;
    if (op.is_doubled && (point / 6 == 2 || point % 6 == 2)) continue;
    const int64_t width = std::min<int64_t>(PANEL, op.out_channels - column);
    const float* weight = op.weight + (point * op.out_channels + column) * op.channels;
    panel(count, v + point * v_step, op.channels, weight, width, m + point * m_step + column, op.out_channels,
          op.channels, width, Epilogue());
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) out_of_points(op, tiling, first + i, m + i * op.out_channels, m_step);
}

static inline void conv3(const Op& op, float* work, int threads) {
  const Tiling tiling(op);
  const int64_t blocks = tiling.blocks();
  const bool shares = blocks < 2 * threads;  // the threads work on one block together
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && !shares)
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t first = i * tiling.block, count = std::min(tiling.block, tiling.count - first);
    float* own = shares ? work : work + thread_number() * tiling.work(op);
    tiles(op, tiling, first, count, own, shares ? threads : 1);
  }
}

static inline int64_t conv_rows(const Op& op) {
  return std::max<int64_t>(ROWS, (int64_t{1} << 17) / (op.kernel * op.kernel * op.channels));
}

// Any kernel, stride and padding.
static inline void conv(const Op& op, float* work, int threads) {
  const int64_t depth = op.kernel * op.kernel * op.channels, pixels = op.batch * op.height * op.width;
  const int64_t rows = conv_rows(op), blocks = (pixels + rows - 1) / rows;
  const int64_t full_height = op.rows ? op.height * op.stride : op.x_height;
  const int64_t full_width = op.columns ? op.width * op.stride : op.x_width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t first = i * rows, count = std::min(rows, pixels - first);
    float* own = work + thread_number() * rows * depth;
    for (int64_t j = 0; j < count; j++) {
      const int64_t pixel = first + j, image = pixel / (op.height * op.width);
      const int64_t y0 = pixel / op.width % op.height * op.stride - op.padding;
      const int64_t x0 = pixel % op.width * op.stride - op.padding;
      for (int64_t tap = 0; tap < op.kernel * op.kernel; tap++) {
        const int64_t y = y0 + tap / op.kernel, x = x0 + tap % op.kernel;
        const bool inside = y >= 0 && y < full_height && x >= 0 && x < full_width;
        const float* from = zeros();
        if (inside) {
          const int64_t own_y = op.rows ? op.rows[y] : y, own_x = op.columns ? op.columns[x] : x;
          from = op.x + ((image * op.x_height + own_y) * op.x_width + own_x) * op.channels;
        }
        std::memcpy(own + j * depth + tap * op.channels, from, op.channels * sizeof(float));
      }
    }
    Epilogue end;
    end.bias = op.bias;
    gemm(count, op.out_channels, depth, own, depth, op.weight, op.out + first * op.out_channels, op.out_channels, end, 1);
  }
}

// G w G^T of a [out, in, 3, 3] kernel into [36][panel][channels][PANEL]; `place` is where a channel of the input lies.
static inline void pack_conv3(const float* w, int64_t outs, int64_t ins, const int32_t* place, int64_t channels,
                              int64_t out_channels, double factor, float* packed, int threads) {
  static const double g[6][3] = {{1 / 4., 0, 0},          {-1 / 6., -1 / 6., -1 / 6.}, {-1 / 6., 1 / 6., -1 / 6.},
                                 {1 / 24., 1 / 12., 1 / 6.}, {1 / 24., -1 / 12., 1 / 6.}, {0, 0, 1}};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < outs; block += PANEL)
    for (int64_t i = 0; i < ins; i++)
      for (int64_t o = block; o < std::min(outs, block + PANEL); o++) {
        const float* kernel = w + (o * ins + i) * 9;
        const int64_t width = std::min<int64_t>(PANEL, out_channels - block);
        float* to = packed + block * channels + place[i] * width + (o - block);
        for (int y = 0; y < 6; y++) {
          double half[3];
          for (int x = 0; x < 3; x++)
            half[x] = g[y][0] * kernel[x] + g[y][1] * kernel[3 + x] + g[y][2] * kernel[6 + x];
          for (int x = 0; x < 6; x++)
            to[(y * 6 + x) * channels * out_channels] =
                static_cast<float>(factor * (g[x][0] * half[0] + g[x][1] * half[1] + g[x][2] * half[2]));
        }
      }
}

}  // namespace floyd
