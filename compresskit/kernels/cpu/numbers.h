/* Types of values, inputs and outputs, and how one number of each becomes another. */
#ifndef COMPRESSKIT_NUMBERS_H
#define COMPRESSKIT_NUMBERS_H

#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Of values, inputs and outputs; a file is compiled for values of one type. */
#define FP32 0
#define BF16 1
#define FP16 2
#define INT8 3
#define VALUE_BYTES (VALUE_TYPE == FP32 ? 4 : VALUE_TYPE == INT8 ? 1 : 2)

INLINE float bits_to_float(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint32_t float_to_bits(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

INLINE float bf16_to_float(uint16_t half) { return bits_to_float((uint32_t)half << 16); }

/* To the nearest, halves to even; NaN stays NaN. */
INLINE uint16_t float_to_bf16(float number) {
    uint32_t bits = float_to_bits(number);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(number != number ? (bits >> 16 | 0x40) : rounded);
}

#if defined(__F16C__)
INLINE float fp16_to_float(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t float_to_fp16(float number) { return _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT); }
#else
/* The exponent is moved by a multiplication, which also makes denormal numbers what they are. */
INLINE float fp16_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
    if ((half & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | rest);
    return bits_to_float(sign | float_to_bits(bits_to_float(rest) * 0x1p112f));
}

/* To the nearest, halves to even; too large ones become infinite, NaN stays NaN. */
INLINE uint16_t float_to_fp16(float number) {
    uint32_t bits = float_to_bits(number), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) { /* denormal: adding a half aligns the last place, and rounds */
        uint32_t aligned = float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000;
        return (uint16_t)(sign | aligned);
    }
    size += 0xfff + (size >> 13 & 1);
    return (uint16_t)(sign | (size - 0x38000000) >> 13);
}
#endif

INLINE float load_number(const void *from, int64_t index, int type) {
    if (type == FP32) return ((const float *)from)[index];
    uint16_t half = ((const uint16_t *)from)[index];
    return type == BF16 ? bf16_to_float(half) : fp16_to_float(half);
}

INLINE void store_number(void *to, int64_t index, int type, float number) {
    if (type == FP32)
        ((float *)to)[index] = number;
    else
        ((uint16_t *)to)[index] = type == BF16 ? float_to_bf16(number) : float_to_fp16(number);
}

#endif
