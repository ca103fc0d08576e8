// What Python hands over: a step of the network as a list of these, mirrored field by field in native.py.
//
// Activations are [batch, height, width, channels] float32 with channels padded to a multiple of 16; what is padded is 0.
#pragma once
#include <cstdint>

namespace floyd {

enum Kind { FROM_NCHW, TO_NCHW, CONV3, CONV, NORM, LINEAR, POOL, ATTENTION, LAYER_NORM, GEGLU };

struct Op {
  int64_t kind;
  const float *x, *x2;           // read; x2: channels that stand behind those of x
  const float *weight, *bias;    // packed as weights.py does
  const float *add;              // added to the result, times alpha
  const float *scale, *shift;    // of a norm, per image, on top of weight and bias
  const float *text_k, *text_v;  // [batch, text, channels]
  const float *text_bias;        // [batch, text], added to the scores
  const int32_t *rows, *columns;  // of x, read for each of the height and width that the kernel slides over; null: itself
  const int32_t *groups;         // of each channel, -1: padding
  float *out;
  int64_t batch, height, width;  // of the result
  int64_t x_height, x_width;     // of x
  int64_t channels, channels2;   // of x, x2
  int64_t out_channels;
  int64_t bias_stride, film_stride;  // from image to image
  int64_t add_is_halved;         // `add` has half the height and width: each of its pixels is read four times
  int64_t is_doubled;            // rows and columns repeat every pixel twice
  int64_t pools;                 // the result is the mean of 2 x 2
  int64_t num_groups, act;
  int64_t tile;                  // the side that Winograd's products give: 2 or 4
  int64_t kernel, stride, padding;
  int64_t heads, head_width, text, looks_at_pixels;
  float eps, alpha, factor;
};

}  // namespace floyd
