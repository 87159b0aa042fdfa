/* sanitize.cpp - runs the CPU kernels over odd sizes in exactly sized allocations; compiled with sanitizers by
 * test_cpu.py.
 *
 * Belongs here: calls whose every out-of-range access a sanitizer would see. Does not belong here: expected values (the
 * Python tests have them); the kernels are only compared with each other.
 */
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "zo_kernels.h"

namespace {

const int64_t SIZES[] = {0, 1, 7, 8, 15, 17, 31, 33, 127, 129, 255, 257, 2047, 2049, 4097};
const int64_t OFFSETS[] = {0, 8, 37, ((int64_t)1 << 36) - 129};

/* malloc'ed to the byte, filled with a repeating pattern of finite weights. */
struct Buffer {
  explicit Buffer(size_t size) : bytes(size), data(static_cast<uint8_t *>(std::malloc(size ? size : 1))) {
    for (size_t k = 0; k < size; ++k) data[k] = (uint8_t)(k * 37 % 59);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer &) = delete;
  size_t bytes;
  uint8_t *data;
};

const int RULES[][2] = {{ZO_MOMENTUM, ZO_F32}, {ZO_MOMENTUM, ZO_BF16}, {ZO_ADAM, ZO_F32},
                        {ZO_ADAM, ZO_BF16},    {ZO_HIZOO, ZO_F32},     {ZO_ADAM_HISTORY, ZO_F32}};

std::atomic<int> runs{0};
int widest = zo_cpu_best_isa(); /* of the instruction sets that are run */

int check(int dtype, int kind, int rounding, int64_t n, int64_t offset, int features, int threads) {
  const size_t size = dtype == ZO_F32 ? 4 : 2;
  const int64_t block = 5, row_len = 7;
  /* Factors of a matrix that has just enough rows for the tensor, or for its row numbers. */
  const int64_t rank = features & 64 ? 3 : 0, cols = features & 16 ? row_len : 24;
  const int64_t matrix_rows = features & 16 ? 11 : n ? (n - 1 + offset % 96) / cols + 1 : 0;
  if (rank && !(features & 16)) offset %= 96;
  Buffer left(4 * (size_t)(matrix_rows * rank)), right(4 * (size_t)(cols * rank));
  Buffer mask((size_t)(n + 7) / 8), scale(4 * (size_t)((offset + n - 1) / block - offset / block + 1));
  Buffer rows(8 * (size_t)((n + row_len - 1) / row_len));
  for (size_t k = 0; 8 * k < rows.bytes; ++k) {
    const int64_t row = (int64_t)(k * 1000003 % 11);
    std::memcpy(rows.data + 8 * k, &row, 8);
  }
  std::vector<uint8_t> expected;
  for (int isa = 1; isa <= widest; ++isa) {
    Buffer src(size * (size_t)n), dst(size * (size_t)n);
    zo_tensor t = {};
    t.src = src.data, t.dst = features & 1 ? dst.data : src.data;
    t.numel = n, t.offset = offset, t.scale_block = 1, t.stream = 5;
    if (features & 2) t.mask = mask.data;
    if (features & 4) t.scale = reinterpret_cast<const float *>(scale.data), t.scale_block = block;
    if (features & 8) t.keep = 1u << 31;
    if (features & 16)
      t.rows = reinterpret_cast<const int64_t *>(rows.data), t.row_len = row_len, t.offset = 0, t.scale = nullptr;
    if (rank) {
      t.rank = (uint16_t)rank, t.cols = cols;
      t.left = reinterpret_cast<const float *>(left.data), t.right = reinterpret_cast<const float *>(right.data);
    }
    t.rsqrt = features & 128 ? 1 : 0;
    zo_pass p = {};
    p.seed = 42, p.dtype = dtype, p.kind = kind, p.rounding = rounding, p.n_terms = rank ? 1 : 3;
    p.inline_tags[1] = 1, p.inline_tags[2] = 2;
    p.inline_coefs[0] = 1e-3f, p.inline_coefs[1] = -2.0f, p.inline_coefs[2] = 0.5f;
    const int64_t tags[] = {0, 1, 2}, first[] = {0, 1, 1, 3};
    const float decays[] = {1, 0.5f, 1};
    const uint8_t roundings[] = {(uint8_t)rounding, ZO_NEAREST, (uint8_t)rounding};
    if (features & 32) {
      p.tags = tags, p.coefs = p.inline_coefs;
      p.n_passes = 3, p.first = first, p.decays = decays, p.roundings = roundings;
    }
    const int code = zo_cpu_perturb(&p, &t, 1, threads, isa);
    const uint8_t *out = static_cast<const uint8_t *>(t.dst);
    if (isa == 1) expected.assign(out, out + size * (size_t)n);
    if (code || (n && std::memcmp(out, expected.data(), expected.size()))) {
      std::printf(
          "isa %d dtype %d kind %d rounding %d n %lld offset %lld features %d: code %d, or other bits than portable\n",
          isa, dtype, kind, rounding, (long long)n, (long long)offset, features, code);
      return 1;
    }
    ++runs;
  }
  return 0;
}

int check_rule(int rule, int state_dtype, int dtype, int64_t n, int64_t offset, int features, int threads) {
  const size_t size = dtype == ZO_F32 ? 4 : 2, state_size = state_dtype == ZO_F32 ? 4 : 2;
  const int64_t block = 5;
  Buffer mask((size_t)(n + 7) / 8), scale(4 * (size_t)((offset + n - 1) / block - offset / block + 1));
  std::vector<uint8_t> expected;
  for (int isa = 1; isa <= widest; ++isa) {
    Buffer theta(size * (size_t)n), first(state_size * (size_t)n), second(4 * (size_t)n);
    zo_tensor t = {};
    t.src = t.dst = theta.data, t.numel = n, t.offset = offset, t.scale_block = 1, t.stream = 5;
    if (features & 1) t.mask = mask.data;
    if (features & 2) t.keep = 1u << 31;
    if (features & 4) t.scale = reinterpret_cast<const float *>(scale.data), t.scale_block = block;
    zo_states states = {nullptr, nullptr};
    if (rule != ZO_ADAM_HISTORY) states.first = first.data;
    if (rule == ZO_ADAM) states.second = reinterpret_cast<float *>(second.data);
    zo_update u = {};
    u.pass.seed = 42, u.pass.dtype = dtype, u.pass.kind = features & 8 ? ZO_RADEMACHER : ZO_GAUSSIAN;
    u.pass.rounding = features & 16 ? ZO_STOCHASTIC : ZO_NEAREST;
    u.pass.n_terms = rule == ZO_HIZOO ? 1 : 2;
    u.pass.inline_tags[1] = 1;
    u.pass.inline_coefs[0] = 1, u.pass.inline_coefs[1] = -2;
    u.inline_squares[0] = 0.25f, u.inline_squares[1] = 0.5f;
    u.rule = rule, u.state_dtype = state_dtype;
    for (float &x : u.numbers) x = 0.5f;
    const int code = zo_cpu_update(&u, &t, &states, 1, threads, isa);
    std::vector<uint8_t> got;
    for (const Buffer *b : {&theta, &first, &second}) got.insert(got.end(), b->data, b->data + b->bytes);
    if (isa == 1) expected = got;
    if (code || got != expected) {
      std::printf("isa %d rule %d states %d dtype %d n %lld offset %lld features %d: code %d, or other bits\n", isa,
                  rule, state_dtype, dtype, (long long)n, (long long)offset, features, code);
      return 1;
    }
    ++runs;
  }
  return 0;
}

/* Calls at the same time, each with helpers; afterwards the same in a forked child, which must not miss its parent's.
 */
int threads_and_fork() {
  std::atomic<int> failures{0};
  const auto callers = [&failures] {
    std::vector<std::thread> threads;
    for (int j = 0; j < 3; ++j) {
      threads.emplace_back([&failures, j] {
        for (int k = 0; k < 3; ++k) /* so that every thread meets every number of helpers */
          failures += check(ZO_F32, ZO_GAUSSIAN, ZO_NEAREST, 500001 + j, 0, 1, 2 + (j + k) % 3);
      });
    }
    for (std::thread &thread : threads) thread.join();
  };
  callers();
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    callers();
    _exit(failures != 0);
  }
  int status = -1;
  if (waitpid(child, &status, 0) != child || status != 0) {
    std::printf("the forked child ended with status %d\n", status);
    ++failures;
  }
  callers();
  return failures;
}

/* Of every type, kind and rule, out of place and not, by helpers. */
int helped() {
  int failures = 0;
  for (int dtype = ZO_F32; dtype <= ZO_BF16; ++dtype) {
    for (int kind = ZO_GAUSSIAN; kind <= ZO_RADEMACHER; ++kind)
      failures += check(dtype, kind, ZO_STOCHASTIC, 300001, 37, 1, 3);
    for (const auto &rule : RULES) failures += check_rule(rule[0], rule[1], dtype, 300001, 37, 17, 3);
  }
  return failures;
}

/* Every size, offset and feature, by the thread that calls: where accesses go is not a matter of threads. From a tile
 * on, where nine tenths of the elements are, types take turns: a feature meets each type and kind at one offset or two.
 */
int alone() {
  int failures = 0;
  for (int dtype = ZO_F32; dtype <= ZO_BF16; ++dtype) {
    for (int64_t n : SIZES) {
      const auto is_left_out = [=](int turn) { return n > 2000 && (turn + dtype) % 3 != 0; };
      for (int kind = ZO_GAUSSIAN; kind <= ZO_RADEMACHER; ++kind) {
        for (int place = 0; place < 4; ++place) {
          const auto one = [=](int features) {
            if (is_left_out(features / 3 + place + kind)) return 0;
            return check(dtype, kind, features & 4 ? ZO_STOCHASTIC : ZO_NEAREST, n, OFFSETS[place], features, 1);
          };
          for (int features = 0; features < 64; features += 3) failures += one(features); /* and every pair of them */
          for (int features : {64, 64 + 1, 64 + 2 + 4, 64 + 8 + 16, 64 + 4 + 128, 4 + 128}) failures += one(features);
        }
      }
      for (int rule = 0; rule < 6; ++rule) {
        for (int features = 0; features < 32; features += 3) {
          if (!is_left_out(features / 3 + rule))
            failures += check_rule(RULES[rule][0], RULES[rule][1], dtype, n, OFFSETS[features % 4], features, 1);
        }
      }
    }
  }
  return failures;
}

} // namespace

/* `sanitize threads` leaves out what one thread does alone, and all instructions but the portable ones: threads share
 * the same work whatever the instructions are. */
int main(int words, char **word) {
  const bool threads_only = words > 1 && !std::strcmp(word[1], "threads");
  if (threads_only) widest = 1;
  int failures = helped() + threads_and_fork();
  if (!threads_only) failures += alone();
  std::printf("%d runs, %d failures\n", runs.load(), failures);
  return failures != 0;
}
