// Runs a kernel block by block, every thread of a block as a fiber.
//
// A fiber runs alone until it must wait: for its warp (shuffle, __syncwarp) or for its block
// (__syncthreads). Then the next lane of its warp runs. When all lanes of a warp wait they must do
// so at one place, or the kernel counts on a lane that is elsewhere, or has ended. A warp then runs
// ahead of others as far as it can: which one does is up to the order, and where a barrier is
// missing the results tell.
//
// Compiled without sanitizers, since it writes where kernels may not.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct Index {
  unsigned int x;
};
Index threadIdx;
Index blockIdx;

namespace {

constexpr unsigned int kWarp = 32;
constexpr unsigned int kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 18;
constexpr size_t kGuardBytes = 1 << 12;

enum class State { ready, at_warp, at_block, ended };

// Where execution goes on. Not ucontext's: each of its switches calls the system, and makes
// AddressSanitizer forget what it knows of the stack.
using Place = void* [5];

struct Fiber {
  Place place;
  bool lives = false;
  State state = State::ready;
  const char* file = "";
  int line = 0;
  unsigned long long sent[2] = {};  // by its last two shuffles: others may not have read the former
  unsigned int shuffles = 0;
};

void (*kernel)(const void* params);
const void* params;
Fiber fibers[kMaxThreads];
unsigned int running;
Place scheduler;
std::string finding;

// A function of its own: g++ wants the two ends of a jump in different ones.
[[gnu::noinline, noreturn]] void go(Place& to) { __builtin_longjmp(to, 1); }

[[gnu::noinline]] void jump(Place& from, Place& to) {
  if (!__builtin_setjmp(from)) {
    go(to);
  }
}

// A fiber outlives a block, and runs the next one from where it ended the last.
void live() {
  for (;;) {
    kernel(params);
    fibers[running].state = State::ended;
    jump(fibers[running].place, scheduler);
  }
}

[[gnu::noinline]] void be_born() {
  char* const stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(stack, kGuardBytes, PROT_NONE);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, live, 0);
  if (!__builtin_setjmp(scheduler)) {
    setcontext(&context);
  }
}

// Runs a thread until it waits or ends.
void resume(unsigned int thread) {
  Fiber& fiber = fibers[thread];
  running = threadIdx.x = thread;
  fiber.state = State::ready;
  if (fiber.lives) {
    jump(scheduler, fiber.place);
  } else {
    fiber.lives = true;
    be_born();
  }
}

void wait(State state, const char* file, int line) {
  Fiber& fiber = fibers[running];
  fiber.state = state;
  fiber.file = file;
  fiber.line = line;
  jump(fiber.place, scheduler);
}

bool together(const Fiber& a, const Fiber& b) {
  return a.state == b.state &&
         (a.state == State::ended || (a.line == b.line && std::string(a.file) == b.file));
}

std::string described(unsigned int thread) {
  const Fiber& fiber = fibers[thread];
  const std::string name = "thread " + std::to_string(thread);
  if (fiber.state == State::ended) {
    return name + " has ended";
  }
  return name + " waits for its " + (fiber.state == State::at_warp ? "warp" : "block") + " at " +
         fiber.file + ":" + std::to_string(fiber.line);
}

// Whether all threads of a range wait at one place, or have ended.
bool check_together(unsigned int first, unsigned int end) {
  for (unsigned int thread = first + 1; thread < end; ++thread) {
    if (!together(fibers[first], fibers[thread])) {
      finding = "divergence in block " + std::to_string(blockIdx.x) + ": " + described(first) +
                ", " + described(thread);
      return false;
    }
  }
  return true;
}

// Chooses who goes first: the lowest, the highest, or any.
class Order {
 public:
  explicit Order(unsigned int number) : number_(number), random_(number) {}

  void arrange(std::vector<unsigned int>& lanes) {
    if (number_ == 1) {
      std::reverse(lanes.begin(), lanes.end());
    } else if (number_ > 1) {
      std::shuffle(lanes.begin(), lanes.end(), random_);
    }
  }

  unsigned int pick(const std::vector<unsigned int>& warps) {
    const size_t last = warps.size() - 1;
    return warps[number_ == 0 ? 0 : number_ == 1 ? last : random_() % warps.size()];
  }

 private:
  unsigned int number_;
  std::mt19937 random_;
};

bool run_warp(unsigned int warp, Order& order) {
  std::vector<unsigned int> lanes(kWarp);
  std::iota(lanes.begin(), lanes.end(), warp * kWarp);
  order.arrange(lanes);
  for (const unsigned int thread : lanes) {
    resume(thread);
    if (!finding.empty()) {
      return false;
    }
  }
  return check_together(warp * kWarp, (warp + 1) * kWarp);
}

bool run_block(unsigned int threads, Order& order) {
  std::vector<unsigned int> ready(threads / kWarp);
  std::iota(ready.begin(), ready.end(), 0);
  while (!ready.empty()) {
    const unsigned int warp = order.pick(ready);
    if (!run_warp(warp, order)) {
      return false;
    }
    if (fibers[warp * kWarp].state != State::at_warp) {
      ready.erase(std::find(ready.begin(), ready.end(), warp));
    }
    if (ready.empty()) {
      if (!check_together(0, threads)) {
        return false;
      }
      if (fibers[0].state == State::at_block) {
        ready.resize(threads / kWarp);
        std::iota(ready.begin(), ready.end(), 0);
      }
    }
  }
  return true;
}

void check_mask(unsigned int mask, const char* file, int line) {
  if (mask != 0xffffffffu) {
    finding = std::string("a mask of some lanes at ") + file + ":" + std::to_string(line);
  }
}

}  // namespace

void wait_for_block(const char* file, int line) { wait(State::at_block, file, line); }

void wait_for_warp(unsigned int mask, const char* file, int line) {
  check_mask(mask, file, line);
  wait(State::at_warp, file, line);
}

unsigned long long shuffled(unsigned int mask, unsigned long long value, unsigned int from_lane,
                            const char* file, int line) {
  Fiber& fiber = fibers[running];
  const unsigned int slot = fiber.shuffles++ % 2;
  const Fiber& from = fibers[running / kWarp * kWarp + from_lane];
  fiber.sent[slot] = value;
  wait_for_warp(mask, file, line);
  return from.sent[slot];
}

extern "C" {

extern unsigned long long __start_shared[], __stop_shared[];  // by the linker
void __asan_poison_memory_region(const volatile void* first, size_t bytes);
void __asan_unpoison_memory_region(const volatile void* first, size_t bytes);

// Runs blocks in the order given. Returns null, or what was found; then the process is of no more
// use.
const char* run(void (*a_kernel)(const void*), const void* its_params, const unsigned int* blocks,
                size_t count, unsigned int threads, unsigned int order) {
  kernel = a_kernel;
  params = its_params;
  Order chosen(order);
  for (size_t i = 0; i < count; ++i) {
    blockIdx.x = blocks[i];
    // Memory that was never written holds NaN of any type.
    for (volatile unsigned long long* word = __start_shared; word < __stop_shared; ++word) {
      *word = ~0ull;
    }
    if (!run_block(threads, chosen)) {
      return finding.c_str();
    }
  }
  return nullptr;
}

// Forbids ranges of bytes: pairs of offsets from `memory`.
void forbid(const char* memory, const size_t* ranges, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    __asan_poison_memory_region(memory + ranges[2 * i], ranges[2 * i + 1] - ranges[2 * i]);
  }
}

void allow(const char* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
}
