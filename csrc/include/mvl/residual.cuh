// y = residual + gamma * (x + bias), alone and with the LayerNorm behind it. x, residual: [rows, cols]; the rest: [cols].
//
// With the norm, a row belongs to a team of lanes, one pack of columns each. What a lane does stands in phases between
// sums over the team, so that the CPU runs the same code, lane after lane. Statistics are fp32 and are taken of y as it
// is stored, as a norm that reads y back would.
#pragma once

#include <vector>

#include "mvl/sweep.cuh"

namespace mvl {

template <class Format>
struct ScaleResidual {
  using T = Format;
  struct Columns {
    Floats<T> bias, gamma;
  };
  static constexpr int kSums = 0;
  const T* x;
  const T* bias;
  const T* gamma;
  const T* residual;
  T* out;

  MVL_BODY Columns columns(int64_t col) const { return {load_floats(bias + col), load_floats(gamma + col)}; }

  MVL_BODY void row(const Columns& at, int64_t offset, float (*)[kWidth<T>]) const {
    const Floats<T> branch = load_floats(x + offset);
    Floats<T> y = load_floats(residual + offset);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) y.value[i] += at.gamma.value[i] * (branch.value[i] + at.bias.value[i]);
    store(out + offset, pack<T>(y));
  }
};

// Sums: gradients of bias and gamma. The gradient of the residual is that of y.
template <class Format>
struct ScaleResidualBackward {
  using T = Format;
  struct Columns {
    Floats<T> bias, gamma;
  };
  static constexpr int kSums = 2;
  const T* grad;
  const T* x;
  const T* bias;
  const T* gamma;
  T* grad_x;

  MVL_BODY Columns columns(int64_t col) const { return {load_floats(bias + col), load_floats(gamma + col)}; }

  MVL_BODY void row(const Columns& at, int64_t offset, float (*sums)[kWidth<T>]) const {
    Floats<T> g = load_floats(grad + offset);
    const Floats<T> branch = load_floats(x + offset);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      sums[1][i] += g.value[i] * (branch.value[i] + at.bias.value[i]);
      g.value[i] *= at.gamma.value[i];
      sums[0][i] += g.value[i];
    }
    store(grad_x + offset, pack<T>(g));
  }
};

// --- with the norm

constexpr int kMostLanes = 384;  // packs of a row: cols of bf16 up to 3072, of fp32 up to 1536
constexpr int kNormForwardTeams = 1056;  // 8 for each of a Hopper GPU's 132 multiprocessors
constexpr int kNormBackwardTeams = 396;  // 3; each leaves four rows of partial sums

MVL_BODY int64_t norm_backward_chunks(int64_t rows) { return smaller(rows, kNormBackwardTeams); }

// fp32 values of the partial sums of the backward pass.
MVL_BODY int64_t norm_partials(int64_t rows, int64_t cols) { return 4 * norm_backward_chunks(rows) * cols; }

struct Pair {
  float first, second;
};

// A lane's part of the forward pass. Phases: read, [sum] centre, [sum] write.
template <class Format>
struct ScaleResidualNorm {
  using T = Format;
  const T* x;
  const T* bias;
  const T* gamma;
  const T* residual;
  const T* weight;
  const T* shift;
  T* y;
  T* normed;
  float* mean;
  float* rstd;
  float eps;

  struct Columns {
    Floats<T> bias, gamma, weight, shift;
  };
  struct Row {
    Pack<T> branch, residual;
  };

  MVL_BODY Columns columns(int64_t col) const {
    return {load_floats(bias + col), load_floats(gamma + col), load_floats(weight + col), load_floats(shift + col)};
  }

  MVL_BODY Row read(int64_t offset) const { return {load(x + offset), load(residual + offset)}; }

  // Stores y and keeps it in `values`; its sum.
  MVL_BODY float sum(const Columns& at, const Row& row, int64_t offset, Floats<T>& values) const {
    const Floats<T> branch = unpack(row.branch);
    values = unpack(row.residual);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) values.value[i] += at.gamma.value[i] * (branch.value[i] + at.bias.value[i]);
    const Pack<T> rounded = pack<T>(values);
    store(y + offset, rounded);
    values = unpack(rounded);
    float total = 0.0f;
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) total += values.value[i];
    return total;
  }

  // Takes the mean off `values`; sum of their squares.
  MVL_BODY static float centre(float row_mean, Floats<T>& values) {
    float total = 0.0f;
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      values.value[i] -= row_mean;
      total += values.value[i] * values.value[i];
    }
    return total;
  }

  MVL_BODY void write(const Columns& at, int64_t offset, float scale, Floats<T>& values) const {
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      values.value[i] = values.value[i] * scale * at.weight.value[i] + at.shift.value[i];
    }
    store(normed + offset, pack<T>(values));
  }

  MVL_BODY void statistics(int64_t row, float row_mean, float scale) const {
    mean[row] = row_mean;
    rstd[row] = scale;
  }
};

// A lane's part of the backward pass. Sums over rows: gradients of bias, gamma, weight, shift.
template <class Format>
struct ScaleResidualNormBackward {
  using T = Format;
  static constexpr int kSums = 4;
  const T* grad_y;
  const T* grad_normed;
  const T* x;
  const T* bias;
  const T* gamma;
  const T* weight;
  const T* y;
  const float* mean;
  const float* rstd;
  T* grad_x;
  T* grad_residual;

  struct Columns {
    Floats<T> bias, gamma, weight;
  };
  struct Row {
    Pack<T> grad_y, grad_normed, branch, y;
    float mean, rstd;
  };
  struct Values {
    Floats<T> slope, standard;  // gradient of the standardised row, and the row
  };

  MVL_BODY Columns columns(int64_t col) const {
    return {load_floats(bias + col), load_floats(gamma + col), load_floats(weight + col)};
  }

  MVL_BODY Row read(int64_t row, int64_t offset) const {
    return {load(grad_y + offset), load(grad_normed + offset), load(x + offset), load(y + offset), mean[row], rstd[row]};
  }

  // Sums over the row of the slope, and of the slope times the standardised row.
  MVL_BODY Pair sum(const Columns& at, const Row& row, Values& values, float (*sums)[kWidth<T>]) const {
    Pair total{0.0f, 0.0f};
    const Floats<T> grad = unpack(row.grad_normed);
    values.standard = unpack(row.y);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      values.standard.value[i] = (values.standard.value[i] - row.mean) * row.rstd;
      values.slope.value[i] = grad.value[i] * at.weight.value[i];
      total.first += values.slope.value[i];
      total.second += values.slope.value[i] * values.standard.value[i];
      sums[2][i] += grad.value[i] * values.standard.value[i];
      sums[3][i] += grad.value[i];
    }
    return total;
  }

  // means: of the two sums over the row.
  MVL_BODY void write(
      const Columns& at, const Row& row, int64_t offset, Pair means, const Values& values,
      float (*sums)[kWidth<T>]) const {
    Floats<T> grad = unpack(row.grad_y), scaled;
    const Floats<T> branch = unpack(row.branch);
    MVL_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      grad.value[i] += row.rstd * (values.slope.value[i] - means.first - values.standard.value[i] * means.second);
      scaled.value[i] = grad.value[i] * at.gamma.value[i];
      sums[0][i] += scaled.value[i];
      sums[1][i] += grad.value[i] * (branch.value[i] + at.bias.value[i]);
    }
    store(grad_residual + offset, pack<T>(grad));
    store(grad_x + offset, pack<T>(scaled));
  }
};

MVL_BODY float inverse_root(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

// --- on the CPU: lane after lane

template <class T>
void host_scale_residual_norm(const ScaleResidualNorm<T>& body, int64_t rows, int64_t cols) {
  constexpr int width = kWidth<T>;
  std::vector<Floats<T>> values(cols / width);
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0.0, squares = 0.0;
    for (int64_t col = 0; col < cols; col += width) {
      const int64_t offset = row * cols + col;
      total += body.sum(body.columns(col), body.read(offset), offset, values[col / width]);
    }
    const float mean = static_cast<float>(total / cols);
    for (auto& lane : values) squares += body.centre(mean, lane);
    const float scale = inverse_root(static_cast<float>(squares / cols) + body.eps);
    for (int64_t col = 0; col < cols; col += width) {
      body.write(body.columns(col), row * cols + col, scale, values[col / width]);
    }
    body.statistics(row, mean, scale);
  }
}

// totals: gradients of bias, gamma, weight, shift.
template <class T>
void host_scale_residual_norm_backward(
    const ScaleResidualNormBackward<T>& body, int64_t rows, int64_t cols, T* const* totals) {
  constexpr int width = kWidth<T>;
  std::vector<typename ScaleResidualNormBackward<T>::Values> values(cols / width);
  std::vector<double> sums_of(4 * cols, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    double first = 0.0, second = 0.0;
    const auto add = [&](int64_t col, const float (*sums)[width]) {
      for (int s = 0; s < 4; ++s) {
        for (int i = 0; i < width; ++i) sums_of[s * cols + col + i] += sums[s][i];
      }
    };
    for (int64_t col = 0; col < cols; col += width) {
      float sums[4][width] = {};
      const Pair part = body.sum(body.columns(col), body.read(row, row * cols + col), values[col / width], sums);
      first += part.first;
      second += part.second;
      add(col, sums);
    }
    const Pair means{static_cast<float>(first / cols), static_cast<float>(second / cols)};
    for (int64_t col = 0; col < cols; col += width) {
      float sums[4][width] = {};
      const int64_t offset = row * cols + col;
      body.write(body.columns(col), body.read(row, offset), offset, means, values[col / width], sums);
      add(col, sums);
    }
  }
  for (int s = 0; s < 4; ++s) {
    for (int64_t col = 0; col < cols; ++col) totals[s][col] = from_float<T>(static_cast<float>(sums_of[s * cols + col]));
  }
}

}  // namespace mvl
