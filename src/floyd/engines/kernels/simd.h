// Vectors of floats through the compiler's vector extension: one source for AVX-512, AVX2, NEON and plain C++.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace floyd {

// LANES floats per vector; ROWS x 2 vectors are what a matrix product keeps in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int PANEL = 2 * LANES;

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

static inline vec load(const float* from) { return *reinterpret_cast<const loose*>(from); }
static inline void store(float* to, vec value) { *reinterpret_cast<loose*>(to) = value; }
static inline vec splat(float value) { return value - vec{}; }
static inline vec least(vec a, vec b) { return a < b ? a : b; }
static inline vec most(vec a, vec b) { return a > b ? a : b; }

static inline float total(vec v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

static inline float highest(vec v) {
  float best = v[0];
  for (int i = 1; i < LANES; i++) best = std::max(best, v[i]);
  return best;
}

// 1 / x, for x that are neither 0 nor huge.
static inline vec inverse(vec x) {
#ifdef __AVX512F__  // a division takes eight times as long as this and is as exact
  const vec guess = (vec)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// What a map's numbers are, read and written as vectors of floats.
struct Full {
  typedef float number;
  static inline float one(const float* from) { return *from; }
  static inline vec read(const float* from) { return load(from); }
  static inline void write(float* to, vec value) { store(to, value); }
};

// bfloat16: the upper half of a float, rounded to even.
struct Half {
  typedef uint16_t number;
  typedef uint32_t words __attribute__((vector_size(LANES * 4)));
  typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

  static inline float one(const uint16_t* from) {
    const uint32_t wide = static_cast<uint32_t>(*from) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

  static inline vec read(const uint16_t* from) {
#ifdef __AVX512F__
    const words wide = (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))) << 16;
#else
    halves raw;
    std::memcpy(&raw, from, sizeof raw);
    const words wide = __builtin_convertvector(raw, words) << 16;
#endif
    vec value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

  static inline void write(uint16_t* to, vec value) {
#ifdef __AVX512BF16__
    const halves raw = (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    words wide;
    std::memcpy(&wide, &value, sizeof wide);
    wide = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    const halves raw = __builtin_convertvector(wide, halves);
#endif
    std::memcpy(to, &raw, sizeof raw);
  }
};

// e^x to two units in the last place: x = n ln 2 + r, and a polynomial in r (Cephes' expf).
static inline vec vexp(vec x) {
  x = most(least(x, splat(88.0f)), splat(-87.0f));
#ifdef __AVX512F__
  const vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vec n = (x * 1.44269504f + magic) - magic;
#endif
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#ifdef __AVX512F__
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec two_to_n;
  std::memcpy(&two_to_n, &power, sizeof power);
  return p * two_to_n;
#endif
}

enum Act { NONE, SILU, GELU, MISH, RELU };

// Phi(-|x|), `e` being e^(-x^2 / 2); erf to 1.5e-7 (Abramowitz and Stegun 7.1.26).
static inline vec normal_tail(vec x, vec e) {
  const vec zero{}, size = x < zero ? -x : x;
  const vec t = inverse(size * 0.23164189f + 1.0f);
  vec p = t * 0.5307027145f - 0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  return p * t * e;
}

// x Phi(x), the exact one.
static inline vec vgelu(vec x) {
  const vec zero{}, tail = x * normal_tail(x, vexp(x * x * -0.5f));
  return x >= zero ? x - tail : tail;
}

static inline vec activated(vec x, int act) {
  const vec zero{};
  if (act == GELU) return vgelu(x);
  if (act == SILU) return x * inverse(vexp(least(zero - x, splat(80.0f))) + 1.0f);
  if (act == RELU) return x < zero ? zero : x;
  if (act == MISH) {  // x tanh(log(1 + e^x))
    const vec e = vexp(least(x, splat(20.0f))), s = e * (e + 2.0f);
    return x * s * inverse(s + 2.0f);
  }
  return x;
}

}  // namespace floyd
