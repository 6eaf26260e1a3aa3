#include "workshop.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "train.h"

namespace gemel {
namespace {

constexpr size_t kLargePage = size_t{1} << 21;

}  // namespace

Memory::~Memory() { std::free(data_); }

void* Memory::at_least(size_t bytes) {
    if (bytes <= bytes_) return data_;
    std::free(data_);
    bytes_ = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    data_ = std::aligned_alloc(kLargePage, bytes_);
    if (!data_) std::abort();
#if defined(__linux__)
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    return data_;
}

}  // namespace gemel

extern "C" {

gemel_workshop* gemel_workshop_new(int32_t threads) { return reinterpret_cast<gemel_workshop*>(new gemel::Workshop(threads)); }

void gemel_workshop_free(gemel_workshop* workshop) { delete reinterpret_cast<gemel::Workshop*>(workshop); }

}  // extern "C"
