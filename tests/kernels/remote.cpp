/* remote.cpp - answers calls of zo_cpu_perturb that arrive on standard input, so that a build for another processor,
 * run by an emulator, can be tested from this one; test_portable.py compiles it.
 *
 * A call: int64 n; the bytes (int64) of tags, coefficients, `first`, decays and roundings (of one pass, the last three
 * are empty); zo_pass; those five arrays; then for each tensor zo_tensor, int64 bytes of weights, of mask, of scales,
 * of rows, of left and of right, and those bytes. Where a pointer of zo_tensor is not null, it stands for the bytes
 * that follow; src == dst is an in-place pass. The answer: int64 code, 1 if anything was written outside the weights,
 * and the weights written.
 *
 * Belongs here: transport. Does not belong here: expected values.
 */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "zo_kernels.h"

namespace {

const size_t GUARD = 64;
const uint8_t FILL = 0xA5;
const int OTHERS = 5; /* arrays of a tensor that are read only */

void take(void *p, size_t bytes) {
  if (bytes && std::fread(p, 1, bytes, stdin) != bytes) std::exit(0);
}

void give(const void *p, size_t bytes) { std::fwrite(p, 1, bytes, stdout); }

struct Guarded {
  std::vector<uint8_t> all;
  size_t bytes;

  explicit Guarded(size_t bytes) : all(bytes + 2 * GUARD, FILL), bytes(bytes) {}
  uint8_t *data() { return all.data() + GUARD; }
  bool broken() const {
    for (size_t k = 0; k < GUARD; ++k) {
      if (all[k] != FILL || all[GUARD + bytes + k] != FILL) return true;
    }
    return false;
  }
};

} // namespace

int main() {
  for (;;) {
    int64_t n, bytes_of[5];
    zo_pass pass;
    take(&n, sizeof n), take(bytes_of, sizeof bytes_of), take(&pass, sizeof pass);
    std::vector<uint8_t> arrays[5];
    for (int k = 0; k < 5; ++k) {
      arrays[k].resize((size_t)bytes_of[k]);
      take(arrays[k].data(), arrays[k].size());
    }
    pass.n_terms = bytes_of[0] / 8;
    pass.tags = pass.n_terms ? reinterpret_cast<const int64_t *>(arrays[0].data()) : nullptr;
    pass.coefs = pass.n_terms ? reinterpret_cast<const float *>(arrays[1].data()) : nullptr;
    pass.first = bytes_of[2] ? reinterpret_cast<const int64_t *>(arrays[2].data()) : nullptr;
    pass.decays = reinterpret_cast<const float *>(arrays[3].data());
    pass.roundings = arrays[4].data();

    std::vector<zo_tensor> tensors((size_t)n);
    std::vector<Guarded> sources, targets;
    std::vector<std::vector<uint8_t>> others;
    for (zo_tensor &t : tensors) {
      int64_t bytes[1 + OTHERS];
      take(&t, sizeof t), take(bytes, sizeof bytes);
      const bool in_place = t.src == t.dst;
      sources.emplace_back((size_t)bytes[0]);
      take(sources.back().data(), (size_t)bytes[0]);
      targets.emplace_back(in_place ? 0 : (size_t)bytes[0]);
      for (int k = 1; k <= OTHERS; ++k) {
        others.emplace_back((size_t)bytes[k]);
        take(others.back().data(), (size_t)bytes[k]);
      }
    }
    for (size_t k = 0; k < tensors.size(); ++k) {
      zo_tensor &t = tensors[k];
      const bool in_place = t.src == t.dst;
      t.src = sources[k].data(), t.dst = in_place ? sources[k].data() : targets[k].data();
      const std::vector<uint8_t> *const other = others.data() + OTHERS * k;
      if (t.mask) t.mask = other[0].data();
      if (t.scale) t.scale = reinterpret_cast<const float *>(other[1].data());
      if (t.rows) t.rows = reinterpret_cast<const int64_t *>(other[2].data());
      if (t.left) t.left = reinterpret_cast<const float *>(other[3].data());
      if (t.right) t.right = reinterpret_cast<const float *>(other[4].data());
    }
    const int64_t code = zo_cpu_perturb(&pass, tensors.data(), n, 2, 0);
    int64_t broken = 0;
    for (size_t k = 0; k < tensors.size(); ++k) broken |= sources[k].broken() || targets[k].broken();
    give(&code, 8), give(&broken, 8);
    for (size_t k = 0; k < tensors.size(); ++k) give(tensors[k].dst, sources[k].bytes);
    std::fflush(stdout);
  }
}
