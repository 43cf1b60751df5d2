/* Whether this processor, and its system, have the instructions that a path is compiled with. */
#if defined(__x86_64__) || defined(__i386__)
#define HAS(name) __builtin_cpu_supports(name)
/* Older compilers know neither the name nor the instructions. */
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define HAS_BF16 HAS("avx512bf16")
#else
#define HAS_BF16 0
#endif
int supports(int path) {
    __builtin_cpu_init();
    int eight = HAS("avx2") && HAS("fma") && HAS("bmi2") && HAS("popcnt");
    int sixteen = HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
    int words = HAS("avx512vbmi2");
    switch (path) {
    case 0: return 1;
    case 1: return eight;
    case 2: return eight && sixteen;
    case 3: return eight && sixteen && words;
    case 4: return eight && sixteen && words && HAS_BF16;
    default: return 0;
    }
}
#else
int supports(int path) { return path == 0; }
#endif
