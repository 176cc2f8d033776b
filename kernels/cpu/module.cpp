// The Python module: chooses the kernels of an instruction set, and runs them on the threads that torch has.
//
// It uses neither torch's headers nor its libraries: pointers and sizes come in, and OpenMP's functions are those of the
// library that torch has loaded, so that there is one pool of threads.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <dlfcn.h>

#include <cstring>

#define FASTDDPM_ISA module
#include "kernel.h"

#define FASTDDPM_KERNELS(X)     /* name, phases, words of a call */ \
    X(eps_loss, 2, 14)          \
    X(eps_loss_backward, 1, 14) \
    X(group_norm, 3, 17)        \
    X(interleave, 1, 8)         \
    X(noising, 1, 11)           \
    X(normal, 1, 6)             \
    X(residual, 1, 7)           \
    X(silu, 1, 4)               \
    X(step, 1, 13)              \
    X(x_0_error, 2, 13)

#define DECLARE(name, phases, words) void name(const Call&);
#define FUNCTION(name, phases, words) name,
#define INSTRUCTION_SET(isa)                                    \
    namespace fastddpm::isa {                                   \
    FASTDDPM_KERNELS(DECLARE)                                   \
    const Function kernels[] = {FASTDDPM_KERNELS(FUNCTION)};    \
    }

namespace fastddpm {
using Function = void (*)(const Call&);
}

INSTRUCTION_SET(portable)
#ifdef FASTDDPM_X86
INSTRUCTION_SET(avx2)
INSTRUCTION_SET(avx512)
#endif

namespace fastddpm {
namespace {

constexpr int64_t GRAIN = 8192;  // elements that are worth a thread: a fork and join takes some microseconds
constexpr int MOST_WORDS = 32;

struct InstructionSet {
    const char* name;
    const Function* kernels;
    bool (*supported)();
};

const InstructionSet INSTRUCTION_SETS[] = {
#ifdef FASTDDPM_X86
    {"avx512", avx512::kernels,
     [] {
         return bool(__builtin_cpu_supports("avx512f")) && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", avx2::kernels, [] { return bool(__builtin_cpu_supports("avx2")); }},
#endif
    {"portable", portable::kernels, [] { return true; }},
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
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol ? symbol : dlsym(RTLD_DEFAULT, name));
        };
        load(parallel, "GOMP_parallel");
        load(barrier, "GOMP_barrier");
        load(thread, "omp_get_thread_num");
        load(threads, "omp_get_num_threads");
        Dl_info info;
        if (!parallel || !barrier || !thread || !threads) parallel = nullptr;
        else if (dladdr(reinterpret_cast<void*>(parallel), &info)) path = info.dli_fname;
        if (torch) dlclose(torch);
    }
} openmp;

struct Task {
    Function kernel;
    int phases;
    const int64_t* words;

    void run(int thread, int threads) const {
        for (int phase = 0; phase < phases; ++phase) {
            if (phase && threads > 1) openmp.barrier();
            kernel({words, phase, thread, threads});
        }
    }
};

void run_in_parallel(const Task& task, int64_t elements, int64_t threads) {
    threads = openmp.parallel ? (elements / GRAIN + 1 < threads ? elements / GRAIN + 1 : threads) : 1;
    if (threads <= 1) return task.run(0, 1);
    auto run = [](void* data) { static_cast<const Task*>(data)->run(openmp.thread(), openmp.threads()); };
    openmp.parallel(run, const_cast<Task*>(&task), unsigned(threads), 0);
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

// kernel(elements, threads, *words)
PyObject* call_kernel(int index, int phases, int words, PyObject* const* arguments, Py_ssize_t count) {
    int64_t values[MOST_WORDS];
    if (count != words + 2) return PyErr_Format(PyExc_TypeError, "got %zd arguments, want %d", count, words + 2);
    for (Py_ssize_t i = 0; i < count; ++i)
        if (!word_of(arguments[i], values[i])) return nullptr;
    if (!chosen) return PyErr_Format(PyExc_RuntimeError, "no instruction set is chosen: call use() first");
    Task task{chosen->kernels[index], phases, values + 2};
    PyThreadState* state = PyEval_SaveThread();
    run_in_parallel(task, values[0], values[1]);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

enum Index {
#define INDEX(name, phases, words) INDEX_##name,
    FASTDDPM_KERNELS(INDEX)
};

#define WRAPPER(name, phases, words)                                                        \
    PyObject* call_##name(PyObject*, PyObject* const* arguments, Py_ssize_t count) {        \
        static_assert(words + 2 <= MOST_WORDS);                                             \
        return call_kernel(INDEX_##name, phases, words, arguments, count);                  \
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

PyObject* openmp_path(PyObject*, PyObject*) {
    if (!openmp.parallel) Py_RETURN_NONE;
    return PyUnicode_FromString(openmp.path ? openmp.path : "");
}

#define METHOD(name, phases, words) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_##name)), METH_FASTCALL, nullptr},
PyMethodDef methods[] = {
    FASTDDPM_KERNELS(METHOD)
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
