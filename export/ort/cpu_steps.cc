// What single ops do between the launches of their kernels, as loops: cuda_steps.py has the same for GPUs.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu.h"

namespace fastattn {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int32_t kNotThere = 127 << 24;  // on a cluster's number: farther away than anything

// in their order, so that the same parts give the same bits
template <class T>
void sum_row(const T* parts, int64_t n_parts, int64_t size, int64_t part_size, T* total) {
  std::fill(total, total + size, T(0));
  for (int64_t part = 0; part < n_parts; ++part)
    for (int64_t i = 0; i < size; ++i) total[i] += parts[part * part_size + i];
}

}  // namespace

void CpuDevice::sum_parts(Type type, const void* parts, int64_t rows, int64_t n_parts, int64_t size, int64_t part_size,
                          void* total) {
  parallel(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * n_parts * part_size;
      if (type == Type::int32)
        sum_row((const int32_t*)parts + first, n_parts, size, part_size, (int32_t*)total + row * size);
      else
        sum_row((const float*)parts + first, n_parts, size, part_size, (float*)total + row * size);
    }
  });
}

void CpuDevice::fold(const float* outs, const float* lses, int64_t rows, int64_t n_parts, int64_t n_queries,
                     int64_t dim, float* out, float* lse) {
  parallel(rows * n_queries, 16, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at / n_queries * n_parts * n_queries + at % n_queries;
      float most = kMinusInfinity, total = 0;
      for (int64_t part = 0; part < n_parts; ++part) most = std::max(most, lses[first + part * n_queries]);
      float* sum = out + at * dim;
      std::fill(sum, sum + dim, 0.0f);
      for (int64_t part = 0; part < n_parts; ++part) {
        const float own = lses[first + part * n_queries];
        const float weight = own == kMinusInfinity ? 0 : std::exp(own - most);
        total += weight;
        const float* mine = outs + (first + part * n_queries) * dim;
        if (weight != 0)
          for (int64_t d = 0; d < dim; ++d) sum[d] += weight * mine[d];
      }
      if (total != 0)
        for (int64_t d = 0; d < dim; ++d) sum[d] /= total;
      lse[at] = total != 0 ? most + std::log(total) : kMinusInfinity;
    }
  });
}

void CpuDevice::largest(const float* numbers, int64_t rows, int64_t n, int64_t k, int32_t* places) {
  parallel(rows, 4, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> chosen(n);
    for (int64_t row = begin; row < end; ++row) {
      const float* mine = numbers + row * n;
      const auto key = [&](int32_t at) { return mine[at] == mine[at] ? mine[at] : kMinusInfinity; };
      const auto before = [&](int32_t a, int32_t b) { return key(a) > key(b) || (key(a) == key(b) && a < b); };
      std::iota(chosen.begin(), chosen.end(), 0);
      if (k < n) std::nth_element(chosen.begin(), chosen.begin() + k, chosen.end(), before);
      std::copy(chosen.begin(), chosen.begin() + k, places + row * k);
    }
  });
}

void CpuDevice::listed_keys(const int32_t* places, const int32_t* groups, const float* logits, int64_t queries,
                            int64_t k, int64_t n_groups, int64_t group_size, int32_t* keys) {
  parallel(queries, 64, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * k; at < end * k; ++at) {
      const int64_t first = at / k * n_groups, place = places[at];
      const bool is_key = logits[first * group_size + place] > kMinusInfinity;
      keys[at] = is_key ? (int32_t)(groups[first + place / group_size] * group_size + place % group_size) : -1;
    }
  });
}

void CpuDevice::first_centroids(const int64_t* codes, const int32_t* initial, int64_t rows, int64_t length,
                                int64_t n_clusters, int32_t* centroids, int32_t* ranks) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < n_clusters; ++c) {
      const int32_t first = initial[row * n_clusters + c];
      const bool exists = first >= 0 && first < length;
      const int64_t code = codes[row * length + (exists ? first : 0)];
      ranks[row * n_clusters + c] = (int32_t)c + (exists ? 0 : kNotThere);
      centroids[row * 2 * n_clusters + c] = (int32_t)code;
      centroids[(row * 2 + 1) * n_clusters + c] = (int32_t)(code >> 32);
    }
}

void CpuDevice::sort_by_cluster(const int32_t* clusters, int64_t rows, int64_t length, int64_t n_clusters,
                                int32_t* order, int32_t* offsets) {
  parallel(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* mine = clusters + row * length;
      std::vector<int32_t> next(n_clusters + 1, 0);  // of none the last
      const auto number = [&](int64_t at) { return mine[at] < 0 ? n_clusters : mine[at]; };
      for (int64_t at = 0; at < length; ++at) ++next[number(at)];
      int32_t sum = 0;
      for (int64_t c = 0; c <= n_clusters; ++c) {
        offsets[row * (n_clusters + 1) + c] = sum;
        sum += std::exchange(next[c], sum);
      }
      for (int64_t at = 0; at < length; ++at) order[row * length + next[number(at)]++] = (int32_t)at;
    }
  });
}

}  // namespace fastattn
