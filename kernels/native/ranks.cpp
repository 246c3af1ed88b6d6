// Ranks of one instance meet in memory that their processes share: sums and gathers of tensors, and the words on which
// rings of messages wait (kernels/ranks.py has the memory's layout).
//
// A word is written by one rank and counts up; others wait until it has reached a value, first spinning, then asleep in
// the kernel. Each rank keeps a lock on its byte of the file for as long as it lives, so that a waiter sees the death
// of the one it waits for. Whoever loses another aborts the meeting: no rank waits for ever, none computes on.
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxRanks = 8;
constexpr int64_t kBlock = 1024;         // elements summed at once, in L1
constexpr int64_t kShared = 64 << 10;    // bytes from which ranks share the work of a sum
constexpr long kLookNs = 20'000'000;     // asleep at most, before a waiter looks whether the other one lives

enum Result : int { kDone = 0, kAborted = 1, kDead = 2, kLate = 3 };  // with the rank in the bits above kRankShift
constexpr int kRankShift = 4;

struct alignas(64) Word {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};

enum : int { kAbort = 0, kGeneration = 2 };  // numbers of words

struct Ranks {
  Word* words;
  int num_words;
  std::atomic<uint8_t>* joined;  // [num_ranks]
  char* slots;                   // [num_ranks, 2, slot_bytes]
  int64_t slot_bytes;
  int fd, rank, num_ranks;
  std::atomic<int64_t> spin_ns;
  uint32_t generation = 0;
  uint32_t num_chunks = 0;  // a chunk's number decides which of a rank's two slots it takes

  char* slot(int of_rank) const { return slots + (2 * of_rank + num_chunks % 2) * slot_bytes; }
};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wake(Word& word) {
  if (word.sleepers.load() > 0) syscall(SYS_futex, &word.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void add(Word& word, uint32_t amount) {
  word.value.fetch_add(amount);
  wake(word);
}

bool has_reached(const Word& word, uint32_t value) {
  return static_cast<int32_t>(word.value.load(std::memory_order_acquire) - value) >= 0;
}

void abort_meeting(Ranks& r) {
  r.words[kAbort].value.store(1);
  for (int i = 0; i < r.num_words; ++i) wake(r.words[i]);
}

struct flock byte_of(int rank, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

bool lives(const Ranks& r, int rank) {
  if (!r.joined[rank].load()) return true;  // its process is starting
  struct flock lock = byte_of(rank, F_WRLCK);
  return fcntl(r.fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

int lose(Ranks& r, int result, int rank) {
  abort_meeting(r);
  return result | rank << kRankShift;
}

// Waits until `word`, which `owner` writes (none: -1), has reached `value`. A time-out ends the meeting if `is_fatal`.
int wait(Ranks& r, Word& word, uint32_t value, int owner, Clock::time_point deadline, bool is_fatal) {
  const Word& abort = r.words[kAbort];
  if (has_reached(word, value)) return kDone;  // even after an abort: all that was to come has come
  const auto spin_end = Clock::now() + std::chrono::nanoseconds(r.spin_ns.load(std::memory_order_relaxed));
  do {
    for (int i = 0; i < 64; ++i) {
      if (has_reached(word, value)) return kDone;
      if (abort.value.load(std::memory_order_relaxed)) return kAborted;
      relax();
    }
  } while (Clock::now() < spin_end);
  for (;;) {
    word.sleepers.fetch_add(1);
    const uint32_t seen = word.value.load();
    const bool must_sleep = static_cast<int32_t>(seen - value) < 0 && !abort.value.load();
    if (must_sleep) {
      const timespec limit{0, kLookNs};
      syscall(SYS_futex, &word.value, FUTEX_WAIT, seen, &limit, nullptr, 0);
    }
    word.sleepers.fetch_sub(1);
    if (has_reached(word, value)) return kDone;
    if (abort.value.load()) return kAborted;
    if (owner >= 0 && !lives(r, owner)) return lose(r, kDead, owner);
    if (Clock::now() >= deadline) return is_fatal ? lose(r, kLate, std::max(owner, 0)) : int{kLate};
  }
}

Clock::time_point in(int64_t timeout_us) {
  return timeout_us < 0 ? Clock::time_point::max() : Clock::now() + std::chrono::microseconds(timeout_us);
}

// Returns when every rank has come as far as this one.
int meet(Ranks& r, Clock::time_point deadline) {
  add(r.words[kGeneration + r.rank], 1);
  ++r.generation;
  for (int rank = 0; rank < r.num_ranks; ++rank)
    if (rank != r.rank)
      if (int result = wait(r, r.words[kGeneration + rank], r.generation, rank, deadline, true)) return result;
  return kDone;
}

struct Float {
  using T = float;
  static float load(T x) { return x; }
  static T store(float x) { return x; }
};

struct Bfloat16 {
  using T = uint16_t;
  static float load(T x) {
    const uint32_t bits = uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static T store(float x) {  // to nearest even, as torch rounds
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<T>(x != x ? 0x7fc0 : rounded);
  }
};

// out = the ranks' slots summed in the order of ranks, in float32.
template <class E>
void sum(const Ranks& r, int64_t begin, int64_t end, typename E::T* out) {
  float total[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    for (int rank = 0; rank < r.num_ranks; ++rank) {
      const auto* from = reinterpret_cast<const typename E::T*>(r.slot(rank)) + at;
      if (rank == 0)
        for (int64_t i = 0; i < count; ++i) total[i] = E::load(from[i]);
      else
        for (int64_t i = 0; i < count; ++i) total[i] += E::load(from[i]);
    }
    for (int64_t i = 0; i < count; ++i) out[at - begin + i] = E::store(total[i]);
  }
}

// A chunk is summed by each rank for itself, or where that is too much work, a part by each rank for all.
//
// A slot is written again two chunks later, when all ranks have met once more: so all have read it.
template <class E>
int all_reduce(Ranks& r, typename E::T* x, int64_t count, Clock::time_point deadline) {
  using T = typename E::T;
  const int64_t capacity = r.slot_bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < count; at += capacity) {
    const int64_t size = std::min(capacity, count - at);
    const bool shares = r.num_ranks > 2 && size * static_cast<int64_t>(sizeof(T)) >= kShared;
    T* own = reinterpret_cast<T*>(r.slot(r.rank));
    std::memcpy(own, x + at, size * sizeof(T));
    if (int result = meet(r, deadline)) return result;
    if (!shares) {
      sum<E>(r, 0, size, x + at);
    } else {
      const auto begin_of = [&](int rank) { return size * rank / r.num_ranks; };
      // into its own slot: no other rank reads this part of it before the next meeting
      sum<E>(r, begin_of(r.rank), begin_of(r.rank + 1), own + begin_of(r.rank));
      if (int result = meet(r, deadline)) return result;
      for (int rank = 0; rank < r.num_ranks; ++rank) {
        const int64_t begin = begin_of(rank);
        std::memcpy(x + at + begin, reinterpret_cast<const T*>(r.slot(rank)) + begin,
                    (begin_of(rank + 1) - begin) * sizeof(T));
      }
    }
    ++r.num_chunks;
  }
  return kDone;
}

// Copies bytes [begin, end) of a matrix with rows of `width` bytes into the columns of a wider one.
void copy_columns(const char* from, int64_t begin, int64_t end, int64_t width, char* to, int64_t pitch) {
  while (begin < end) {
    const int64_t row = begin / width, column = begin % width;
    const int64_t run = std::min(end - begin, width - column);
    std::memcpy(to + row * pitch + column, from, run);
    from += run;
    begin += run;
  }
}

}  // namespace

extern "C" {

// Takes the lock of `rank`; null where another process has it.
void* pd_ranks_join(void* words, int num_words, void* joined, void* slots, int64_t slot_bytes, int fd, int rank,
                    int num_ranks) {
  struct flock lock = byte_of(rank, F_WRLCK);
  if (num_ranks > kMaxRanks || fcntl(fd, F_OFD_SETLK, &lock) != 0) return nullptr;
  auto* r = new Ranks{};
  r->words = static_cast<Word*>(words);
  r->num_words = num_words;
  r->joined = static_cast<std::atomic<uint8_t>*>(joined);
  r->slots = static_cast<char*>(slots);
  r->slot_bytes = slot_bytes;
  r->fd = fd;
  r->rank = rank;
  r->num_ranks = num_ranks;
  r->joined[rank].store(1);
  return r;
}

void pd_ranks_leave(void* ranks) {
  auto* r = static_cast<Ranks*>(ranks);
  struct flock lock = byte_of(r->rank, F_UNLCK);
  fcntl(r->fd, F_OFD_SETLK, &lock);
  delete r;
}

void pd_ranks_set_spin(void* ranks, int64_t spin_ns) { static_cast<Ranks*>(ranks)->spin_ns.store(spin_ns); }

void pd_ranks_abort(void* ranks) { abort_meeting(*static_cast<Ranks*>(ranks)); }

void pd_ranks_add(void* ranks, int word, uint32_t amount) { add(static_cast<Ranks*>(ranks)->words[word], amount); }

uint32_t pd_ranks_value(void* ranks, int word) {
  return static_cast<Ranks*>(ranks)->words[word].value.load(std::memory_order_acquire);
}

int pd_ranks_wait(void* ranks, int word, uint32_t value, int owner, int64_t timeout_us, int is_fatal) {
  auto& r = *static_cast<Ranks*>(ranks);
  return wait(r, r.words[word], value, owner, in(timeout_us), is_fatal);
}

int pd_ranks_meet(void* ranks, int64_t timeout_us) { return meet(*static_cast<Ranks*>(ranks), in(timeout_us)); }

// x [count] of float32 or bfloat16 becomes the sum over ranks.
int pd_ranks_all_reduce(void* ranks, int bf16, void* x, int64_t count, int64_t timeout_us) {
  auto& r = *static_cast<Ranks*>(ranks);
  if (bf16) return all_reduce<Bfloat16>(r, static_cast<uint16_t*>(x), count, in(timeout_us));
  return all_reduce<Float>(r, static_cast<float*>(x), count, in(timeout_us));
}

// The ranks' matrices of `rows` rows, of widths[rank] bytes, become the columns of `out`, on rank 0 or on all ranks.
int pd_ranks_gather(void* ranks, const char* x, int64_t rows, const int64_t* widths, char* out, int to_all,
                    int64_t timeout_us) {
  auto& r = *static_cast<Ranks*>(ranks);
  const auto deadline = in(timeout_us);
  int64_t pitch = 0, longest = 0;
  for (int rank = 0; rank < r.num_ranks; ++rank) {
    pitch += widths[rank];
    longest = std::max(longest, rows * widths[rank]);
  }
  for (int64_t at = 0; at < longest; at += r.slot_bytes) {
    const auto end_of = [&](int rank) { return std::max(at, std::min(at + r.slot_bytes, rows * widths[rank])); };
    if (to_all || r.rank != 0) std::memcpy(r.slot(r.rank), x + at, end_of(r.rank) - at);
    if (int result = meet(r, deadline)) return result;
    char* to = out;
    for (int rank = 0; (to_all || r.rank == 0) && rank < r.num_ranks; to += widths[rank++])
      copy_columns(rank == r.rank ? x + at : r.slot(rank), at, end_of(rank), widths[rank], to, pitch);
    ++r.num_chunks;
  }
  return kDone;
}

}  // extern "C"
