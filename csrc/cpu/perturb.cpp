/* perturb.cpp - the CPU backend's entry: checks, live terms, choice of the instruction set, threads.
 *
 * Belongs here: what happens once per call. Does not belong here: anything per element; this file is compiled for the
 * plain architecture, and is the only one of csrc/cpu that may use the C++ library (see perturb.h).
 */
#include <pthread.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "../noise.h"
#include "call.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

using namespace zo; /* call.h is of this file and its like */

namespace {

/* Elements that a thread takes at a time, where each costs `work` (1 for a pass and 1 for each of its terms): about
 * 0.1 ms, several times what waking a thread takes. A call with less runs on the caller's thread: scratch mode makes
 * hundreds of small calls per forward. Whole tiles of every kernel. */
int64_t chunk_size(int64_t work) {
  const int64_t size = ((int64_t)1 << 19) / work & ~(int64_t)2047;
  return size < 2048 ? 2048 : size;
}

Isa detect() {
#if defined(__x86_64__)
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return PORTABLE;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return AVX512;
  }
  return AVX2;
#else
  return PORTABLE;
#endif
}

zo::PerturbRange *kernel(int isa) {
#if defined(__x86_64__)
  if (isa == AVX512) return zo::perturb_avx512;
  if (isa == AVX2) return zo::perturb_avx2;
#else
  (void)isa;
#endif
  return zo::perturb_portable;
}

/* The whole list is one row of elements, cut into chunks that threads take from a counter: a list of many small tensors
 * and a list of one large tensor split alike.
 *
 * The caller waits for the chunks, not for the threads. Between a model's matrix products torch's own threads spin on
 * their cores for milliseconds, and a thread of ours may run only after that: waited for, it held up every pass of a
 * scratch-mode forward (three times the time, on two cores). Such a latecomer finds the counter used up and touches
 * nothing but this struct, which it keeps alive; jobs and tensors may be gone by then. */
struct Work {
  const zo::Body body;
  const zo_tensor *tensors;
  int64_t total, chunk;
  std::atomic<int64_t> next{0}, done{0}; /* chunks taken, elements finished */

  Work(const zo::Body &body, const zo_tensor *tensors, int64_t total, int64_t chunk)
      : body(body), tensors(tensors), total(total), chunk(chunk) {}

  void run() {
    const zo::IeeeArithmetic ieee;
    int64_t k = 0, before = 0; /* elements of the tensors before k; chunks of one thread only ever advance */
    for (int64_t begin; (begin = chunk * next.fetch_add(1, std::memory_order_relaxed)) < total;) {
      const int64_t end = begin + chunk < total ? begin + chunk : total;
      for (int64_t at = begin; at < end;) {
        const zo_tensor &t = tensors[k];
        if (before + t.numel <= at) {
          before += t.numel;
          ++k;
          continue;
        }
        const int64_t stop = before + t.numel < end ? before + t.numel : end;
        body.run(body.context, k, at - before, stop - before);
        at = stop;
      }
      done.fetch_add(end - begin, std::memory_order_release);
    }
  }

  void finish() {
    run();
    while (done.load(std::memory_order_acquire) < total) std::this_thread::yield();
  }
};

/* Threads that sleep between calls: woken, they cost the caller 8 us, a new one 26 us (measured on two busy cores), and
 * scratch mode makes hundreds of calls per forward. There are as many as the largest call has asked for. The latest
 * call gets them; an earlier one that is still running keeps those it has. They are never joined and the object is
 * never destroyed, so that a process may end at any time. */
class Helpers {
public:
  void help(const std::shared_ptr<Work> &work, int64_t wanted) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; threads_ < wanted && threads_ < MOST; ++threads_) std::thread([this] { serve(); }).detach();
      } catch (const std::system_error &) {
        /* No more threads to be had: those that are there, and the caller, take the chunks. */
      }
      if (wanted > threads_) wanted = threads_;
      work_ = work, wanted_ = wanted;
    }
    for (int64_t k = 0; k < wanted; ++k) called_.notify_one();
  }

private:
  void serve() {
    for (;;) {
      std::shared_ptr<Work> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        while (!wanted_) called_.wait(lock);
        work = work_;
        if (!--wanted_) work_.reset();
      }
      work->run();
    }
  }

  static constexpr int64_t MOST = 256;
  std::mutex mutex_;
  std::condition_variable called_;
  std::shared_ptr<Work> work_;
  int64_t wanted_ = 0, threads_ = 0; /* helpers that work_ still lacks; helpers there are */
};

/* A forked child (a DataLoader's worker) has none of its parent's threads, and perhaps a mutex that one of them held:
 * it starts anew, in the same place. */
alignas(Helpers) unsigned char helpers_memory[sizeof(Helpers)];
Helpers *new_helpers() { return new (helpers_memory) Helpers; }
Helpers *helpers_of_process = new_helpers();
const int renewed_by_fork = pthread_atfork(nullptr, nullptr, [] { helpers_of_process = new_helpers(); });

} // namespace

namespace zo {

bool sound(const zo_tensor &t) {
  return t.numel >= 0 && t.scale_block >= 1 && (t.numel == 0 || (t.src && t.dst)) && (!t.rows || t.row_len >= 1);
}

bool sound(const zo_tensor &t, const zo_pass &p) {
  if (t.rank || t.rsqrt) {
    if (p.first || t.rsqrt > 1 || t.rank > ZO_MAX_RANK) return false;
    if (t.rank && (p.n_terms > 1 || t.cols < 1 || !t.left || !t.right)) return false;
  }
  return sound(t);
}

bool sound(const zo_pass &p) {
  if (p.n_terms < 0 || !p.tags != !p.coefs || p.dtype < ZO_F32 || p.dtype > ZO_BF16 || p.kind < ZO_GAUSSIAN ||
      p.kind > ZO_RADEMACHER) {
    return false;
  }
  if (!p.first) return p.tags || p.n_terms <= ZO_INLINE_TERMS;
  if (p.n_passes < 0 || (p.n_terms && !p.tags) || (p.n_passes && (!p.decays || !p.roundings)) || p.first[0] != 0) {
    return false;
  }
  for (int64_t s = 0; s < p.n_passes; ++s) {
    if (p.first[s] > p.first[s + 1]) return false;
  }
  return p.first[p.n_passes] == p.n_terms;
}

/* Terms begin .. end - 1 as a job, whose live ones are written to `live`. `gaussian`: for Gaussian noise. */
Job make_job(const zo_pass &pass, int64_t begin, int64_t end, float decay, int rounding, Term *live, bool gaussian) {
  Job job = {};
  for (int64_t k = begin; k < end; ++k) {
    const uint32_t tag = pass.tags ? (uint32_t)pass.tags[k] : pass.inline_tags[k];
    const float given = pass.coefs ? pass.coefs[k] : pass.inline_coefs[k];
    const float c = gaussian ? gaussian_coefficient(given) : rademacher_coefficient(given);
    if (k == begin) job.rounding_tag = tag;
    if (c != 0) live[job.n_terms++] = Term{tag, c};
  }
  job.seed = pass.seed;
  job.terms = live;
  job.has_decay = std::isfinite(decay) && decay != 1;
  job.decay = job.has_decay ? decay : 1;
  job.gaussian = gaussian;
  job.dtype = pass.dtype;
  job.stochastic = rounding == ZO_STOCHASTIC && pass.dtype != ZO_F32;
  return job;
}

int spread(const Body &body, const zo_tensor *tensors, int64_t total, int64_t work_each, int threads) {
  const int64_t chunk = chunk_size(work_each), chunks = (total + chunk - 1) / chunk;
  const int64_t helpers = (chunks < threads ? chunks : threads) - 1;
  if (helpers < 1) {
    Work(body, tensors, total, chunk).run();
    return OK;
  }
  std::shared_ptr<Work> work;
  try {
    work = std::make_shared<Work>(body, tensors, total, chunk);
  } catch (const std::bad_alloc &) {
    return OUT_OF_MEMORY;
  }
  helpers_of_process->help(work, helpers);
  work->finish();
  return OK;
}

} // namespace zo

namespace {

/* The passes of a sequence that change anything, linked; returns their work for each element. */
int64_t make_jobs(const zo_pass &pass, std::vector<zo::Job> &jobs, zo::Term *live) {
  int64_t work = 0;
  for (int64_t s = 0; s < pass.n_passes; ++s) {
    const int64_t begin = pass.first[s], end = pass.first[s + 1];
    const zo::Job job =
        make_job(pass, begin, end, pass.decays[s], pass.roundings[s], live + begin, pass.kind == ZO_GAUSSIAN);
    if (!job.n_terms && !job.has_decay) continue;
    if (!jobs.empty()) jobs.back().next = jobs.data() + jobs.size(); /* reserved: nothing moves */
    jobs.push_back(job);
    work += 1 + job.n_terms;
  }
  return work;
}

} // namespace

extern "C" const char *zo_error_string(int code) {
  switch (code) {
  case OK:
    return "no error";
  case BAD_ARGUMENT:
    return "an argument of the C ABI is out of its range (see csrc/zo_kernels.h)";
  case UNSUPPORTED_ISA:
    return "this processor or this build lacks the instruction set asked for";
  case OUT_OF_MEMORY:
    return "out of host memory";
  default:
    return "unknown error code";
  }
}

extern "C" int zo_cpu_best_isa(void) {
  static const Isa best = detect();
  return best;
}

extern "C" int zo_cpu_perturb(const zo_pass *pass, const zo_tensor *tensors, int64_t n, int threads, int isa) {
  if (!pass || n < 0 || (n && !tensors) || !sound(*pass) || isa < BEST || isa > AVX512) return BAD_ARGUMENT;
  if (isa > zo_cpu_best_isa()) return UNSUPPORTED_ISA;
  int64_t total = 0;
  bool in_place = true, any_low_rank = false;
  for (int64_t k = 0; k < n; ++k) {
    if (!sound(tensors[k], *pass)) return BAD_ARGUMENT;
    total += tensors[k].numel;
    any_low_rank = any_low_rank || tensors[k].rank;
    in_place = in_place && tensors[k].src == tensors[k].dst;
  }

  zo::Term few[ZO_INLINE_TERMS], *live = few;
  std::vector<zo::Term> many;
  std::vector<zo::Job> sequence;
  try {
    if (pass->n_terms > ZO_INLINE_TERMS) {
      many.resize((size_t)pass->n_terms);
      live = many.data();
    }
    if (pass->first) sequence.reserve((size_t)pass->n_passes);
  } catch (const std::exception &) {
    return OUT_OF_MEMORY;
  }
  zo::Job one = {}, low_rank = {};
  zo::Term only; /* of low_rank */
  int64_t work_each = 1;
  {
    const zo::IeeeArithmetic ieee;
    if (pass->first) work_each = make_jobs(*pass, sequence, live);
    if (sequence.empty()) { /* one pass; for a sequence that changes nothing, one without terms, which copies */
      const float decay = pass->first || !pass->has_decay ? 1.0f : pass->decay_ptr ? *pass->decay_ptr : pass->decay;
      const int64_t n_terms = pass->first ? 0 : pass->n_terms;
      const int rounding = pass->first ? ZO_NEAREST : pass->rounding;
      one = make_job(*pass, 0, n_terms, decay, rounding, live, pass->kind == ZO_GAUSSIAN);
      if (any_low_rank) low_rank = make_job(*pass, 0, n_terms, decay, rounding, &only, false);
      work_each = 1 + one.n_terms;
    }
  }
  const zo::Job &job = sequence.empty() ? one : sequence.front();
  if (in_place && !job.n_terms && !low_rank.n_terms && !job.has_decay) return OK; /* not one bit would change */

  struct Context {
    const zo::Job &job, &low_rank;
    const zo_tensor *tensors;
    zo::PerturbRange *range;
  } const context = {job, low_rank, tensors, kernel(isa == BEST ? zo_cpu_best_isa() : isa)};
  const auto range = [](const void *p, int64_t k, int64_t begin, int64_t end) {
    const Context &c = *static_cast<const Context *>(p);
    c.range(c.tensors[k].rank ? c.low_rank : c.job, c.tensors[k], begin, end);
  };
  return zo::spread({range, &context}, tensors, total, work_each, threads);
}
