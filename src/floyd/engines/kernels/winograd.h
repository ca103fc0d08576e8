// Convolutions. 3 x 3 at stride 1: Winograd's (Lavin and Gray, arXiv:1509.09308), which needs 36 products for a tile of
// 4 x 4 pixels instead of 16 x 9. All others: pixels gathered into rows, times a matrix.
#pragma once
#include "gemm.h"
#include "op.h"

namespace floyd {

// F(4 x 4, 3 x 3), for the points 0, +-1, +-2: 36 products for 16 pixels.
struct Four {
  static constexpr int OUT = 4, POINTS = 6;

  static inline void kernel_to_points(const vec* g, vec* out, int step) {  // G g
    vec even = (g[0] + g[2]) * (-1 / 6.0f), odd = g[1] * (1 / 6.0f);
    out[0] = g[0] * 0.25f;
    out[step] = even - odd;
    out[2 * step] = even + odd;
    even = g[0] * (1 / 24.0f) + g[2] * (1 / 6.0f), odd = g[1] * (1 / 12.0f);
    out[3 * step] = even + odd;
    out[4 * step] = even - odd;
    out[5 * step] = g[2];
  }

  static inline void to_points(const vec* d, vec* out, int step) {  // B^T d
    out[0] = d[0] * 4.0f + (d[4] - d[2] * 5.0f);
    vec even = d[4] - d[2] * 4.0f, odd = d[3] - d[1] * 4.0f;
    out[step] = even + odd;
    out[2 * step] = even - odd;
    even = d[4] - d[2], odd = (d[3] - d[1]) * 2.0f;
    out[3 * step] = even + odd;
    out[4 * step] = even - odd;
    out[5 * step] = d[1] * 4.0f + (d[5] - d[3] * 5.0f);
  }

  static inline void from_points(const vec* m, vec* out, int step) {  // A^T m
    const vec plus = m[1] + m[2], minus = m[1] - m[2], plus2 = m[3] + m[4], minus2 = m[3] - m[4];
    out[0] = m[0] + plus + plus2;
    out[step] = minus + minus2 * 2.0f;
    out[2 * step] = plus + plus2 * 4.0f;
    out[3 * step] = minus + minus2 * 8.0f + m[5];
  }
};

// F(2 x 2, 3 x 3), for the points 0, +-1: 16 products for 4 pixels, and fewer weights to fetch, which is what a small
// map waits for.
struct Two {
  static constexpr int OUT = 2, POINTS = 4;

  static inline void kernel_to_points(const vec* g, vec* out, int step) {
    const vec even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    out[0] = g[0];
    out[step] = even + odd;
    out[2 * step] = even - odd;
    out[3 * step] = g[2];
  }

  static inline void to_points(const vec* d, vec* out, int step) {
    out[0] = d[0] - d[2];
    out[step] = d[1] + d[2];
    out[2 * step] = d[2] - d[1];
    out[3 * step] = d[1] - d[3];
  }

  static inline void from_points(const vec* m, vec* out, int step) {
    out[0] = m[0] + m[1] + m[2];
    out[step] = m[1] - m[2] - m[3];
  }
};

// Where every pixel stands twice, both give nothing but zeros to this point.
constexpr int EMPTY_POINT = 2;

template <class F>
struct Tiling {
  static constexpr int64_t PRODUCTS = F::POINTS * F::POINTS;
  int64_t down, across, count;  // tiles
  int64_t block;                // tiles whose products stay in the cache
  explicit Tiling(const Op& op) {
    down = (op.height + F::OUT - 1) / F::OUT, across = (op.width + F::OUT - 1) / F::OUT;
    count = op.batch * down * across;
    // Half a megabyte of them; but all weights are fetched for each block, so that many weights want larger ones.
    const int64_t fits = (int64_t{1} << 17) / (PRODUCTS * (op.channels + op.out_channels));
    const int64_t weights = PRODUCTS * op.channels * op.out_channels;
    const int64_t least = weights < int64_t{1} << 18 ? 1 : weights < int64_t{1} << 21 ? 4 : 10;
    block = std::max(fits, least * ROWS);
    block = std::max<int64_t>(block / ROWS * ROWS, ROWS);
    const int64_t blocks = (count + block - 1) / block;
    block = (count + blocks - 1) / blocks;
  }
  int64_t blocks() const { return (count + block - 1) / block; }
  int64_t v_step(const Op& op) const { return block * op.channels + 16; }  // +16: off the powers of two
  int64_t m_step(const Op& op) const { return block * op.out_channels + 16; }
  int64_t work(const Op& op) const { return PRODUCTS * (v_step(op) + m_step(op)); }
};

static inline const float* zeros() {
  alignas(64) static const float none[16384] = {};
  return none;
}

template <class F>
static inline void into_points(const Op& op, const Tiling<F>& tiling, int64_t tile, float* v, int64_t v_step) {
  constexpr int N = F::POINTS;
  const int64_t image = tile / (tiling.down * tiling.across), row = tile / tiling.across % tiling.down;
  const int64_t top = row * F::OUT - 1, left = tile % tiling.across * F::OUT - 1;
  const float* from[N * N];
  for (int64_t i = 0; i < N * N; i++) {
    const int64_t y = top + i / N, x = left + i % N;
    const bool inside = y >= 0 && y < op.height && x >= 0 && x < op.width;
    from[i] = zeros();
    if (!inside) continue;
    const int64_t own_y = op.rows ? op.rows[y] : y, own_x = op.columns ? op.columns[x] : x;
    from[i] = op.x + ((image * op.x_height + own_y) * op.x_width + own_x) * op.channels;
  }
  for (int64_t k = 0; k < op.channels; k += LANES) {
    vec d[N], half[N * N], out[N];
    for (int x = 0; x < N; x++) {
      for (int y = 0; y < N; y++) d[y] = load(from[y * N + x] + k);
      F::to_points(d, half + x, N);
    }
    for (int y = 0; y < N; y++) {
      F::to_points(half + y * N, out, 1);
      for (int x = 0; x < N; x++) store(v + (y * N + x) * v_step + k, out[x]);
    }
  }
}

template <class F>
static inline void out_of_points(const Op& op, const Tiling<F>& tiling, int64_t tile, const float* m, int64_t m_step) {
  constexpr int N = F::POINTS, OUT = F::OUT;
  const int64_t image = tile / (tiling.down * tiling.across), row = tile / tiling.across % tiling.down;
  const int64_t top = row * OUT, left = tile % tiling.across * OUT;
  const int64_t high = std::min<int64_t>(OUT, op.height - top), wide = std::min<int64_t>(OUT, op.width - left);
  const int64_t halved = op.add_is_halved ? 1 : 0, add_height = op.height >> halved, add_width = op.width >> halved;
  const float* bias = op.bias + image * op.bias_stride;
  for (int64_t k = 0; k < op.out_channels; k += LANES) {
    vec points[N], half[OUT * N], out[OUT];
    for (int x = 0; x < N; x++) {
      for (int y = 0; y < N; y++) {
        const bool is_empty = op.is_doubled && (x == EMPTY_POINT || y == EMPTY_POINT);
        points[y] = is_empty ? vec{} : load(m + (y * N + x) * m_step + k);
      }
      F::from_points(points, half + x, N);
    }
    const vec shift = load(bias + k);
    for (int64_t y = 0; y < high; y++) {
      F::from_points(half + y * N, out, 1);
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

// Tiles [first, first + count): to the points, a matrix product at each, and back.
template <class F>
static inline void tiles(const Op& op, const Tiling<F>& tiling, int64_t first, int64_t count, float* work, int threads) {
  const int64_t v_step = tiling.v_step(op), m_step = tiling.m_step(op);
  const int64_t panels = (op.out_channels + PANEL - 1) / PANEL;
  float *v = work, *m = work + tiling.PRODUCTS * v_step;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) into_points(op, tiling, first + i, v + i * op.channels, v_step);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiling.PRODUCTS * panels; i++) {
    const int64_t point = i / panels, column = i % panels * PANEL;
    if (op.is_doubled && (point / F::POINTS == EMPTY_POINT || point % F::POINTS == EMPTY_POINT)) continue;
    const int64_t width = std::min<int64_t>(PANEL, op.out_channels - column);
    const float* weight = op.weight + (point * op.out_channels + column) * op.channels;
    panel(count, v + point * v_step, op.channels, weight, width, m + point * m_step + column, op.out_channels,
          op.channels, width, Epilogue());
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; i++) out_of_points(op, tiling, first + i, m + i * op.out_channels, m_step);
}

template <class F>
static inline void conv3_by(const Op& op, float* work, int threads) {
  const Tiling<F> tiling(op);
  const int64_t blocks = tiling.blocks();
  const auto block = [&](int64_t i, float* own, int many) {
    const int64_t first = i * tiling.block;
    tiles(op, tiling, first, std::min(tiling.block, tiling.count - first), own, many);
  };
  // No parallel region around the one that shares a block, not even an idle one: GCC's OpenMP then makes new threads
  // for the inner one every time.
  if (threads == 1 || blocks < 2 * threads) {  // the threads work on one block together
    for (int64_t i = 0; i < blocks; i++) block(i, work, threads);
  } else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < blocks; i++) block(i, work + thread_number() * tiling.work(op), 1);
  }
}

static inline void conv3(const Op& op, float* work, int threads) {
  return op.tile == Two::OUT ? conv3_by<Two>(op, work, threads) : conv3_by<Four>(op, work, threads);
}

static inline int64_t conv3_work(const Op& op, int threads) {
  return threads * (op.tile == Two::OUT ? Tiling<Two>(op).work(op) : Tiling<Four>(op).work(op));
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

// A 3 x 3 kernel in memory: how far from one output channel, input channel, and tap to the next.
struct Taps {
  const float* first;
  int64_t out_stride, in_stride, tap_stride;
  vec at(int64_t out, int64_t in, int tap, int64_t count) const {  // of `count` output channels
    const float* from = first + out * out_stride + in * in_stride + tap * tap_stride;
    vec value{};
    for (int64_t i = 0; i < count; i++) value[i] = from[i * out_stride];
    return value;
  }
};

// G w G^T into [products][panel][channels][PANEL]; `place`: where an input channel lies.
template <class F>
static inline void pack_conv3(const Taps& taps, int64_t outs, int64_t ins, const int32_t* place, int64_t channels,
                              int64_t out_channels, float factor, float* packed, int threads) {
  constexpr int N = F::POINTS;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < outs; block += PANEL) {
    const int64_t width = std::min<int64_t>(PANEL, out_channels - block);
    for (int64_t i = 0; i < ins; i++)
      for (int64_t o = block; o < std::min(outs, block + width); o += LANES) {
        vec kernel[9], half[3 * N], out[N];
        for (int tap = 0; tap < 9; tap++) kernel[tap] = taps.at(o, i, tap, std::min<int64_t>(LANES, outs - o)) * factor;
        for (int y = 0; y < 3; y++) F::kernel_to_points(kernel + 3 * y, half + y, 3);  // half: [x][y]
        float* to = packed + block * channels + place[i] * width + (o - block);
        for (int x = 0; x < N; x++) {
          F::kernel_to_points(half + 3 * x, out, 1);
          for (int y = 0; y < N; y++) store(to + (y * N + x) * channels * out_channels, out[y]);
        }
      }
  }
}

}  // namespace floyd
