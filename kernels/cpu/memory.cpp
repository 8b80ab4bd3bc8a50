#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "scratch.h"

#ifdef __linux__
#include <pthread.h>
#endif

namespace sfg {
namespace {

constexpr size_t PIECE = size_t(64) << 10;  // every size is a multiple of it
constexpr size_t HUGE_PAGE = size_t(2) << 20;

}  // namespace

// If a process forked while another thread held the lock, the child would wait for it forever.
void before_fork() {
    Memory::instance().mutex_.lock();
}
void after_fork() {
    Memory::instance().mutex_.unlock();
}

Memory& Memory::instance() {
    static Memory* const memory = [] {  // it is never destroyed: results may outlive everything else
        Memory* const created = new Memory;
#ifdef __linux__
        pthread_atfork(before_fork, after_fork, after_fork);
#endif
        return created;
    }();
    return *memory;
}

Memory::~Memory() {
    for (const auto& [size, block] : idle_blocks_) std::free(block);
}

void* Memory::take(size_t& bytes) {
    const size_t wanted = (std::max<size_t>(bytes, 1) + PIECE - 1) / PIECE * PIECE;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = idle_blocks_.lower_bound(wanted);
    if (found != idle_blocks_.end() && found->first <= wanted + wanted / 8) {
        found = std::prev(
            idle_blocks_.upper_bound(found->first));  // the last one that came back: it may still be in a cache
        void* const block = found->second;
        bytes = found->first;
        idle_blocks_.erase(found);
        idle_ -= bytes, used_ += bytes, most_ = std::max(most_, used_);
        return block;
    }
    const size_t most = std::max(most_, used_ + wanted);
    drop_until(most + most / 4 - used_ - wanted);
    void* block = std::aligned_alloc(wanted < HUGE_PAGE ? 64 : HUGE_PAGE,
                                     wanted < HUGE_PAGE ? wanted : (wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (!block) throw std::bad_alloc();
    advise_large_pages(block, int64_t(wanted / HUGE_PAGE * HUGE_PAGE));
    bytes = wanted;
    used_ += wanted, most_ = most;
    return block;
}

void Memory::give(void* block, size_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= bytes;
    try {
        idle_blocks_.emplace(bytes, block);
        idle_ += bytes;
    } catch (const std::bad_alloc&) {
        std::free(block);
    }
}

size_t Memory::held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_ + idle_;
}

void Memory::drop_until(size_t bytes) {
    while (idle_ > bytes) {
        const auto largest = std::prev(idle_blocks_.end());
        std::free(largest->second);
        idle_ -= largest->first;
        idle_blocks_.erase(largest);
    }
}

}  // namespace sfg
