// Runs the product in bfloat16 with operands and results in heap buffers of exactly the right size, against a plain
// loop in double. Built with the sanitizers by tests/backends/test_sanitizers.py; rounds.h has its arguments.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/include/api.h"
#include "rounds.h"

namespace {

float value_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// An operand of random bfloat16 values, by lines or by depths, with a gap behind each but the last.
struct Made {
  std::vector<uint16_t> narrow;
  std::vector<float> wide;
  ck::Operand operand;

  Made(int64_t lines, int64_t depth, unsigned kind, std::mt19937& random) {
    const bool by_lines = (kind & 1) != 0, is_wide = (kind & 2) != 0;
    const int64_t outer = by_lines ? depth : lines, inner = by_lines ? lines : depth;
    const int64_t stride = inner + ((kind & 4) != 0 ? 3 : 0), size = (outer - 1) * stride + inner;
    narrow.resize(size);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (uint16_t& bits : narrow) {
      const float drawn = uniform(random);
      uint32_t all;
      std::memcpy(&all, &drawn, sizeof all);
      bits = static_cast<uint16_t>(all >> 16);
    }
    if (is_wide) {
      for (const uint16_t bits : narrow) wide.push_back(value_of(bits));
      wide.shrink_to_fit();
    }
    operand.data = is_wide ? static_cast<const void*>(wide.data()) : narrow.data();
    operand.dtype = is_wide ? ck::Dtype::kFloat32 : ck::Dtype::kBFloat16;
    operand.line_stride = by_lines ? 1 : stride, operand.depth_stride = by_lines ? stride : 1;
  }

  double at(int64_t line, int64_t k) const {
    return value_of(narrow[line * operand.line_stride + k * operand.depth_stride]);
  }
};

// Entries of x, and what they add to each of its elements; some lie outside.
struct MadeEntries {
  std::vector<float> values;
  std::vector<int64_t> places;
  std::vector<double> all;
  ck::Entries entries;

  MadeEntries(int64_t rows, int64_t depth, unsigned kind, std::mt19937& random) : all(rows * depth) {
    entries.turned = (kind & 1) != 0;
    const int64_t count = entries.turned ? depth : rows, last = entries.turned ? rows : depth;
    entries.offset = static_cast<int64_t>(random() % 5) - 2;
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (int64_t e = 0; e < count; ++e) {
      values.push_back(uniform(random));
      if ((kind & 2) != 0) places.push_back(static_cast<int64_t>(random() % (last + 2)) - 1);
      const int64_t at = (kind & 2) != 0 ? places[e] : e + entries.offset;
      if (at >= 0 && at < last) all[entries.turned ? at * depth + e : e * depth + at] += values[e];
    }
    values.shrink_to_fit(), places.shrink_to_fit();
    entries.values = values.data(), entries.places = (kind & 2) != 0 ? places.data() : nullptr;
  }
};

void run_case(int64_t rows, int64_t depth, int64_t cols, unsigned kinds, std::mt19937& random) {
  const Made x(rows, depth, kinds & 7, random), y(cols, depth, kinds >> 3 & 7, random);
  ck::Product p;
  p.x = x.operand, p.y = y.operand, p.rows = rows, p.cols = cols, p.depth = depth, p.stride = cols + kinds % 2;
  p.add = (kinds & 64) != 0, p.threads = static_cast<int>(random() % 3 + 1);
  const MadeEntries made(rows, depth, static_cast<unsigned>(random()), random);
  const bool neighbours = p.y.line_stride == 1 && p.y.dtype == ck::Dtype::kBFloat16;
  if (neighbours && random() % 2) p.entries = made.entries;
  std::vector<float> out((rows - 1) * p.stride + cols, 0.5f);
  std::vector<uint16_t> rounded(p.add || random() % 2 ? 0 : out.size());
  p.out = out.data();
  if (!rounded.empty()) p.out = rounded.data(), p.out_dtype = ck::Dtype::kBFloat16;
  ck::multiply_bfloat16(p);
  const double unit = rounded.empty() ? 0.0 : 4e-3;
  for (size_t k = 0; k < rounded.size(); ++k) out[k] = value_of(rounded[k]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      double sum = p.add ? 0.5 : 0.0;
      for (int64_t k = 0; k < depth; ++k)
        sum += (x.at(i, k) + (p.entries.values ? made.all[i * depth + k] : 0.0)) * y.at(j, k);
      const double bound = 1e-6 * std::sqrt(depth) * (depth + 1.0) + unit * std::fabs(sum);
      if (std::fabs(out[i * p.stride + j] - sum) <= bound) continue;
      std::printf("%lld x %lld x %lld, kinds %u: [%lld, %lld] is %g, expected %g\n", static_cast<long long>(rows),
                  static_cast<long long>(depth), static_cast<long long>(cols), kinds, static_cast<long long>(i),
                  static_cast<long long>(j), out[i * p.stride + j], sum);
      std::exit(1);
    }
}

int64_t run_products(unsigned seed) {
  std::mt19937 random(seed);
  int64_t products = 0;
  for (const int64_t rows : {1, 13, 14, 15, 29, 1075})
    for (const int64_t depth : {1, 2, 31, 33, 1025})
      for (const int64_t cols : {1, 31, 32, 33, 515})
        for (unsigned kinds = 0; kinds < 128; ++kinds) {
          const bool large = rows * depth * cols > 20000;
          if ((kinds + rows + cols + seed) % (options.every * (large ? 16 : 1)) != 0) continue;
          run_case(rows, depth, cols, kinds, random);
          ++products;
        }
  return products;
}

}  // namespace

int main(int argc, char** argv) {
  read_options(argc, argv);
  if (!ck::multiplies_bfloat16()) {
    std::printf("avx512bf16: not on this machine\n");
    return 0;
  }
  const int64_t products = run_rounds(run_products);
  std::printf("avx512bf16: %lld products are right\n", static_cast<long long>(products));
  return 0;
}
