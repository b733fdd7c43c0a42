// Which kernels this CPU runs. Only this file asks, and it is compiled for the baseline instruction set.
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define RELU2_X86
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace relu2 {
namespace {

struct Features {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false, amx = false;
};

#ifdef RELU2_X86
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.a = v[0], r.b = v[1], r.c = v[2], r.d = v[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// Register state that the operating system saves (XCR0).
unsigned long long saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
#endif
}

// Linux gives a process the state of the matrix unit when it asks for it, once and for all its threads.
bool matrix_state_granted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h; its feature, SDM volume 1
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// Bit positions: Intel SDM volume 2A, CPUID.
Features detect() {
  Features f;
  const auto bit = [](unsigned value, int n) { return (value >> n & 1) != 0; };
  const unsigned last = cpuid(0, 0).a;
  const Registers one = cpuid(1, 0);
  if (last < 7 || !bit(one.c, 27)) return f;
  const Registers seven = cpuid(7, 0);
  const unsigned long long state = saved_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  f.avx2 = ymm && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);
  f.avx_vnni = f.avx2 && seven.a >= 1 && bit(cpuid(7, 1).a, 4);
  f.avx512_vnni = f.avx2 && zmm && bit(seven.b, 16) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
  const bool tiles = (state & 0x60000) == 0x60000;
  f.amx = f.avx512_vnni && tiles && bit(seven.d, 24) && bit(seven.d, 25) && matrix_state_granted();
#ifdef RELU2_TIME_AS_AVX512  // only to time the 256-bit variant on a CPU that has its dot product in AVX-512 alone
  f.avx_vnni = f.avx512_vnni;
#endif
#ifdef RELU2_EMULATE  // only in a test: none of them needs more than AVX2 there, see emulated_intrinsics.h
  f.avx_vnni = f.avx512_vnni = f.amx = f.avx2;
#endif
  return f;
}
#else
Features detect() {
  return {};
}
#endif

const Features& features() {
  static const Features detected = detect();
  return detected;
}

}  // namespace

const Kernels* kernels_by_name(const char* name) {
  const Features& cpu = features();
  const struct {
    const Kernels* kernels;
    bool runs;
  } known[] = {
#ifdef RELU2_AMX
      {&kAmx, cpu.amx},
#endif
#ifdef RELU2_AVX512VNNI
      {&kAvx512Vnni, cpu.avx512_vnni},
#endif
#ifdef RELU2_AVX2VNNI
      {&kAvx2Vnni, cpu.avx_vnni},
#endif
#ifdef RELU2_AVX2
      {&kAvx2, cpu.avx2},
#endif
      {&kPortable4, true},
      {&kPortable8, true},
      {&kPortable16, true},
  };
  (void)cpu;
  for (const auto& entry : known)
    if (entry.runs && (name == nullptr || std::strcmp(entry.kernels->name, name) == 0)) return entry.kernels;
  return nullptr;
}

const Kernels& best_kernels() {
  return *kernels_by_name(nullptr);
}

int default_activation_bits(const Kernels& kernels, size_t tokens) {
  return tokens == 1 || tokens >= kernels.wide || kernels.words ? 16 : 8;
}

}  // namespace relu2
