// Calls a library's functions for another process, which may be of another kind of processor.
//
// Over stdin and stdout, in 64-bit words: (0, bytes) gives an address, (1, address, bytes, data)
// writes there, (2, address, bytes) gives the data, (3, address) frees it, and (4, name of 64 bytes,
// 24 integers, 8 doubles) gives the result of a call. Integers and doubles go in registers of their
// own kind, and what is left of the integers on the stack: so a function that takes fewer of each, in
// any order, finds its own. See remote.py.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

void read_all(void* to, uint64_t bytes) {
  if (bytes != 0 && fread(to, 1, bytes, stdin) != bytes) exit(0);
}
uint64_t word() {
  uint64_t value;
  read_all(&value, sizeof value);
  return value;
}
void* address() { return reinterpret_cast<void*>(word()); }
void answer(const void* from, uint64_t bytes) {
  fwrite(from, 1, bytes, stdout);
  fflush(stdout);
}

using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                             double, double, double, double, double, double, double, double);

int64_t call(void* library) {
  char name[64];
  int64_t i[24];
  double d[8];
  read_all(name, sizeof name);
  read_all(i, sizeof i);
  read_all(d, sizeof d);
  const auto f = reinterpret_cast<Function>(dlsym(library, name));
  if (f == nullptr) exit(2);
  return f(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
           i[14], i[15], i[16], i[17], i[18], i[19], i[20], i[21], i[22], i[23], d[0], d[1], d[2],
           d[3], d[4], d[5], d[6], d[7]);
}

}  // namespace

int main(int, char** arguments) {
  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  for (;;) {
    const uint64_t what = word();
    if (what == 0) {
      void* const made = malloc(word());
      answer(&made, sizeof made);
    } else if (what == 1) {
      void* const to = address();
      read_all(to, word());
    } else if (what == 2) {
      void* const from = address();
      answer(from, word());
    } else if (what == 3) {
      free(address());
    } else {
      const int64_t result = call(library);
      answer(&result, sizeof result);
    }
  }
}
