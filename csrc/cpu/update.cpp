/* update.cpp - the entry of the update rules on the CPU: checks, terms, whether anything is to be done.
 *
 * Belongs here: what happens once per call, beside what perturb.cpp has for every operation. Does not belong here:
 * anything per element (update_tile.h).
 */
#include <exception>
#include <vector>

#include "../rules.h"
#include "call.h"

namespace {

zo::UpdateRange *kernel(int isa) {
#if defined(__x86_64__)
  if (isa == zo::AVX512) return zo::update_avx512;
  if (isa == zo::AVX2) return zo::update_avx2;
#else
  (void)isa;
#endif
  return zo::update_portable;
}

bool sound(const zo_update &u) {
  if (!zo::sound(u.pass) || u.pass.first || u.rule < ZO_MOMENTUM || u.rule > ZO_ADAM_HISTORY) return false;
  if (u.rule == ZO_HIZOO && u.pass.n_terms != 1) return false;
  if (u.rule == ZO_ADAM_HISTORY && u.pass.n_terms > ZO_INLINE_TERMS && !u.squares) return false;
  return u.state_dtype == ZO_F32 || (u.state_dtype == ZO_BF16 && (u.rule == ZO_MOMENTUM || u.rule == ZO_ADAM));
}

bool sound(const zo_tensor &t, const zo_states &s, int rule) {
  if (!zo::sound(t) || t.src != t.dst || t.rows || t.rank || t.rsqrt) return false;
  const int wanted = zo::count_of_states(rule);
  return t.numel == 0 || ((wanted < 1 || s.first) && (wanted < 2 || s.second));
}

struct Context {
  const zo::UpdateJob &job;
  const zo_tensor *tensors;
  const zo_states *states;
  zo::UpdateRange *range;
};

void run(const void *p, int64_t k, int64_t begin, int64_t end) {
  const Context &c = *static_cast<const Context *>(p);
  c.range(c.job, c.tensors[k], c.states[k], begin, end);
}

} // namespace

extern "C" int zo_cpu_update(const zo_update *update, const zo_tensor *tensors, const zo_states *states, int64_t n,
                             int threads, int isa) {
  if (!update || n < 0 || (n && (!tensors || !states)) || !sound(*update) || isa < zo::BEST || isa > zo::AVX512) {
    return zo::BAD_ARGUMENT;
  }
  if (isa > zo_cpu_best_isa()) return zo::UNSUPPORTED_ISA;
  int64_t total = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (!sound(tensors[k], states[k], update->rule)) return zo::BAD_ARGUMENT;
    total += tensors[k].numel;
  }

  const zo_pass &pass = update->pass;
  const bool history = update->rule == ZO_ADAM_HISTORY;
  const float *coefs = pass.coefs ? pass.coefs : pass.inline_coefs;
  const float *squares = update->squares ? update->squares : update->inline_squares;
  const float *numbers = update->number_ptr ? update->number_ptr : update->numbers;
  zo::UpdateJob job = {};
  bool go = numbers[0] != 0;
  for (int k = 0; k < zo::count_of_numbers(update->rule); ++k) {
    go = go && zo::is_finite(numbers[k]);
    job.numbers[k] = numbers[k];
  }
  for (int64_t k = 0; k < pass.n_terms; ++k) {
    go = go && zo::is_finite(coefs[k]) && (!history || zo::is_finite(squares[k]));
  }
  if (!go) return zo::OK;

  std::vector<zo::Term> terms, singles;
  try {
    terms.resize((size_t)pass.n_terms);
    if (history) singles.resize((size_t)pass.n_terms);
  } catch (const std::exception &) {
    return zo::OUT_OF_MEMORY;
  }
  {
    const zo::IeeeArithmetic ieee;
    job.sum = zo::make_job(pass, 0, pass.n_terms, 1.0f, pass.rounding, terms.data(), pass.kind == ZO_GAUSSIAN);
    const float one = pass.kind == ZO_GAUSSIAN ? zo::gaussian_coefficient(1.0f) : 1.0f;
    for (size_t k = 0; k < singles.size(); ++k) {
      singles[k] = zo::Term{pass.tags ? (uint32_t)pass.tags[k] : pass.inline_tags[k], one};
    }
  }
  job.singles = singles.data();
  job.squares = squares;
  job.n_squares = (int64_t)singles.size();
  job.rule = update->rule;
  job.state_dtype = update->state_dtype;
  const Context context = {job, tensors, states, kernel(isa == zo::BEST ? zo_cpu_best_isa() : isa)};
  return zo::spread({run, &context}, tensors, total, 2 + job.sum.n_terms + job.n_squares, threads);
}
