// What training needs of a norm, forth and back: sums over the pixels of every channel, and maps of every number.
//
// Feature maps are [images, pixels, channels], channels a multiple of LANES, in float32 or bfloat16; the arithmetic is
// float32, sums of many pixels float64.
#pragma once
#include <type_traits>
#include <vector>

#include "norm.h"

namespace floyd {

// d activated(x) / dx.
template <int ACT>
static inline vec slope(vec x) {
  const vec zero{};
  if (ACT == GELU) {  // Phi(x) + x phi(x)
    const vec e = vexp(x * x * -0.5f), tail = normal_tail(x, e);
    return (x >= zero ? 1.0f - tail : tail) + x * e * 0.39894228f;
  }
  if (ACT == SILU) {
    const vec s = inverse(vexp(least(zero - x, splat(80.0f))) + 1.0f);
    return s * (x * (1.0f - s) + 1.0f);
  }
  return splat(1.0f);
}

// Pixels of all images in chunks, which threads share out; `body(chunk, image, first pixel, pixels)`.
template <class Body>
static inline void over_chunks(int64_t images, int64_t pixels, int threads, Body body) {
  const int64_t chunks = (pixels + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < images * chunks; i++) {
    const int64_t from = i % chunks * CHUNK;
    body(i, i / chunks, from, std::min(CHUNK, pixels - from));
  }
}

// [chunks of all images][2][channels] to [images][2][channels].
static inline void gathered(const std::vector<float>& own, int64_t images, int64_t pixels, int64_t channels,
                            double* sums) {
  const int64_t chunks = (pixels + CHUNK - 1) / CHUNK, both = 2 * channels;
  std::fill(sums, sums + images * both, 0.0);
  for (int64_t i = 0; i < images * chunks; i++)
    for (int64_t k = 0; k < both; k++) sums[i / chunks * both + k] += own[i * both + k];
}

// Of every image and channel: the sums of x - first and of its square, about the first pixel, so that little cancels.
template <class T>
static inline void sums_of(const typename T::number* x, int64_t images, int64_t pixels, int64_t channels, double* sums,
                           int threads) {
  std::vector<float> own(images * ((pixels + CHUNK - 1) / CHUNK) * 2 * channels);
  over_chunks(images, pixels, threads, [&](int64_t chunk, int64_t image, int64_t from, int64_t count) {
    const auto* first = x + image * pixels * channels;
    float* to = own.data() + chunk * 2 * channels;
    chunk_sums<T>(first, first + from * channels, count, channels, to, to + channels);
  });
  gathered(own, images, pixels, channels, sums);
}

// out = act(x scale + shift), with a scale and a shift for every image and channel.
template <class T, int ACT>
static inline void mapped(const typename T::number* x, int64_t images, int64_t pixels, int64_t channels,
                          const float* scale, const float* shift, typename T::number* out, int threads) {
  over_chunks(images, pixels, threads, [&](int64_t, int64_t image, int64_t from, int64_t count) {
    const int64_t start = (image * pixels + from) * channels;
    for (int64_t k = 0; k < channels; k += LANES) {
      const vec a = load(scale + image * channels + k), b = load(shift + image * channels + k);
      for (int64_t at = start + k; at < start + count * channels; at += channels)
        T::write(out + at, activated(T::read(x + at) * a + b, ACT));
    }
  });
}

// Back through the activation: out = grad act'(x scale + shift), its sums, and those of out (x - middle).
template <class T, int ACT>
static inline void back_to_norm(const typename T::number* grad, const typename T::number* x, int64_t images,
                                int64_t pixels, int64_t channels, const float* scale, const float* shift,
                                const float* middle, typename T::number* out, double* sums, int threads) {
  std::vector<float> own(images * ((pixels + CHUNK - 1) / CHUNK) * 2 * channels);
  over_chunks(images, pixels, threads, [&](int64_t chunk, int64_t image, int64_t from, int64_t count) {
    const int64_t start = (image * pixels + from) * channels;
    float* to = own.data() + chunk * 2 * channels;
    for (int64_t k = 0; k < channels; k += LANES) {
      const int64_t place = image * channels + k;
      const vec a = load(scale + place), b = load(shift + place), about = load(middle + place);
      vec sum{}, product{};
      for (int64_t at = start + k; at < start + count * channels; at += channels) {
        const vec own_x = T::read(x + at), d = T::read(grad + at) * slope<ACT>(own_x * a + b);
        sum += d, product += d * (own_x - about);
        T::write(out + at, d);
      }
      store(to + k, sum), store(to + channels + k, product);
    }
  });
  gathered(own, images, pixels, channels, sums);
}

// Back through the norm: out = out a + x b + c, in place.
template <class T>
static inline void mixed(typename T::number* out, const typename T::number* x, int64_t images, int64_t pixels,
                         int64_t channels, const float* a, const float* b, const float* c, int threads) {
  over_chunks(images, pixels, threads, [&](int64_t, int64_t image, int64_t from, int64_t count) {
    const int64_t start = (image * pixels + from) * channels;
    for (int64_t k = 0; k < channels; k += LANES) {
      const int64_t place = image * channels + k;
      const vec own_a = load(a + place), own_b = load(b + place), own_c = load(c + place);
      for (int64_t at = start + k; at < start + count * channels; at += channels)
        T::write(out + at, T::read(out + at) * own_a + T::read(x + at) * own_b + own_c);
    }
  });
}

// A norm as Python hands it over: out = act(GroupNorm(x) weight + bias), weight and bias scaled and shifted by FiLM.
struct Norm {
  int64_t is_half, images, pixels, channels, groups, act, film_stride;  // film_stride: from image to image
  const void* x;
  const float *weight, *bias;            // [channels]
  const float *film_scale, *film_shift;  // [images, channels]: times 1 + scale, plus shift; null: none
  void* out;
  float *scale, *shift;  // [images, channels], kept for the way back: out = act(x scale + shift)
  float *mean, *root;    // [images, groups], kept too: root is 1 / sqrt(variance + eps)
  double eps;
};

template <class T, int ACT>
static inline void norm_forth(const Norm& norm, int threads) {
  const auto* x = static_cast<const typename T::number*>(norm.x);
  const int64_t channels = norm.channels, pixels = norm.pixels, depth = channels / norm.groups;
  std::vector<double> sums(norm.images * 2 * channels);
  sums_of<T>(x, norm.images, pixels, channels, sums.data(), threads);
  for (int64_t i = 0; i < norm.images * norm.groups; i++) {
    const int64_t image = i / norm.groups, start = i % norm.groups * depth;
    const double *sum = sums.data() + image * 2 * channels, *square = sum + channels;
    double total = 0, total_square = 0;
    for (int64_t k = start; k < start + depth; k++) {
      const double first = T::one(x + image * pixels * channels + k);
      total += sum[k] + first * pixels;
      total_square += square[k] + first * (2 * sum[k] + first * pixels);
    }
    const double count = static_cast<double>(pixels * depth), mean = total / count;
    const double root = 1 / std::sqrt(std::max(total_square / count - mean * mean, 0.0) + norm.eps);
    norm.mean[i] = static_cast<float>(mean), norm.root[i] = static_cast<float>(root);
    for (int64_t k = start; k < start + depth; k++) {
      double weight = norm.weight[k], bias = norm.bias[k];
      if (norm.film_scale) {
        const double film = 1.0 + norm.film_scale[image * norm.film_stride + k];
        weight *= film, bias = bias * film + norm.film_shift[image * norm.film_stride + k];
      }
      weight *= root;
      norm.scale[image * channels + k] = static_cast<float>(weight);
      norm.shift[image * channels + k] = static_cast<float>(bias - mean * weight);
    }
  }
  mapped<T, ACT>(x, norm.images, pixels, channels, norm.scale, norm.shift,
                 static_cast<typename T::number*>(norm.out), threads);
}

// The gradients of x, and, of every image and channel, of weight and bias as FiLM left them. With n = (x - mean) root
// and g what comes back through the activation: dx = root (g w - mean(g w) - n mean(g w n)), means over a group.
template <class T, int ACT>
static inline void norm_back(const Norm& norm, const void* grad, void* dx, float* dweight, float* dbias, int threads) {
  const auto* x = static_cast<const typename T::number*>(norm.x);
  auto* out = static_cast<typename T::number*>(dx);
  const int64_t channels = norm.channels, depth = channels / norm.groups, all = norm.images * channels;
  std::vector<double> sums(2 * all);
  std::vector<float> middle(all), by_x(all), rest(all);
  for (int64_t i = 0; i < all; i++) middle[i] = norm.mean[i / depth];
  back_to_norm<T, ACT>(static_cast<const typename T::number*>(grad), x, norm.images, norm.pixels, channels, norm.scale,
                       norm.shift, middle.data(), out, sums.data(), threads);
  for (int64_t i = 0; i < norm.images * norm.groups; i++) {
    const int64_t image = i / norm.groups, start = i % norm.groups * depth;
    const double *sum = sums.data() + image * 2 * channels, *product = sum + channels;
    const double count = static_cast<double>(norm.pixels * depth), root = norm.root[i];
    double mean_g = 0, mean_gn = 0;  // the first times root, the second over it
    for (int64_t k = start; k < start + depth; k++) {
      const int64_t place = image * channels + k;
      dweight[place] = static_cast<float>(root * product[k]), dbias[place] = static_cast<float>(sum[k]);
      mean_g += norm.scale[place] * sum[k] / count, mean_gn += norm.scale[place] * product[k] / count;
    }
    const double slope = -root * root * mean_gn;
    std::fill_n(by_x.begin() + image * channels + start, depth, static_cast<float>(slope));
    std::fill_n(rest.begin() + image * channels + start, depth, static_cast<float>(-mean_g - slope * norm.mean[i]));
  }
  mixed<T>(out, x, norm.images, norm.pixels, channels, norm.scale, by_x.data(), rest.data(), threads);
}

template <class T, class Body>
static inline void by_act(int64_t act, Body body) {
  switch (act) {
    case GELU: return body(T(), std::integral_constant<int, GELU>());
    case SILU: return body(T(), std::integral_constant<int, SILU>());
    default: return body(T(), std::integral_constant<int, NONE>());
  }
}

// `body(Full or Half, the activation)`, both as types.
template <class Body>
static inline void by_kind(const Norm& norm, Body body) {
  return norm.is_half ? by_act<Half>(norm.act, body) : by_act<Full>(norm.act, body);
}

}  // namespace floyd
