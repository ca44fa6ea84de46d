// Conversions to the 16-bit formats in which weights leave a panel. Included once per instruction set's namespace.

// float to bfloat16 bits, rounded to nearest even; NaN stays NaN.
CK_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}
