// softmax(q k^T / sqrt(K)) v of pixels that look at a text, at each other, or at both at once.
#pragma once
#include "gemm.h"
#include "op.h"

namespace floyd {

struct Looking {
  int64_t pixels, keys, padded;  // padded: to whole panels
  int64_t inner, stride;         // of all heads together; from a pixel's row of q (k, v) to the next
  int64_t queries, blocks;       // whose scores stay in the cache
  int64_t packed;                // of one head: keys as panels, then values as rows
  explicit Looking(const Op& op) {
    pixels = op.height * op.width, keys = op.text + (op.looks_at_pixels ? pixels : 0);
    padded = (keys + PANEL - 1) / PANEL * PANEL;
    inner = op.heads * op.head_width, stride = op.looks_at_pixels ? 3 * inner : inner;
    queries = std::max<int64_t>(ROWS, std::min<int64_t>(4 * ROWS, (int64_t{1} << 17) / padded / ROWS * ROWS));
    blocks = (pixels + queries - 1) / queries;
    packed = (padded + keys) * op.head_width;
  }
};

static inline int64_t attention_work(const Op& op, int threads) {
  const Looking at(op);
  return op.batch * op.heads * at.packed + threads * at.queries * at.padded;
}

static inline void pack_head(const Op& op, const Looking& at, int64_t image, int64_t head, float* packed) {
  const int64_t width = op.head_width;
  float* values = packed + at.padded * width;
  std::fill(packed + (at.padded - PANEL) * width, values, 0.0f);
  for (int64_t i = 0; i < at.keys; i++) {
    const bool is_text = i < op.text;
    const int64_t token = (image * op.text + i) * at.inner + head * width;
    const float* row = op.x + (image * at.pixels + i - op.text) * at.stride + head * width;
    const float *key = is_text ? op.text_k + token : row + at.inner, *value = is_text ? op.text_v + token : row + 2 * at.inner;
    float* to = packed + i / PANEL * PANEL * width + i % PANEL;
    for (int64_t k = 0; k < width; k++) to[k * PANEL] = key[k];
    std::memcpy(values + i * width, value, width * sizeof(float));
  }
}

// Scores to weights, in place; returns what their sum has to be divided by.
static inline float softmax(float* score, int64_t keys, int64_t padded, float factor, const float* bias, int64_t text) {
  for (int64_t i = keys; i < padded; i++) score[i] = -INFINITY;
  for (int64_t i = 0; bias && i < text; i++) score[i] += bias[i] / factor;
  vec top = splat(-INFINITY), sum{};
  for (int64_t i = 0; i < padded; i += LANES) top = most(load(score + i), top);
  const float highest_score = highest(top);
  for (int64_t i = 0; i < padded; i += LANES) {
    const vec below = load(score + i) - highest_score, weight = vexp(below * factor);
    const vec kept = below * factor < splat(-87.0f) ? vec{} : weight;
    store(score + i, kept);
    sum += kept;
  }
  return total(sum);
}

static inline void attention(const Op& op, float* work, int threads) {
  const Looking at(op);
  const int64_t heads = op.batch * op.heads, width = op.head_width;
  float* scores = work + heads * at.packed;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads; i++) pack_head(op, at, i / op.heads, i % op.heads, work + i * at.packed);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads; i++)
    for (int64_t block = 0; block < at.blocks; block++) {
      const int64_t image = i / op.heads, first = block * at.queries, count = std::min(at.queries, at.pixels - first);
      const float *keys = work + i * at.packed, *values = keys + at.padded * width;
      float* score = scores + thread_number() * at.queries * at.padded;
      const int64_t row = image * at.pixels + first, offset = i % op.heads * width;
      for (int64_t k = 0; k < at.padded; k += PANEL)
        panel(count, op.x + row * at.stride + offset, at.stride, keys + k * width, PANEL, score + k, at.padded, width, PANEL,
              Epilogue());
      float* out = op.out + row * at.inner + offset;
      float share[4 * ROWS];
      const float* bias = op.text_bias ? op.text_bias + image * op.text : nullptr;
      for (int64_t q = 0; q < count; q++)
        share[q] = 1 / softmax(score + q * at.padded, at.keys, at.padded, op.factor, bias, op.text);
      for (int64_t k = 0; k < width; k += PANEL)
        panel(count, score, at.padded, values + k, width, out + k, at.inner, at.keys, std::min<int64_t>(PANEL, width - k),
              Epilogue());
      for (int64_t q = 0; q < count; q++)
        for (int64_t k = 0; k < width; k += LANES) store(out + q * at.inner + k, load(out + q * at.inner + k) * share[q]);
    }
}

}  // namespace floyd
