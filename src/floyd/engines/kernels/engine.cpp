// One step of a UNet on the CPU, in float32, as a list of operations: no allocation, no dispatch, no copies of layouts.
//
//     c++ -std=c++17 -O3 -march=native -fopenmp -fPIC -shared engine.cpp -o engine.so
//
// floyd/engines/native.py does this on first use and keeps the result.
#include <chrono>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace floyd {
static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}
}  // namespace floyd

#include "attention.h"
#include "learn.h"
#include "norm.h"
#include "winograd.h"

using namespace floyd;

static void linear(const Op& op, int threads) {
  Epilogue end;
  end.bias = op.bias, end.add = op.add, end.add_stride = op.out_channels, end.alpha = op.alpha;
  gemm(op.batch * op.height * op.width, op.out_channels, op.channels, op.x, op.channels, op.weight, op.out,
       op.out_channels, end, threads);
}

static void perform(const Op& op, float* work, int threads) {
  switch (op.kind) {
    case FROM_NCHW: return from_nchw(op);
    case TO_NCHW: return to_nchw(op);
    case CONV3: return conv3(op, work, threads);
    case CONV: return conv(op, work, threads);
    case NORM: return norm(op, work, threads);
    case LINEAR: return linear(op, threads);
    case POOL: return pool(op, threads);
    case ATTENTION: return attention(op, work, threads);
    case LAYER_NORM: return layer_norm(op, threads);
    case GEGLU: return geglu(op, threads);
  }
}

extern "C" {

int32_t floyd_lanes() { return LANES; }

int32_t floyd_has_threads() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int64_t floyd_op_bytes() { return sizeof(Op); }

// How many floats of scratch an operation needs.
int64_t floyd_work(const Op* op, int32_t threads) {
  switch (op->kind) {
    case CONV3: return conv3_work(*op, threads);
    case CONV: return conv_rows(*op) * op->kernel * op->kernel * op->channels * threads;
    case NORM: return norm_work(*op);
    case ATTENTION: return attention_work(*op, threads);
    default: return 0;
  }
}

// `seconds`, if given, receives what each operation took.
void floyd_run(const Op* ops, int64_t count, float* work, int32_t threads, double* seconds) {
  using clock = std::chrono::steady_clock;
  for (int64_t i = 0; i < count; i++) {
    const auto begin = clock::now();
    perform(ops[i], work, threads);
    if (seconds) seconds[i] = std::chrono::duration<double>(clock::now() - begin).count();
  }
}

void floyd_pack_conv3(const float* weight, int64_t out_stride, int64_t in_stride, int64_t tap_stride, int64_t outs,
                      int64_t ins, const int32_t* place, int64_t channels, int64_t out_channels, float factor,
                      int64_t tile, float* packed, int32_t threads) {
  const auto pack = tile == Two::OUT ? pack_conv3<Two> : pack_conv3<Four>;
  pack({weight, out_stride, in_stride, tap_stride}, outs, ins, place, channels, out_channels, factor, packed, threads);
}

int64_t floyd_norm_bytes() { return sizeof(Norm); }

void floyd_norm_forth(const Norm* norm, int32_t threads) {
  by_kind(*norm, [&](auto kind, auto act) { norm_forth<decltype(kind), act>(*norm, threads); });
}

void floyd_norm_back(const Norm* norm, const void* grad, void* dx, float* dweight, float* dbias, int32_t threads) {
  by_kind(*norm, [&](auto kind, auto act) {
    norm_back<decltype(kind), act>(*norm, grad, dx, dweight, dbias, threads);
  });
}
}
