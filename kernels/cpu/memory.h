// Memory for results. Images are so large that malloc gives them back to the system when they are freed, and the next
// one is filled with pages anew as it is written, which took an eighth of a training step. So blocks are kept for the
// next result of their size.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>

namespace sfg {

// Blocks in use and kept ones together are never more than 5/4 of what was in use at a time at the most. (With no room
// between them, the sizes of the forward pass would drive out those of the backward pass, and the other way round.)
class Memory {
 public:
    static Memory& instance();  // of the process

    Memory() = default;
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    // At least `bytes`, aligned to 64 bytes; written into `bytes` is how much it is. Throws std::bad_alloc.
    void* take(size_t& bytes);
    void give(void* block, size_t bytes) noexcept;  // of that very size
    size_t held();                                  // in use and kept

 private:
    void drop_until(size_t bytes);  // kept ones, the largest first

    std::mutex mutex_;
    std::multimap<size_t, void*> kept_;  // by size
    size_t used_ = 0, idle_ = 0, most_ = 0;

    friend void before_fork(), after_fork();
};

}  // namespace sfg
