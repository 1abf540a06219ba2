// Memory of CPU tensors. The same large tensors come and go in every layer. Given back to the system each time, they come
// again zeroed page by page; left to the C library's heap, they lie between others that are kept, and a run then holds a
// tenth to a quarter more than its tensors ever needed at once. Here large pieces are pages of their own, kept when they are
// freed; but never more is held, free pieces included, than live tensors have needed at once.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <malloc.h>
#include <map>
#include <mutex>
#include <utility>
#include <sys/mman.h>

namespace {

// Pages from the system, in pieces of any number of them. A free piece may serve a smaller one, and free pieces that adjoin
// become one, whichever calls of the system they came by.
class Pages {
 public:
  static constexpr size_t kPage = 4096;

  // `bytes` is a multiple of kPage. Null if the system has no more.
  char* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    char* piece = take_free(bytes);
    if (!piece) {
      shrink_to(std::max(most_live_, live_ + bytes) - bytes);
      piece = map(bytes);
      if (!piece) {
        shrink_to(live_);
        piece = map(bytes);
      }
      if (!piece) return nullptr;
    }
    live_ += bytes;
    most_live_ = std::max(most_live_, live_);
    return piece;
  }

  void give(char* piece, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    live_ -= bytes;
    auto next = free_.lower_bound(piece);
    if (next != free_.end() && piece + bytes == next->first) {
      bytes += next->second.bytes;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second.bytes == piece) {
        before->second = {before->second.bytes + bytes, ++freed_};
        return;
      }
    }
    free_.emplace_hint(next, piece, Free{bytes, ++freed_});
  }

  // Gives all free pieces back to the system, and begins anew to count what is needed at once.
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    shrink_to(live_);
    most_live_ = live_;
  }

 private:
  struct Free {
    size_t bytes;
    uint64_t since;  // which of all the calls of `give` made it what it is
  };

  // The smallest free piece that is large enough; what is left of it stays free.
  char* take_free(size_t bytes) {
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it)
      if (it->second.bytes >= bytes && (best == free_.end() || it->second.bytes < best->second.bytes)) best = it;
    if (best == free_.end()) return nullptr;
    auto [piece, found] = *best;
    auto next = free_.erase(best);
    if (found.bytes > bytes) free_.emplace_hint(next, piece + bytes, Free{found.bytes - bytes, found.since});
    return piece;
  }

  // Gives free pieces back, those that were free longest first, until no more than `bytes` are held.
  void shrink_to(size_t bytes) {
    while (held_ > bytes && !free_.empty()) {
      auto oldest = free_.begin();
      for (auto it = free_.begin(); it != free_.end(); ++it)
        if (it->second.since < oldest->second.since) oldest = it;
      const size_t part = std::min(oldest->second.bytes, held_ - bytes);
      // Fails only where the process has too many pieces of memory apart; this one then stays.
      if (munmap(oldest->first + (oldest->second.bytes - part), part) != 0) return;
      held_ -= part;
      oldest->second.bytes -= part;
      if (oldest->second.bytes == 0) free_.erase(oldest);
    }
  }

  char* map(size_t bytes) {
    void* piece = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (piece == MAP_FAILED) return nullptr;
    held_ += bytes;
    // Pages of 2 MiB where the system has them: they come in one go.
    madvise(piece, bytes, MADV_HUGEPAGE);
    return static_cast<char*>(piece);
  }

  std::mutex mutex_;
  std::map<char*, Free> free_;
  size_t live_ = 0;       // bytes of pieces in use
  size_t most_live_ = 0;  // the most there ever were
  size_t held_ = 0;       // bytes of all pieces
  uint64_t freed_ = 0;
};

// Of this thread, for tests of what happens when memory runs out: how often it allocated, and which time fails.
thread_local int64_t n_allocations = 0;
thread_local int64_t refused_allocation = 0;

// Large tensors by pages, small ones by the C library, both aligned by hand: glibc's aligned allocation takes more room to
// find than it keeps, and a freed piece never serves the next tensor of the same size.
class TensorHeap final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes > 0) {
      data = ++n_allocations == refused_allocation ? nullptr : bytes < kLarge ? small(bytes) : large(bytes);
      TORCH_CHECK(data, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
    }
    return {data, data, &release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Lives on to the end of the process: tensors may be freed after everything else.
  static TensorHeap& the() {
    static auto* heap = new TensorHeap;
    return *heap;
  }

  Pages pages;

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kLarge = 64 << 10;  // the last page, half empty on average, is then 3 % at most

  // Stands right before the data.
  struct Origin {
    char* piece;
    size_t bytes;  // of pages; 0 for a piece of the C library
  };

  void* small(size_t bytes) {
    auto* piece = static_cast<char*>(std::malloc(bytes + kAlignment));
    if (!piece) {
      pages.release();
      piece = static_cast<char*>(std::malloc(bytes + kAlignment));
    }
    // Pieces are multiples of 16, so that there is room for the origin before the data.
    return piece ? place(piece, kAlignment - reinterpret_cast<uintptr_t>(piece) % kAlignment, 0) : nullptr;
  }

  void* large(size_t bytes) {
    const size_t whole = (bytes + kAlignment + Pages::kPage - 1) / Pages::kPage * Pages::kPage;
    char* piece = whole > bytes ? pages.take(whole) : nullptr;
    return piece ? place(piece, kAlignment, whole) : nullptr;
  }

  static void* place(char* piece, size_t offset, size_t bytes) {
    char* data = piece + offset;
    reinterpret_cast<Origin*>(data)[-1] = {piece, bytes};
    return data;
  }

  static void release(void* data) {
    if (!data) return;
    const Origin origin = static_cast<Origin*>(data)[-1];
    if (origin.bytes == 0)
      std::free(origin.piece);
    else
      the().pages.give(origin.piece, origin.bytes);
  }
};

}  // namespace

extern "C" {

// From now on tensors on the CPU lie in `TensorHeap`, and the C library keeps what it is given back: the work space of products.
void bellora_keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest value there is
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  c10::SetCPUAllocator(&TensorHeap::the());
#endif
}

// Gives what is kept so back to the system.
void bellora_release_freed_memory() {
#if defined(__GLIBC__)
  TensorHeap::the().pages.release();
  malloc_trim(0);
#endif
}

// Counts this thread's allocations of tensors in that heap anew, and has one of them fail; 0 is none. Returns how many there were.
int64_t bellora_refuse_allocation(int64_t nth) {
  refused_allocation = nth;
  return std::exchange(n_allocations, 0);
}

}  // extern "C"
