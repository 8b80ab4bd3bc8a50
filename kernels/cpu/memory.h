// Memory for results. Images are so large that malloc gives their memory back to the system when they are freed, and
// the system adds pages to the next one as it is written: that took an eighth of a training step. So a freed block is
// kept, idle, for the next result of its size.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>

namespace sfg {

// Used and idle blocks together never exceed 5/4 of the most that was ever in use. (Without the quarter, the sizes of
// the forward pass would drive out those of the backward pass, and the other way round.)
class Memory {
 public:
    static Memory& instance();  // of the process

    Memory() = default;
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    // Returns a block of at least `bytes`, aligned to 64 bytes, and sets `bytes` to its size. Throws std::bad_alloc.
    void* take(size_t& bytes);
    // Takes a block back; `bytes` is the size that `take` set.
    void give(void* block, size_t bytes) noexcept;
    // Bytes of used and idle blocks.
    size_t held();

 private:
    void drop_until(size_t bytes);  // frees idle blocks, the largest first, until they have at most `bytes`

    std::mutex mutex_;
    std::multimap<size_t, void*> idle_blocks_;  // by size
    size_t used_ = 0, idle_ = 0, most_ = 0;

    friend void before_fork(), after_fork();
};

}  // namespace sfg
