// The Python module: chooses the kernels of an instruction set, and runs them on the threads that torch has.
//
// It uses neither torch's headers nor its libraries: pointers and sizes come in, and OpenMP's functions are those of
// the library that torch has loaded, so that there is one pool of threads.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <dlfcn.h>

#ifdef FASTDDPM_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstring>

#define FASTDDPM_ISA module
#include "kernel.h"

#define FASTDDPM_KERNELS(X)     /* name, phases, words of a call */ \
    X(activation, 1, 5)                                         \
    X(attention, 2, 8)                                          \
    X(commit, 1, 12)                                            \
    X(conditional_step, 1, 18)                                  \
    X(convolution, 1, 25)                                       \
    X(draft, 1, 18)                                             \
    X(eps_loss, 2, 14)                                          \
    X(eps_loss_backward, 1, 14)                                 \
    X(first_difference, 1, 13)                                  \
    X(group_norm, 3, 23)                                        \
    X(interleave, 1, 8)                                         \
    X(noising, 1, 11)                                           \
    X(normal, 1, 6)                                             \
    X(pack, 1, 8)                                               \
    X(resample, 1, 8)                                           \
    X(residual, 1, 7)                                           \
    X(step, 1, 13)                                              \
    X(x_0_error, 2, 13)

#define DECLARE(name, phases, words) void name(const Call&);
#define FUNCTION(name, phases, words) name,
#define INSTRUCTION_SET(isa)                                 \
    namespace fastddpm::isa {                                \
    int columns();                                           \
    bool multiplies_bfloat16();                              \
    FASTDDPM_KERNELS(DECLARE)                                \
    const Function kernels[] = {FASTDDPM_KERNELS(FUNCTION)}; \
    }

// AVX-512 with products of bfloat16.
#define EXTENSION(isa)                                                                                   \
    namespace fastddpm::isa {                                                                            \
    int columns();                                                                                       \
    bool multiplies_bfloat16();                                                                          \
    void attention(const Call&);                                                                         \
    void convolution(const Call&);                                                                       \
    void pack(const Call&);                                                                              \
    using avx512::activation, avx512::commit, avx512::conditional_step, avx512::draft, avx512::eps_loss; \
    using avx512::eps_loss_backward, avx512::first_difference, avx512::group_norm;                       \
    using avx512::interleave, avx512::noising, avx512::normal, avx512::resample, avx512::residual;       \
    using avx512::step, avx512::x_0_error;                                                               \
    const Function kernels[] = {FASTDDPM_KERNELS(FUNCTION)};                                             \
    }

namespace fastddpm {
using Function = void (*)(const Call&);
}

INSTRUCTION_SET(portable)
#ifdef FASTDDPM_X86
INSTRUCTION_SET(avx2)
INSTRUCTION_SET(avx512)
#endif
#ifdef FASTDDPM_AVX512_BF16
EXTENSION(avx512_bf16)
#endif
#ifdef FASTDDPM_AMX
EXTENSION(amx)
#endif

namespace fastddpm {
namespace {

// Work, in elements, that is worth a thread. A fork and join takes some microseconds; the calls of a program share one,
// so less is enough there.
constexpr int64_t GRAIN = 8192, GRAIN_OF_PROGRAM = 1024;
constexpr int MOST_WORDS = 32;

#define NAME(name, phases, words) #name,
#define PHASE(name, phases, words) phases,
#define WORD(name, phases, words) words,
constexpr const char* NAMES[] = {FASTDDPM_KERNELS(NAME)};
constexpr int PHASES[] = {FASTDDPM_KERNELS(PHASE)};
constexpr int WORDS[] = {FASTDDPM_KERNELS(WORD)};
constexpr int KERNELS = sizeof NAMES / sizeof *NAMES;

struct InstructionSet {
    const char* name;
    const Function* kernels;
    int (*columns)();
    bool (*multiplies_bfloat16)();
    bool (*supported)();
};

#define ENTRY(isa, supported) {#isa, isa::kernels, isa::columns, isa::multiplies_bfloat16, supported}

#ifdef FASTDDPM_X86
// Bits of the seventh leaf of CPUID: register 0 to 3 is eax to edx.
bool has_feature(unsigned subleaf, int index, int bit) {
    unsigned registers[4];
    return __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) &&
           (registers[index] >> bit & 1);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && has_feature(1, 0, 5); }

// Linux gives the tile registers to processes that ask for them.
bool has_amx() {
#ifdef __linux__
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    return has_avx512_bf16() && has_feature(0, 3, 22) && has_feature(0, 3, 24) &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

const InstructionSet INSTRUCTION_SETS[] = {
#ifdef FASTDDPM_AMX
    ENTRY(amx, has_amx),
#endif
#ifdef FASTDDPM_AVX512_BF16
    ENTRY(avx512_bf16, has_avx512_bf16),
#endif
#ifdef FASTDDPM_X86
    ENTRY(avx512, has_avx512),
    ENTRY(avx2, has_avx2),
#endif
    ENTRY(portable, [] { return true; }),
};

const InstructionSet* chosen = nullptr;

// The OpenMP runtime of torch. GOMP_parallel is also a function of LLVM's and Intel's runtimes.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    void (*barrier)() = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
    const char* path = nullptr;

    void find() {
        void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        auto load = [&](auto& function, const char* name) {
            void* symbol = torch ? dlsym(torch, name) : nullptr;
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(
                symbol ? symbol : dlsym(RTLD_DEFAULT, name));
        };
        load(parallel, "GOMP_parallel");
        load(barrier, "GOMP_barrier");
        load(thread, "omp_get_thread_num");
        load(threads, "omp_get_num_threads");
        Dl_info info;
        if (!parallel || !barrier || !thread || !threads)
            parallel = nullptr;
        else if (dladdr(reinterpret_cast<void*>(parallel), &info))
            path = info.dli_fname;
        if (torch) dlclose(torch);
    }
} openmp;

// A program is a sequence of calls, each [kernel, work, count, words...].
constexpr int64_t HEAD = 3;

// Words that begin with these 16 bits, which are those of a NaN, stand for a pointer that is given when a program runs:
// 8 bits say which one, and 40 bits are added to it.
constexpr uint64_t GIVEN = 0x7FFF;

struct Program {
    const int64_t *first, *last;
    const int64_t* given;
    int64_t grain;

    int64_t resolved(int64_t word) const {
        uint64_t bits = uint64_t(word);
        return bits >> 48 == GIVEN ? given[bits >> 40 & 0xFF] + int64_t(bits & 0xFFFFFFFFFF) : word;
    }

    void run(int thread, int threads) const {
        int64_t words[MOST_WORDS];
        for (const int64_t* call = first; call < last; call += HEAD + call[2]) {
            int64_t useful = call[1] / grain + 1, active = useful < threads ? useful : threads;
            for (int64_t i = 0; i < call[2]; ++i) words[i] = resolved(call[HEAD + i]);
            for (int phase = 0; phase < PHASES[call[0]]; ++phase) {
                if (thread < active) chosen->kernels[call[0]]({words, phase, thread, int(active)});
                if (threads > 1) openmp.barrier();
            }
        }
    }
};

void run_in_parallel(const Program& program, int64_t threads) {
    if (!openmp.parallel || threads <= 1) return program.run(0, 1);
    auto run = [](void* data) { static_cast<const Program*>(data)->run(openmp.thread(), openmp.threads()); };
    openmp.parallel(run, const_cast<Program*>(&program), unsigned(threads), 0);
}

// One argument of a kernel: a whole number, a float, or None for a null pointer.
bool word_of(PyObject* argument, int64_t& word) {
    if (argument == Py_None) {
        word = 0;
    } else if (PyFloat_Check(argument)) {
        double value = PyFloat_AsDouble(argument);
        std::memcpy(&word, &value, sizeof word);
    } else {
        word = PyLong_AsLongLong(argument);
        return word != -1 || !PyErr_Occurred();
    }
    return true;
}

// kernel(threads, work, *words)
PyObject* call_kernel(int index, int words, PyObject* const* arguments, Py_ssize_t count) {
    int64_t call[HEAD + MOST_WORDS], threads;
    if (count != words + 2) return PyErr_Format(PyExc_TypeError, "got %zd arguments, want %d", count, words + 2);
    if (!word_of(arguments[0], threads)) return nullptr;
    for (Py_ssize_t i = 1; i < count; ++i)
        if (!word_of(arguments[i], call[i == 1 ? 1 : HEAD + i - 2])) return nullptr;
    if (!chosen) return PyErr_Format(PyExc_RuntimeError, "no instruction set is chosen: call use() first");
    call[0] = index, call[2] = words;
    Program program{call, call + HEAD + words, nullptr, GRAIN};
    int64_t useful = call[1] / GRAIN + 1;
    PyThreadState* state = PyEval_SaveThread();
    run_in_parallel(program, useful < threads ? useful : threads);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

// replay(threads, program, *given)
PyObject* replay(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    int64_t threads, given[MOST_WORDS];
    char* bytes;
    Py_ssize_t size;
    if (count < 2 || count > 2 + MOST_WORDS) return PyErr_Format(PyExc_TypeError, "got %zd arguments", count);
    if (!word_of(arguments[0], threads) || PyBytes_AsStringAndSize(arguments[1], &bytes, &size)) return nullptr;
    for (Py_ssize_t i = 2; i < count; ++i)
        if (!word_of(arguments[i], given[i - 2])) return nullptr;
    auto words = reinterpret_cast<const int64_t*>(bytes);
    Program program{words, words + size / 8, given, GRAIN_OF_PROGRAM};
    PyThreadState* state = PyEval_SaveThread();
    run_in_parallel(program, threads);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

// record(name, work, *words) -> the bytes of a call in a program
PyObject* record(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    int64_t call[HEAD + MOST_WORDS];
    for (int index = 0; index < KERNELS && count >= 2; ++index) {
        if (PyUnicode_CompareWithASCIIString(arguments[0], NAMES[index])) continue;
        if (count != WORDS[index] + 2) break;
        for (Py_ssize_t i = 1; i < count; ++i)
            if (!word_of(arguments[i], call[i == 1 ? 1 : HEAD + i - 2])) return nullptr;
        call[0] = index, call[2] = WORDS[index];
        return PyBytes_FromStringAndSize(reinterpret_cast<char*>(call), (HEAD + WORDS[index]) * 8);
    }
    return PyErr_Format(PyExc_TypeError, "record: no kernel has this name and %zd words", count - 2);
}

enum Index {
#define INDEX(name, phases, words) INDEX_##name,
    FASTDDPM_KERNELS(INDEX)
};

#define WRAPPER(name, phases, words)                                                 \
    PyObject* call_##name(PyObject*, PyObject* const* arguments, Py_ssize_t count) { \
        static_assert(words + 2 <= MOST_WORDS);                                      \
        return call_kernel(INDEX_##name, words, arguments, count);                   \
    }
FASTDDPM_KERNELS(WRAPPER)

PyObject* use(PyObject*, PyObject* name) {
    for (const InstructionSet& set : INSTRUCTION_SETS)
        if (set.supported() && PyUnicode_CompareWithASCIIString(name, set.name) == 0) {
            chosen = &set;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "instruction set %R is unknown, or this CPU does not have it", name);
}

PyObject* supported(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const InstructionSet& set : INSTRUCTION_SETS) {
        if (!names || !set.supported()) continue;
        PyObject* name = PyUnicode_FromString(set.name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyObject* panel_columns(PyObject*, PyObject*) { return PyLong_FromLong(chosen ? chosen->columns() : 0); }

PyObject* bfloat16(PyObject*, PyObject*) { return PyBool_FromLong(chosen && chosen->multiplies_bfloat16()); }

PyObject* openmp_path(PyObject*, PyObject*) {
    if (!openmp.parallel) Py_RETURN_NONE;
    return PyUnicode_FromString(openmp.path ? openmp.path : "");
}

#define FAST(name, function, text) \
    {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, text}
#define METHOD(name, phases, words) FAST(#name, call_##name, nullptr),
PyMethodDef methods[] = {
    FASTDDPM_KERNELS(METHOD)
        FAST("record", record, "record(kernel, work, *words) -> the bytes of a call; a program is a sequence of them."),
    FAST("replay", replay, "replay(threads, program, *pointers): run a program with the pointers that it is given."),
    {"columns", panel_columns, METH_NOARGS, "The output channels of a panel of packed weights."},
    {"bfloat16", bfloat16, METH_NOARGS, "Whether convolutions and attention take bfloat16."},
    {"use", use, METH_O, "Choose the instruction set by its name; ValueError if this CPU does not have it."},
    {"supported", supported, METH_NOARGS, "The names of the instruction sets of this CPU, the fastest one first."},
    {"openmp", openmp_path, METH_NOARGS, "The file of the OpenMP runtime; None: there is none, so one thread works."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace fastddpm

PyMODINIT_FUNC PyInit__native() {
    fastddpm::openmp.find();
    return PyModule_Create(&fastddpm::definition);
}
