// The C entry points of a generated library, over the one function that the emitter wrote.
#pragma once

#include <cerrno>
#include <cstring>
#include <exception>
#include <initializer_list>

#include "abi.hpp"
#include "activations.hpp"
#include "adjust.hpp"
#include "array.hpp"
#include "attention.hpp"
#include "decoded_linear.hpp"
#include "embedding.hpp"
#include "kv.hpp"
#include "linear.hpp"
#include "logits.hpp"
#include "loops.hpp"
#include "math.hpp"
#include "moe.hpp"
#include "norms.hpp"
#include "outputs.hpp"
#include "panels_ahead.hpp"
#include "profile.hpp"
#include "quantize.hpp"
#include "rope.hpp"
#include "rows.hpp"
#include "sampling.hpp"
#include "scaled_embedding.hpp"
#include "scaled_linear.hpp"
#include "scaled_moe.hpp"
#include "team.hpp"
#include "top_shares.hpp"

namespace infc {

// What a step reads beside its own arrays.
struct Model {
  const void* const* weights;
  void* const* kv;
  char* arena;
  int64_t* profile;  // see profile.hpp; null where nobody asks
};

template <class T>
inline const T* weight_at(const void* const* weights, int64_t index, int64_t byte_offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(weights[index]) + byte_offset);
}
// A table's entry: index in the upper 24 bits, byte offset in the lower 40.
template <class T>
inline const T* weight_at(const void* const* weights, int64_t entry) {
  return weight_at<T>(weights, entry >> 40, entry & ((int64_t{1} << 40) - 1));
}

// What infc_error() gives: why this thread's last call failed.
struct Message {
  char text[256];
};
inline Message& last_error() {
  static thread_local Message message;
  return message;
}
inline void say(const char* text) {
  Message& message = last_error();
  std::strncpy(message.text, text, sizeof message.text - 1);
}

constexpr int64_t largest(std::initializer_list<int64_t> values) {
  int64_t most = 0;
  for (const int64_t value : values) most = value > most ? value : most;
  return most;
}

inline KvView kv_view(void* base, int64_t bytes_per_block, int64_t layer_offset, int32_t block_size,
                      int32_t kv_heads, int32_t key_dim, int32_t value_dim) {
  return {base, bytes_per_block, layer_offset, block_size, kv_heads, key_dim, value_dim};
}

// What attention reads of a step, for the layers of one KV group.
inline StepView step_view(const infc_step& s, int64_t group) {
  const infc_group_step& g = s.groups[group];
  return {s.query_starts, s.positions,     g.block_table,
          g.table_width,  s.num_sequences, s.num_tokens};
}

using StepFunction = void (*)(const Team&, const Model&, const infc_step&);

// An opened model: copies of the caller's tables, and the team of threads.
class Session {
 public:
  Session(const infc_config& config, StepFunction step, const int64_t* block_bytes,
          size_t scratch_bytes)
      : weights_(config.weights, static_cast<size_t>(config.num_weights)),
        kv_(config.kv, static_cast<size_t>(config.num_groups)),
        block_bytes_(block_bytes, static_cast<size_t>(config.num_groups)),
        step_(step),
        team_(config.num_threads, scratch_bytes, config.pin_threads != 0) {
    model_ = Model{weights_.data(), kv_.data(), static_cast<char*>(config.arena),
                   config.profile};
  }

  void run(const infc_step& step) {
    Call call{this, &step};
    team_.run(&Session::on_thread, &call);
  }

 private:
  struct Call {
    Session* session;
    const infc_step* step;
  };

  static void on_thread(const Team& t, void* argument) {
    const Call& call = *static_cast<Call*>(argument);
    call.session->copy_blocks(t, *call.step);
    call.session->step_(t, call.session->model_, *call.step);
  }

  // Copy-on-write copies come before anything of the step is written.
  void copy_blocks(const Team& t, const infc_step& step) {
    bool any = false;
    for (size_t g = 0; g < kv_.size(); ++g) {
      const infc_group_step& group = step.groups[g];
      if (group.num_copies == 0) continue;
      any = true;
      KvView blocks{};
      blocks.base = kv_[g];
      blocks.bytes_per_block = block_bytes_[g];
      infc::copy_blocks(t, blocks, group.copies, group.num_copies);
    }
    if (any) t.barrier();
  }

  Array<const void*> weights_;
  Array<void*> kv_;
  Array<int64_t> block_bytes_;
  StepFunction step_;
  Model model_;
  ThreadTeam team_;
};

inline void* open_session(const infc_config* config, StepFunction step, int64_t num_weights,
                          int64_t arena_bytes, int64_t scratch_bytes, int64_t num_profile,
                          int64_t num_groups, std::initializer_list<int64_t> block_bytes) {
  errno = 0;
  if (config->abi != INFC_ABI) {
    say("the library speaks another version of the interface");
  } else if (config->num_weights != num_weights || config->num_groups != num_groups) {
    say("the tables given are not those that the code was made for");
  } else if (config->profile != nullptr && config->num_profile != num_profile) {
    say("the profile given has not the entries that the code marks");
  } else if (config->arena_bytes < arena_bytes || config->num_threads < 1) {
    say("the arena is too small, or there is no thread");
  } else {
    try {
      return new Session(*config, step, block_bytes.begin(), static_cast<size_t>(scratch_bytes));
    } catch (const std::exception& e) {
      say(e.what());
      errno = EAGAIN;  // last: what unwinds may set it, too
    }
  }
  return nullptr;
}

inline int32_t run_session(void* session, const infc_step* step) {
  try {
    static_cast<Session*>(session)->run(*step);
    return 0;
  } catch (const std::exception& e) {
    say(e.what());
    return 1;
  }
}

}  // namespace infc

#define INFC_EXPORT extern "C" __attribute__((visibility("default")))

// TEXT is what ir/step_facts.py says of the step.
#define INFC_FACTS(TEXT) \
  INFC_EXPORT const char* infc_facts(void) { return TEXT; }

// SCRATCH_BYTES is each thread's own, NUM_PROFILE the entries that the step marks; last come the
// bytes of a block of each KV group.
#define INFC_ENTRY(STEP, NUM_WEIGHTS, ARENA_BYTES, SCRATCH_BYTES, NUM_PROFILE, NUM_GROUPS, ...) \
  INFC_EXPORT int32_t infc_abi(void) { return INFC_ABI; }                                       \
  INFC_EXPORT int32_t infc_num_profile(void) { return NUM_PROFILE; }                            \
  INFC_EXPORT void* infc_open(const infc_config* config) {                                      \
    return infc::open_session(config, STEP, NUM_WEIGHTS, ARENA_BYTES, SCRATCH_BYTES,            \
                              NUM_PROFILE, NUM_GROUPS, {__VA_ARGS__});                          \
  }                                                                                             \
  INFC_EXPORT int32_t infc_run(void* model, const infc_step* step) {                            \
    return infc::run_session(model, step);                                                      \
  }                                                                                             \
  INFC_EXPORT void infc_close(void* model) { delete static_cast<infc::Session*>(model); }       \
  INFC_EXPORT const char* infc_error(void) { return infc::last_error().text; }
