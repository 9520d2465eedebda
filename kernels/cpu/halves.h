// fp16 and bf16: 16-bit storage in memory and buffers; in registers a float that the narrow type holds exactly.
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// ---- instructions of one width on vectors of any
// the first N lanes; those that x lacks are 0
template <int N, class X> INLINE auto resize(X x) {
  V<lane_t<X>, N> r;
  if constexpr (sizeof r <= sizeof x) memcpy(&r, &x, sizeof r);
  else {
    static_assert(sizeof x <= 8 && sizeof r <= 16);
    uint64_t bits = 0;  // in a register: a store of less than the next load reads would be waited for
    memcpy(&bits, &x, sizeof x);
    const V<uint64_t, 2> filled = {bits, 0};
    memcpy(&r, &filled, sizeof r);
  }
  return r;
}
template <class X> INLINE auto join(X low, X high) {
  V<lane_t<X>, 2 * lanes<X>()> r;
  memcpy(&r, &low, sizeof low);
  memcpy((char*)&r + sizeof low, &high, sizeof high);
  return r;
}
// f on parts of P lanes: wider vectors are cut in two, narrower ones filled up
template <int P, class F, class X, class... Y> INLINE auto in_parts(F f, X x, Y... y) {
  constexpr int W = lanes<X>();
  if constexpr (W == P) return f(x, y...);
  else if constexpr (W < P) return resize<W>(f(resize<P>(x), resize<P>(y)...));
  else return join(in_parts<P>(f, low_half(x), low_half(y)...), in_parts<P>(f, high_half(x), high_half(y)...));
}
// how many lanes of 32 bits an instruction takes of w: 512, 256 or 128 bits
constexpr int part_of(int w) {
#if defined(__AVX512F__)
  if (w >= 16) return 16;
#endif
#if defined(__AVX2__)
  if (w >= 8) return 8;
#endif
  return 4;
}

// ---- fp16: 5 bits of exponent (bias 15), 10 of fraction
template <class X> INLINE auto unpack_f16(X bits) {
#if defined(__F16C__)
  return in_parts<part_of(lanes<X>())>([](auto h) {
    constexpr int P = lanes<decltype(h)>();
#if defined(__AVX512F__)
    if constexpr (P == 16) return (V<float, 16>)_mm512_cvtph_ps((__m256i)h);
#endif
    if constexpr (P == 8) return (V<float, 8>)_mm256_cvtph_ps((__m128i)h);
    if constexpr (P == 4) return (V<float, 4>)_mm_cvtph_ps((__m128i)resize<8>(h));
  }, bits);
#else
  constexpr int W = lanes<X>();
  typedef V<int32_t, W> I;
  typedef V<float, W> F;
  I wide = convert<int32_t>(bits), a = (wide & 0x7fff) << 13;
  I normal = a + (112 << 23), special = a + (224 << 23);
  // a subnormal one is a fraction of 2^-14: put behind a leading 1, which is then taken off
  I small = (I)((F)(a + (113 << 23)) - (F)(I{} + (113 << 23)));
  return (F)(select(a < (1 << 23), small, select(a < (31 << 23), normal, special)) | (wide & 0x8000) << 16);
#endif
}
template <bool NEAREST, class X> INLINE auto pack_f16(X x) {
#if defined(__F16C__)
  static constexpr int HOW = (NEAREST ? _MM_FROUND_TO_NEAREST_INT : _MM_FROUND_TO_ZERO) | _MM_FROUND_NO_EXC;
  return in_parts<part_of(lanes<X>())>([](auto f) {
    constexpr int P = lanes<decltype(f)>();
#if defined(__AVX512F__)
    if constexpr (P == 16) return (V<uint16_t, 16>)_mm512_cvtps_ph((__m512)f, HOW);
#endif
    if constexpr (P == 8) return (V<uint16_t, 8>)_mm256_cvtps_ph((__m256)f, HOW);
    if constexpr (P == 4) return resize<4>((V<uint16_t, 8>)_mm_cvtps_ph((__m128)f, HOW));
  }, x);
#else
  typedef V<int32_t, lanes<X>()> I;
  const I bits = (I)x, a = bits & 0x7fffffff, infinity = I{} + 0x7c00;
  // below 2^-14: 0.5f has the unit in the last place of the subnormal ones, 2^-24
  const X sum = (X)a + 0.5f;
  I small = (I)sum - (126 << 23), normal = a - (112 << 23), large = infinity;
  if constexpr (NEAREST) normal += 0xfff + ((a >> 13) & 1);
  else {
    small += sum - 0.5f > (X)a;
    large = select(a < (255 << 23), I{} + 0x7bff, infinity);
  }
  large = select(a > (255 << 23), 0x7e00 | ((a >> 13) & 0x3ff), large);
  I r = select(a < (113 << 23), small, select(a < (143 << 23), normal >> 13, large));
  return convert<uint16_t>(r | ((bits >> 16) & 0x8000));
#endif
}

// ---- bf16: the upper half of a float; not by vcvtneps2bf16, which takes subnormal numbers for zero
template <bool NEAREST, class X> INLINE auto round_bf16(X x) {
  typedef V<uint32_t, lanes<X>()> U;
  const U bits = (U)x, rounded = NEAREST ? bits + 0x7fff + ((bits >> 16) & 1) : bits;
  return select(x != x, bits | 0x400000, rounded);  // the lower half is still to be dropped
}

// ---- the same for both types T and for scalars
// 16 bits each -> float, exact
template <class T, class X> INLINE auto unpack(X bits) {
  if constexpr (std::is_arithmetic_v<X>) return unpack<T>(V<uint16_t, 1>{bits})[0];
  else if constexpr (std::is_same_v<T, f16>) return unpack_f16(bits);
  else return (V<float, lanes<X>()>)(convert<uint32_t>(bits) << 16);
}
// float -> 16 bits each: the nearest, the even one of two; NaN stays NaN
template <class T, class X> INLINE auto pack(X x) {
  if constexpr (std::is_arithmetic_v<X>) return pack<T>(V<float, 1>{x})[0];
  else if constexpr (std::is_same_v<T, f16>) return pack_f16<true>(x);
  else return convert<uint16_t>(round_bf16<true>(x) >> 16);
}
template <class T, bool NEAREST, class X> INLINE X rounded(X x) {
  if constexpr (std::is_arithmetic_v<X>) return rounded<T, NEAREST>(V<float, 1>{x})[0];
  else if constexpr (std::is_same_v<T, f16>) return unpack_f16(pack_f16<NEAREST>(x));
  else return (X)(round_bf16<NEAREST>(x) & 0xffff0000u);
}
template <class T, class X> INLINE X round_to(X x) { return rounded<T, true>(x); }
// never away from zero: a finite number never becomes infinite
template <class T, class X> INLINE X round_toward_zero(X x) { return rounded<T, false>(x); }
