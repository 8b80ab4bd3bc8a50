// The instruction sets that this processor can run, and their inner loops.
#include <cstring>

#include "routed_conv.h"

namespace sfg {

#ifdef SFG_X86
const char* const* instruction_sets() {
    static const char* const all[] = {"avx512", "avx2", "portable", nullptr};
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? all : avx2 ? all + 1 : all + 2;
}
#else
const char* const* instruction_sets() {
    static const char* const all[] = {"portable", nullptr};
    return all;
}
#endif

namespace {

#ifdef SFG_X86
#define SFG_SETS(T)                                               \
    {"avx512", &avx512::loops_##T}, {"avx2", &avx2::loops_##T}, { \
        "portable", &portable::loops_##T                          \
    }
#else
#define SFG_SETS(T) {"portable", &portable::loops_##T}
#endif

template <typename T>
struct Named {
    const char* name;
    const InnerLoops<T>* loops;
};

template <typename T>
const InnerLoops<T>* find(const Named<T>* sets, const char* name) {
    for (const char* const* known = instruction_sets(); *known; known++)
        if (!std::strcmp(*known, name))
            for (;; sets++)
                if (!std::strcmp(sets->name, name)) return sets->loops;
    return nullptr;
}

}  // namespace

template <>
const InnerLoops<float>* inner_loops<float>(const char* name) {
    static const Named<float> sets[] = {SFG_SETS(float)};
    return find(sets, name);
}

template <>
const InnerLoops<double>* inner_loops<double>(const char* name) {
    static const Named<double> sets[] = {SFG_SETS(double)};
    return find(sets, name);
}

}  // namespace sfg
