// Norms with what follows them, pooling, and the borders to torch's layout.
#pragma once
#include "op.h"
#include "simd.h"

namespace floyd {

constexpr int64_t CHUNK = 128;  // pixels summed in float32; their sums are summed in float64, whatever the threads

static inline int64_t norm_work(const Op& op) {
  const int64_t channels = op.channels + op.channels2, chunks = (op.x_height * op.x_width + CHUNK - 1) / CHUNK;
  return op.batch * channels * (2 * chunks + 2);
}

// Sums of x - first and of its square over a chunk of pixels: about the first pixel, so that little cancels.
template <class T>
static inline void chunk_sums(const typename T::number* first, const typename T::number* from, int64_t pixels,
                              int64_t channels, float* sum, float* square) {
  for (int64_t k = 0; k < channels; k += LANES) {
    const vec about = T::read(first + k);
    vec s0{}, s1{}, q0{}, q1{};
    int64_t p = 0;
    for (; p + 1 < pixels; p += 2) {
      const vec a = T::read(from + p * channels + k) - about, b = T::read(from + (p + 1) * channels + k) - about;
      s0 += a, s1 += b, q0 += a * a, q1 += b * b;
    }
    if (p < pixels) {
      const vec a = T::read(from + p * channels + k) - about;
      s0 += a, q0 += a * a;
    }
    store(sum + k, s0 + s1);
    store(square + k, q0 + q1);
  }
}

// scale and shift [batch, channels] so that norm, weight, bias and FiLM are one product and one sum.
static inline void norm_affine(const Op& op, const float* sums, float* scale, float* shift) {
  const int64_t channels = op.channels + op.channels2, pixels = op.x_height * op.x_width;
  const int64_t chunks = (pixels + CHUNK - 1) / CHUNK;
  double* mean = new double[3 * op.num_groups];
  double *square = mean + op.num_groups, *count = square + op.num_groups;
  for (int64_t image = 0; image < op.batch; image++) {
    std::fill(mean, mean + 3 * op.num_groups, 0.0);
    for (int64_t k = 0; k < channels; k++) {
      const int32_t group = op.groups[k];
      if (group < 0) continue;
      double s = 0, q = 0;
      for (int64_t c = 0; c < chunks; c++) {
        const float* own = sums + (image * chunks + c) * 2 * channels;
        s += own[k], q += own[channels + k];
      }
      const double first = k < op.channels ? op.x[image * pixels * op.channels + k]
                                           : op.x2[image * pixels * op.channels2 + k - op.channels];
      mean[group] += s + first * pixels;
      square[group] += q + 2 * first * s + first * first * pixels;
      count[group] += pixels;
    }
    for (int64_t k = 0; k < channels; k++) {
      float *own_scale = scale + image * channels + k, *own_shift = shift + image * channels + k;
      *own_scale = *own_shift = 0;
      const int32_t group = op.groups[k];
      if (group < 0) continue;
      const double middle = mean[group] / count[group];
      const double variance = std::max(square[group] / count[group] - middle * middle, 0.0);
      double weight = op.weight[k], bias = op.bias[k];
      if (op.scale) {
        const double film = op.scale[image * op.film_stride + k];
        weight *= film, bias = bias * film + op.shift[image * op.film_stride + k];
      }
      weight /= std::sqrt(variance + op.eps);
      *own_scale = static_cast<float>(weight), *own_shift = static_cast<float>(bias - middle * weight);
    }
  }
  delete[] mean;
}

template <int ACT, bool POOLS>
static inline void norm_row(const Op& op, int64_t row, const float* scale, const float* shift) {
  const int64_t channels = op.channels + op.channels2, image = row / op.height, y = row % op.height;
  scale += image * channels, shift += image * channels;
  for (int64_t k = 0; k < channels; k += LANES) {
    const bool is_second = k >= op.channels;
    const int64_t stride = is_second ? op.channels2 : op.channels, below = op.x_width * stride;
    const float* from = is_second ? op.x2 + k - op.channels : op.x + k;
    from += (image * op.x_height + (POOLS ? 2 * y : y)) * below;
    float* out = op.out + row * op.width * channels + k;
    const vec a = load(scale + k), b = load(shift + k);
    for (int64_t x = 0; x < op.width; x++, out += channels) {
      vec value;
      if (POOLS) {
        const float* first = from + 2 * x * stride;
        value = activated(load(first) * a + b, ACT) + activated(load(first + stride) * a + b, ACT);
        value += activated(load(first + below) * a + b, ACT) + activated(load(first + below + stride) * a + b, ACT);
        value *= 0.25f;
      } else {
        value = activated(load(from + x * stride) * a + b, ACT);
      }
      store(out, value);
    }
  }
}

template <int ACT>
static inline void norm_rows(const Op& op, const float* scale, const float* shift, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < op.batch * op.height; row++) {
    if (op.pools) norm_row<ACT, true>(op, row, scale, shift);
    else norm_row<ACT, false>(op, row, scale, shift);
  }
}

// GroupNorm over x and x2 side by side, FiLM, an activation, 2 x 2 pooling.
static inline void norm(const Op& op, float* work, int threads) {
  const int64_t channels = op.channels + op.channels2, pixels = op.x_height * op.x_width;
  const int64_t chunks = (pixels + CHUNK - 1) / CHUNK;
  float *scale = work, *shift = scale + op.batch * channels, *sums = shift + op.batch * channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < op.batch * chunks; i++) {
    const int64_t image = i / chunks, from = i % chunks * CHUNK, count = std::min(CHUNK, pixels - from);
    float *sum = sums + i * 2 * channels, *square = sum + channels;
    const float* x = op.x + image * pixels * op.channels;
    chunk_sums<Full>(x, x + from * op.channels, count, op.channels, sum, square);
    if (!op.channels2) continue;
    const float* x2 = op.x2 + image * pixels * op.channels2;
    chunk_sums<Full>(x2, x2 + from * op.channels2, count, op.channels2, sum + op.channels, square + op.channels);
  }
  norm_affine(op, sums, scale, shift);
  switch (op.act) {
    case GELU: return norm_rows<GELU>(op, scale, shift, threads);
    case SILU: return norm_rows<SILU>(op, scale, shift, threads);
    case MISH: return norm_rows<MISH>(op, scale, shift, threads);
    case RELU: return norm_rows<RELU>(op, scale, shift, threads);
    default: return norm_rows<NONE>(op, scale, shift, threads);
  }
}

// Means of 2 x 2, times alpha.
static inline void pool(const Op& op, int threads) {
  const float factor = 0.25f * op.alpha;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < op.batch * op.height; row++)
    for (int64_t x = 0; x < op.width; x++) {
      const int64_t image = row / op.height, y = row % op.height, step = op.x_width * op.channels;
      const float* from = op.x + ((image * op.x_height + 2 * y) * op.x_width + 2 * x) * op.channels;
      float* out = op.out + (row * op.width + x) * op.channels;
      for (int64_t k = 0; k < op.channels; k += LANES)
        store(out + k, (load(from + k) + load(from + op.channels + k) + load(from + step + k) +
                        load(from + step + op.channels + k)) * factor);
    }
}

// Rows of out_channels numbers in `channels` places, the rest of which is 0.
static inline void layer_norm(const Op& op, int threads) {
  const int64_t rows = op.batch * op.height * op.width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; row++) {
    const float* from = op.x + row * op.channels;
    float* out = op.out + row * op.channels;
    double sum = 0, square = 0;
    for (int64_t k = 0; k < op.out_channels; k++) sum += from[k];
    const double mean = sum / op.out_channels;
    for (int64_t k = 0; k < op.out_channels; k++) square += (from[k] - mean) * (from[k] - mean);
    const float root = static_cast<float>(1 / std::sqrt(square / op.out_channels + op.eps));
    const float middle = static_cast<float>(mean);
    for (int64_t k = 0; k < op.channels; k += LANES)
      store(out + k, (load(from + k) - middle) * root * load(op.weight + k) + load(op.bias + k));
  }
}

// value * gelu(gate) of rows [value, gate].
static inline void geglu(const Op& op, int threads) {
  const int64_t rows = op.batch * op.height * op.width, width = op.out_channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t k = 0; k < width; k += LANES)
      store(op.out + row * width + k, load(op.x + row * 2 * width + k) * vgelu(load(op.x + row * 2 * width + width + k)));
}

// [batch, channels, height, width] to what the kernels read.
static inline void from_nchw(const Op& op) {
  const int64_t pixels = op.height * op.width;
  for (int64_t image = 0; image < op.batch; image++)
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t k = 0; k < op.out_channels; k++)
        op.out[(image * pixels + p) * op.out_channels + k] =
            k < op.channels ? op.x[(image * op.channels + k) * pixels + p] : 0.0f;
}

static inline void to_nchw(const Op& op) {
  const int64_t pixels = op.height * op.width;
  for (int64_t image = 0; image < op.batch; image++)
    for (int64_t k = 0; k < op.out_channels; k++)
      for (int64_t p = 0; p < pixels; p++)
        op.out[(image * op.out_channels + k) * pixels + p] = op.x[(image * pixels + p) * op.channels + k];
}

}  // namespace floyd
