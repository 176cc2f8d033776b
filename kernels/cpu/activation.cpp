// An activation of each element: reads x, writes y.
//
// Traffic: twice the element size. Precision: as activation.h, rounded once.
// Proof: tests/kernels/cpu/test_activation.py.
#include "activation.h"

#include "floats.h"

namespace fastddpm::FASTDDPM_ISA {

void activation(const Call& call) {
    Arguments a(call);
    int64_t total = a.size();
    auto y = a.pointer<char>();  // [total] in dtype
    auto x = a.pointer<char>();  // like y; may be y
    int64_t which = a.size();
    Share share(total, call);
    with_float(a.size(), [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto from = reinterpret_cast<const T*>(x);
        auto to = reinterpret_cast<T*>(y);
        for (int64_t i = share.first; i < share.last; i += LANES) {
            int count = int(smaller<int64_t>(LANES, share.last - i));
            Lanes values[1] = {load(from + i, count)};
            activate(values, which);
            store(values[0], to + i, count);
        }
    });
}

}  // namespace fastddpm::FASTDDPM_ISA
