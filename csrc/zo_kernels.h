/* zo_kernels.h - the C ABI of the compiled kernels.
 *
 * Belongs here: plain structs and functions over raw pointers, 64-bit sizes and scalars. Does not belong here: torch,
 * Python, C++ types, anything that allocates. A function returns 0, or an error code that zo_error_string() explains.
 *
 * One operation, docs/numerics.md:  dst <- round(decay * src + scale * mask * sum_k c_k z(seed, stream, tag_k, i)),
 * once, or many times one after another with one read and one write of the weights.
 */
#ifndef ZO_KERNELS_H
#define ZO_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum zo_dtype { ZO_F32 = 0, ZO_F16 = 1, ZO_BF16 = 2 };
enum zo_kind { ZO_GAUSSIAN = 0, ZO_RADEMACHER = 1 };
enum zo_rounding { ZO_NEAREST = 0, ZO_STOCHASTIC = 1 };

/* One tensor of the list: 14 words of 8 bytes, so that a table of them is also an int64 matrix [n, 14].
 * Local element e is element i of the unsharded tensor:  rows == NULL:  i = offset + e
 *                                                        rows != NULL:  i = rows[e / row_len] * row_len + e % row_len
 * With a rank, z of element i is not noise but sum_{rho < rank} left[i / cols][rho] * right[rho][i % cols], and a pass
 * has at most one term. Factors have at most 12 significant bits.
 */
typedef struct zo_tensor {
  const void *src;     /* weights read */
  void *dst;           /* weights written; == src for an in-place pass; otherwise the two do not overlap */
  int64_t numel;       /* local elements */
  int64_t offset;      /* index i of local element 0 (ignored if rows is set) */
  const uint8_t *mask; /* NULL, or ceil(numel / 8) bytes: LOCAL element e is kept if bit e & 7 of byte e >> 3 is set */
  const float *scale;  /* NULL, or scales: element e takes scale[i / scale_block - offset / scale_block] */
  int64_t scale_block; /* B >= 1; 1 if there is no scale */
  const int64_t *rows; /* NULL, or the row of the full tensor that each local row holds */
  int64_t row_len;     /* elements per row if rows is set, else 0 */
  uint32_t stream;
  uint32_t keep; /* 0: no random mask; otherwise its threshold T */
  uint32_t mask_tag;
  uint16_t rank;      /* 0: noise; 1 .. ZO_MAX_RANK */
  uint16_t rsqrt;     /* 1: an element takes RN(1 / RN(sqrt(x))) where it would take the scale x; else 0 */
  const float *left;  /* [rows of the unsharded matrix, rank] if there is a rank, else NULL; and so are the next two */
  const float *right; /* [rank, cols] */
  int64_t cols;       /* >= 1 */
} zo_tensor;

#define ZO_MAX_RANK 64

#define ZO_INLINE_TERMS 8

/* What is the same for the whole list: one pass, or a sequence of them (first != NULL), of which each rounds to the
 * weights' type before the next one reads them (docs/numerics.md, section 6). Terms lie in the struct (tags == NULL;
 * one pass only) or in the memory of the tensors' device, and so does everything else that a pointer here names.
 */
typedef struct zo_pass {
  uint64_t seed;
  int32_t dtype, kind, rounding; /* enums above */
  int32_t has_decay;             /* 0: theta itself */
  int64_t n_terms;
  const int64_t *tags;    /* n_terms values, the low 32 bits count; or NULL: inline_tags */
  const float *coefs;     /* n_terms values; NULL iff tags is NULL */
  const float *decay_ptr; /* one value in the tensors' device memory; or NULL: decay below */
  float decay;
  uint32_t inline_tags[ZO_INLINE_TERMS];
  float inline_coefs[ZO_INLINE_TERMS];
  int64_t n_passes;     /* of a sequence; rounding, has_decay and decay above are then not looked at */
  const int64_t *first; /* NULL: one pass. n_passes + 1 values from 0 to n_terms, none below the one before it: pass s
                         * has the terms first[s] .. first[s + 1] - 1 */
  const float *decays;  /* n_passes values; 1 is none */
  const uint8_t *roundings; /* n_passes values of zo_rounding */
  void *scratch; /* CUDA: ZO_CUDA_SCRATCH(n_passes, n_terms) bytes at a multiple of 16, for this call alone */
} zo_pass;

/* "Update rules" of docs/numerics.md:  (theta, states) <- rule(theta, states, u), with u as above. */
enum zo_rule { ZO_MOMENTUM = 0, ZO_ADAM = 1, ZO_HIZOO = 2, ZO_ADAM_HISTORY = 3 };
#define ZO_RULE_NUMBERS 9 /* at most; momentum 4, adam 9, hizoo 7, adam_history 4 */

/* The states of one tensor: numel elements each, where the weights are; NULL where the rule has none. */
typedef struct zo_states {
  void *first;   /* b, m or h */
  float *second; /* v */
} zo_states;

typedef struct zo_update {
  zo_pass pass; /* one pass; its decay is not looked at */
  int32_t rule;
  int32_t state_dtype;     /* of zo_states.first: ZO_F32, or, but for h, ZO_BF16 */
  const float *squares;    /* ZO_ADAM_HISTORY: q_k, n_terms values; NULL: inline_squares, or none */
  const float *number_ptr; /* the rule's numbers, in the tensors' device memory; or NULL: numbers */
  float numbers[ZO_RULE_NUMBERS];
  float inline_squares[ZO_INLINE_TERMS];
} zo_update;

const char *zo_error_string(int code);

/* isa: 0 best available, 1 portable, 2 AVX2, 3 AVX-512. Host pointers throughout. */
int zo_cpu_perturb(const zo_pass *pass, const zo_tensor *tensors, int64_t n, int threads, int isa);
int zo_cpu_best_isa(void);

/* In place: src == dst; no rows, no rank, no rsqrt. states[k] belongs to tensors[k]. */
int zo_cpu_update(const zo_update *update, const zo_tensor *tensors, const zo_states *states, int64_t n, int threads,
                  int isa);

/* The bit mask of |x| <= limits[k], as real numbers (no NaN is kept), of every tensor: read from `src`, written to
 * `mask`, with zeros behind the last element. No rows; of the other fields only numel counts. */
int zo_cpu_magnitude_mask(int dtype, const zo_tensor *tensors, const float *limits, int64_t n, int threads, int isa);

/* One launch on `stream` (a cudaStream_t) for a whole list of tensors of one dtype, for a sequence after a small one
 * that prepares its terms; returns without waiting. Everything
 * but `pass` itself lies in device memory: `table` (the zo_tensor structs), `map`, what they point at, and the terms,
 * unless they are inline. Entry b of `map`, one for each of the `tiles` blocks, is a pair (tensor, tile of it); a tile
 * has `tile` elements, a multiple of ZO_CUDA_SPAN. A tensor has ceil((numel + offset % 32) / tile) tiles; one with
 * `rows` whose row_len is not a multiple of 32 has ceil((row_len + 31) / tile) for each row, row by row. Returns 0 or
 * a cudaError_t, which zo_cuda_error_string explains. */
enum zo_form {
  ZO_GENERAL = 0,
  ZO_LEAN = 1, /* no tensor has a mask, a random mask, a scale, a rank or rows, and no decay but those of a sequence */
  ZO_EXTENDED = 2, /* no sequence; the only form that serves a tensor with a rank or rsqrt */
};
#define ZO_CUDA_SPAN 2048
#define ZO_CUDA_SCRATCH(n_passes, n_terms) (16 * (n_passes) + 8 * (n_terms))
int zo_cuda_perturb(const zo_pass *pass, const zo_tensor *table, const uint32_t *map, int64_t tiles, int64_t tile,
                    int form, void *stream);
/* The same for a rule: `states` lies in device memory. */
int zo_cuda_update(const zo_update *update, const zo_tensor *table, const zo_states *states, const uint32_t *map,
                   int64_t tiles, int64_t tile, void *stream);
/* zo_cpu_magnitude_mask; `limits` lies in device memory too. */
int zo_cuda_magnitude_mask(int dtype, const zo_tensor *table, const float *limits, const uint32_t *map, int64_t tiles,
                           int64_t tile, void *stream);
const char *zo_cuda_error_string(int code);
/* 0 where this runtime finds a device; it may need a newer driver than others in the process. */
int zo_cuda_status(void);

#ifdef __cplusplus
}
#endif
#endif
