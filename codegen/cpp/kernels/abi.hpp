// The C interface between the runtime's executor and a generated library.
// runtime/executors/cpp_abi.py mirrors these structs: change both, and INFC_ABI.
#pragma once
#include <cstdint>

#define INFC_ABI 9

extern "C" {

// One KV group's part of a step.
struct infc_group_step {
  const int32_t* block_table;  // [B, table_width]
  const int32_t* slots;        // [T]
  const int32_t* copies;       // [num_copies, 2], source and destination block
  int32_t table_width;
  int32_t num_copies;
};

// How a token is taken from a row of logits; runtime/sampling/sampler.py says what the parameters mean.
struct infc_draw {
  uint64_t seed;
  double temperature;  // 0: the greatest
  double top_p;        // 1: all
  double min_p;        // 0: all
  int32_t top_k;       // 0: all
  int32_t row;         // of the R rows
  int32_t choice;
  int32_t position;    // of the token in its sequence
};

// What is done to the row of one draw before its token is taken: ranges of the arrays of
// infc_adjustments, and penalties; runtime/sampling/adjustments.py has the meaning.
struct infc_adjusted {
  int32_t draw;
  int32_t mask;  // of the masks; negative: every token may come
  int32_t bias_begin;
  int32_t bias_end;
  int32_t counts_begin;
  int32_t counts_end;
  float repetition;
  float frequency;
  float presence;
};

struct infc_adjustments {
  const infc_adjusted* rows;  // [num_rows], by ascending draws
  const int32_t* bias_ids;
  const float* bias;
  const int32_t* count_ids;
  const int32_t* counts;
  const uint32_t* masks;  // [.., mask_words], bit i % 32 of word i / 32 is token i
  int64_t mask_words;
  int32_t num_rows;
};

// docs/design/step.md says what each array means.
struct infc_step {
  int32_t num_tokens;
  int32_t num_rows;
  int32_t num_sequences;
  int32_t num_logits;  // L, rows whose logits are wanted
  int32_t num_draws;   // D
  const int32_t* token_ids;        // [T]
  const int32_t* positions;        // [T]
  const int32_t* query_starts;     // [B + 1]
  const int32_t* context_lengths;  // [B]
  const int32_t* logits_index;     // [R]
  const infc_group_step* groups;
  float* hidden;                // [R, H], written: what enters the head; null where nobody asks
  const int32_t* logits_rows;      // [L] of the R rows, ascending; null: all of them
  const infc_draw* draws;  // [D]
  int32_t* tokens;         // [D], written
  const infc_adjustments* adjustments;  // null: no row is adjusted
  float* logits;  // [L, V], written; without draws and rows the step ends in front of the head
  // Of programs that take or give other arrays, all by sorted names (since version 9):
  const void* const* inputs;  // float or int32_t
  float* const* outputs;      // written
  const int64_t* sizes;       // of the symbols in shapes of inputs
};

struct infc_config {
  int32_t abi;
  int32_t num_threads;
  int64_t num_weights;
  const void* const* weights;  // in manifest order
  int64_t num_groups;
  void* const* kv;  // base address of each KV group's storage
  void* arena;             // 64-byte aligned
  int64_t arena_bytes;
  int32_t pin_threads;     // 1: thread i runs on the i-th allowed CPU
  int32_t num_profile;     // entries of the profile, where there is one
  int64_t* profile;        // [num_profile, 2], nanoseconds and times, added to; null: not measured
};

// Each returns null / non-zero on failure and leaves a message in infc_error(). Where infc_open
// lacked threads, memory or CPUs, errno is EAGAIN; 0 where the tables are not the code's.
int32_t infc_abi(void);
const char* infc_facts(void);    // JSON: the sizes that the code counts on, ir/step_facts.py
int32_t infc_num_profile(void);  // entries that a profile has; code/profile.json says of what
void* infc_open(const infc_config* config);
int32_t infc_run(void* model, const infc_step* step);
void infc_close(void* model);
const char* infc_error(void);
}
