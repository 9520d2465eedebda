// Functions of one element or of one vector that C++ has no operator for.
template <class X, bool = std::is_arithmetic_v<X>> struct ElementOf { typedef X type; };
template <class X> struct ElementOf<X, false> { typedef lane_t<X> type; };
template <class X> using element_t = typename ElementOf<X>::type;
// a T where X is a scalar, a vector of T with X's lanes where it is one
template <class T, class X, bool = std::is_arithmetic_v<X>> struct LikeOf { typedef T type; };
template <class T, class X> struct LikeOf<T, X, false> { typedef V<T, lanes<X>()> type; };
template <class T, class X> using like_t = typename LikeOf<T, X>::type;
template <size_t BYTES>
using unsigned_t = std::conditional_t<
    BYTES == 8, uint64_t, std::conditional_t<BYTES == 4, uint32_t, std::conditional_t<BYTES == 2, uint16_t, uint8_t>>>;

template <class X> INLINE X constant(element_t<X> c) { return X{} + c; }
// the same bits as elements of another type of equal width
template <class T, class X> INLINE like_t<T, X> bits_to(X x) {
  static_assert(sizeof(T) == sizeof(element_t<X>));
  like_t<T, X> r;
  memcpy(&r, &x, sizeof r);
  return r;
}
template <class X> INLINE auto as_unsigned(X x) { return bits_to<unsigned_t<sizeof(element_t<X>)>>(x); }
// f of each lane, where there is no way for all at once
template <class F, class X, class... Y> INLINE X each(F f, X x, Y... y) {
  if constexpr (std::is_arithmetic_v<X>) return f(x, y...);
  else {
    for (int l = 0; l < lanes<X>(); ++l) x[l] = f(x[l], y[l]...);
    return x;
  }
}

// ---- maximum, minimum, absolute value
template <class X> INLINE X max_signed(X a, X b) { return select(a > b, a, b); }
template <class X> INLINE X min_signed(X a, X b) { return select(a < b, a, b); }
template <class X> INLINE X max_unsigned(X a, X b) { return select(as_unsigned(a) > as_unsigned(b), a, b); }
template <class X> INLINE X min_unsigned(X a, X b) { return select(as_unsigned(a) < as_unsigned(b), a, b); }
// maxnum and minnum give the operand that is a number; maximum and minimum give NaN where there is one
// max(a, b) of the processor is b if either is NaN; so it is asked where b is none, and else a stays
template <class X> constexpr bool has_masks() {
#if defined(__AVX512VL__)
  return std::is_same_v<X, V<float, 16>> || std::is_same_v<X, V<float, 8>> || std::is_same_v<X, V<float, 4>>;
#else
  return false;
#endif
}
template <bool IS_MAX, class X> INLINE X extreme(X a, X b) {
#if defined(__AVX512VL__)
  if constexpr (lanes<X>() == 16) {
    const auto p = (__m512)a, q = (__m512)b;
    const auto is_number = _mm512_cmp_ps_mask(q, q, _CMP_ORD_Q);
    return (X)(IS_MAX ? _mm512_mask_max_ps(p, is_number, p, q) : _mm512_mask_min_ps(p, is_number, p, q));
  } else if constexpr (lanes<X>() == 8) {
    const auto p = (__m256)a, q = (__m256)b;
    const auto is_number = _mm256_cmp_ps_mask(q, q, _CMP_ORD_Q);
    return (X)(IS_MAX ? _mm256_mask_max_ps(p, is_number, p, q) : _mm256_mask_min_ps(p, is_number, p, q));
  } else {
    const auto p = (__m128)a, q = (__m128)b;
    const auto is_number = _mm_cmp_ps_mask(q, q, _CMP_ORD_Q);
    return (X)(IS_MAX ? _mm_mask_max_ps(p, is_number, p, q) : _mm_mask_min_ps(p, is_number, p, q));
  }
#endif
}
template <class X> INLINE X max_number(X a, X b) {
  if constexpr (has_masks<X>()) return extreme<true>(a, b);
  else return select(b != b, a, select(a > b, a, b));
}
template <class X> INLINE X min_number(X a, X b) {
  if constexpr (has_masks<X>()) return extreme<false>(a, b);
  else return select(b != b, a, select(a < b, a, b));
}
template <class X> INLINE X max_nan(X a, X b) { return select(a != a, a, select(a > b, a, b)); }
template <class X> INLINE X min_nan(X a, X b) { return select(a != a, a, select(a < b, a, b)); }
// the smallest integer, whose negative there is none of, stays
template <class X> INLINE X absolute(X x) {
  typedef element_t<X> T;
  if constexpr (std::is_floating_point_v<T>) return bits_to<T>(as_unsigned(x) & 0x7fffffffu);
  else return select(x < 0, (X)(0 - as_unsigned(x)), x);
}

// ---- integers. Lanes that a mask discards divide by zero too: a divisor of 0 counts as 1, and nothing traps.
template <class X> INLINE X divisor(X b) { return select(b == 0, constant<X>(1), b); }
// Vectors go by way of float or double, which is exact: a quotient p / q that is below a whole number n is so by 1 / q
// at least, and n * 2^-24, where p and q have 16 bits, or n * 2^-53, where they have 32, is less than that.
template <class X> INLINE X divide(X a, X b) {
  typedef element_t<X> T;
  const X d = divisor(b);
  if constexpr (std::is_arithmetic_v<X>) return d == -1 ? (X)(0 - as_unsigned(a)) : (X)(a / d);
  else if constexpr (sizeof(T) == 8) return each([](T p, T q) { return divide(p, q); }, a, b);
  else {
    typedef std::conditional_t<sizeof(T) == 4, double, float> F;
    auto quotient = convert<F>(convert<int32_t>(a)) / convert<F>(convert<int32_t>(d));
    return select(d == -1, (X)(0 - as_unsigned(a)), convert<T>(convert<int32_t>(quotient)));
  }
}
template <class X> INLINE X divide_unsigned(X a, X b) {
  typedef element_t<X> T;
  const auto p = as_unsigned(a), q = as_unsigned(divisor(b));
  if constexpr (std::is_arithmetic_v<X>) return (X)(p / q);
  else if constexpr (sizeof(T) == 8) return each([](T s, T t) { return divide_unsigned(s, t); }, a, b);
  else if constexpr (sizeof(T) == 4) {
    // by 2 or more it has 31 bits, for which every processor has a conversion
    auto quotient = (convert<double>(a ^ INT32_MIN) + 0x1p31) / (convert<double>((X)q ^ INT32_MIN) + 0x1p31);
    return select(q == 1, a, convert<int32_t>(quotient));
  } else {
    auto quotient = convert<float>(convert<int32_t>(p)) / convert<float>(convert<int32_t>(q));
    return convert<T>(convert<int32_t>(quotient));
  }
}
template <class X> INLINE X remainder(X a, X b) {
  return (X)(as_unsigned(a) - as_unsigned(divide(a, b)) * as_unsigned(divisor(b)));
}
template <class X> INLINE X remainder_unsigned(X a, X b) {
  return (X)(as_unsigned(a) - as_unsigned(divide_unsigned(a, b)) * as_unsigned(divisor(b)));
}
template <class X> INLINE X shift_right_unsigned(X a, X n) { return (X)(as_unsigned(a) >> as_unsigned(n)); }

// the upper half of the product of 32 or 64 bits each
template <class X> INLINE X multiply_high_unsigned(X a, X b) {
  typedef element_t<X> T;
  if constexpr (std::is_arithmetic_v<X>) {
    typedef std::conditional_t<sizeof(T) == 8, unsigned __int128, uint64_t> WIDE;
    return (X)((WIDE)as_unsigned(a) * as_unsigned(b) >> 8 * sizeof(T));
  } else if constexpr (sizeof(T) == 8) {
    return each([](T p, T q) { return multiply_high_unsigned(p, q); }, a, b);
  } else {
#if defined(__SSE2__)
    // the processor multiplies the even lanes; the odd ones are moved there
    return (X)in_parts<part_of(lanes<X>())>([](auto p, auto q) {
      constexpr int P = lanes<decltype(p)>();
      typedef V<uint64_t, P / 2> PAIRS;
      auto product = [](PAIRS s, PAIRS t) -> PAIRS {
#if defined(__AVX512F__)
        if constexpr (P == 16) return (PAIRS)_mm512_mul_epu32((__m512i)s, (__m512i)t);
#endif
#if defined(__AVX2__)
        if constexpr (P == 8) return (PAIRS)_mm256_mul_epu32((__m256i)s, (__m256i)t);
#endif
        if constexpr (P == 4) return (PAIRS)_mm_mul_epu32((__m128i)s, (__m128i)t);
      };
      PAIRS even = product((PAIRS)p, (PAIRS)q), odd = product((PAIRS)p >> 32, (PAIRS)q >> 32);
      return (V<uint32_t, P>)((even >> 32) | ((odd >> 32) << 32));
    }, as_unsigned(a), as_unsigned(b));
#else
    return (X)convert<uint32_t>(convert<uint64_t>(as_unsigned(a)) * convert<uint64_t>(as_unsigned(b)) >> 32);
#endif
  }
}
template <class X> INLINE X multiply_high_signed(X a, X b) {
  constexpr int SIGN = 8 * sizeof(element_t<X>) - 1;
  // a negative number counts as 2^bits more than it is
  return (X)(as_unsigned(multiply_high_unsigned(a, b)) - as_unsigned((a >> SIGN) & b) - as_unsigned((b >> SIGN) & a));
}
template <class X> INLINE X population_count(X x) {
  constexpr int BITS = 8 * sizeof(element_t<X>);
#if defined(__AVX512VPOPCNTDQ__)
  if constexpr (sizeof(X) == 64 && BITS == 32) return (X)_mm512_popcnt_epi32((__m512i)x);
  if constexpr (sizeof(X) == 64 && BITS == 64) return (X)_mm512_popcnt_epi64((__m512i)x);
#endif
  // sums of 2, 4 and 8 bits side by side, then over the bytes
  typedef decltype(as_unsigned(x)) U;
  constexpr auto ALL = (element_t<U>)~(element_t<U>)0;
  U n = as_unsigned(x);
  n -= (n >> 1) & (element_t<U>)(ALL / 3);
  n = (n & (element_t<U>)(ALL / 5)) + ((n >> 2) & (element_t<U>)(ALL / 5));
  n = (n + (n >> 4)) & (element_t<U>)(ALL / 17);
  for (int shift = 8; shift < BITS; shift *= 2) n += n >> shift;
  return (X)(n & (element_t<U>)0x7f);
}

// ---- conversions of unsigned integers, which the signed types of their width hold
template <class T, class X> INLINE like_t<T, X> convert_unsigned(X x) {
  if constexpr (std::is_arithmetic_v<X>) return (T)as_unsigned(x);
  else return convert<T>(as_unsigned(x));
}
template <class T, class X> INLINE like_t<T, X> to_unsigned_integer(X x) {
  typedef unsigned_t<sizeof(T)> U;
  if constexpr (std::is_arithmetic_v<X>) return (T)(U)x;
  else if constexpr (sizeof(T) < 4) return convert<T>(convert<int32_t>(x));
  else return (V<T, lanes<X>()>)convert<U>(x);
}

// ---- roots, whole numbers, remainder: where the processor has an instruction for all lanes, the compiler finds it
template <class X> INLINE X square_root(X x) { return each([](auto a) { return std::sqrt(a); }, x); }
template <class X> INLINE X reciprocal_root(X x) { return 1.0f / square_root(x); }
template <class X> INLINE X floor_of(X x) { return each([](auto a) { return std::floor(a); }, x); }
template <class X> INLINE X ceil_of(X x) { return each([](auto a) { return std::ceil(a); }, x); }
template <class X> INLINE X float_remainder(X a, X b) {
  return each([](auto p, auto q) { return std::fmod(p, q); }, a, b);
}

// ---- powers
// 2^f for f in [-0.5, 0.5], relative error below 2^-28: a polynomial of degree 6 fitted to the least relative error
template <class X> INLINE X exp2_fraction(X f) {
  X p = 1.53293106e-4f * f + 1.33909704e-3f;
  p = p * f + 9.61849932e-3f;
  p = p * f + 5.55035956e-2f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  return p * f + 1.0f;
}
// p * 2^n for a whole n in [-160, 160]; two factors, so that results below 2^-126 are rounded and not flushed
template <class X> INLINE X scale_by_power(X p, X n) {
  const X magic = X{} + 12582912.0f;  // 1.5 * 2^23: its sum with a whole number holds that number in the low bits
  X half = (n * 0.5f + magic) - magic;
  for (X part : {half, n - half}) {
    auto bits = (bits_to<int32_t>(part + magic) << 23) + (127 << 23);
    p = p * bits_to<float>(bits);
  }
  return p;
}
// e^(x * ln 2) = 2^x, and e^x, as 2^n * p: n is the whole power, the rest of the argument goes through the polynomial
template <class X> struct Powers { X n, p; };
template <bool NATURAL, class X> INLINE Powers<X> powers(X x) {
  const X magic = X{} + 12582912.0f;
  const X n = ((NATURAL ? x * 1.44269504f : x) + magic) - magic;
  // ln 2 in two parts, so that n * ln 2 is taken off exactly
  const X f = NATURAL ? ((x - n * 0.693145752f) - n * 1.42860677e-6f) * 1.44269504f : x - n;
  return {n, exp2_fraction(f)};
}
// A NaN stays, for it fails every comparison; overflow gives infinity. What is 0 is not left to the scaling, for masked
// scores are -inf, and there each vector with a result below 2^-126 costs an Intel core 150 cycles.
template <bool NATURAL, class X> INLINE X exponential(X x) {
  if constexpr (std::is_same_v<X, float>) return exponential<NATURAL>(broadcast<float, 4>(x))[0];
  else {
    constexpr float most = NATURAL ? 110.0f : 159.0f, least = NATURAL ? -104.0f : -150.0f;
#if defined(__AVX512F__)
    // the scaling is an instruction, and min takes its second operand, a NaN, where it can't compare
    if constexpr (lanes<X>() == 16) {
      const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLE_UQ);
      const X y = (X)_mm512_maskz_min_ps(counts, _mm512_set1_ps(most), (__m512)x);
      const auto [n, p] = powers<NATURAL>(y);
      return (X)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
    }
#endif
    const auto is_zero = x <= least;
    const auto [n, p] = powers<NATURAL>(select(x > most, X{} + most, select(is_zero, X{}, x)));
    return select(is_zero, X{}, select(x != x, x, scale_by_power(p, n)));
  }
}
template <class X> INLINE X power_of_two(X x) { return exponential<false>(x); }
template <class X> INLINE X power_of_e(X x) { return exponential<true>(x); }

// ---- logarithms: x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
template <bool NATURAL, class X> INLINE X logarithm_of(X x) {
  if constexpr (std::is_same_v<X, float>) return NATURAL ? std::log(x) : std::log2(x);
  else {
    const auto is_subnormal = x < 0x1p-126f;
    auto bits = bits_to<int32_t>(select(is_subnormal, x * 0x1p25f, x));
    auto power = (bits - 0x3f3504f3) >> 23;
    X f = bits_to<float>(bits - (power << 23)) - 1.0f;
    X e = convert<float>(power) - select(is_subnormal, X{} + 25.0f, X{});
    // log(1 + f) / f - 1, fitted so that the error of the logarithm is the least against itself (2^-25)
    X p = 0.0874053761f * f - 0.143098682f;
    p = p * f + 0.149167627f;
    p = p * f - 0.165700302f;
    p = p * f + 0.199621573f;
    p = p * f - 0.250017852f;
    p = p * f + 0.333339483f;
    p = p * f - 0.499999911f;
    p = p * f;
    X r;
    // ln 2 in two parts, as above; 1 / ln 2 without its whole part, so that f itself is added exactly
    if constexpr (NATURAL) r = e * 0.693145752f + (f + (f * p + e * 1.42860677e-6f));
    else r = e + (f + f * (p * 1.44269504f + 0.44269504f));
    r = select(x < __builtin_inff(), r, x);
    return select(x > 0.0f, r, select(x == 0.0f, X{} - __builtin_inff(), X{} + __builtin_nanf("")));
  }
}
template <class X> INLINE X logarithm(X x) { return logarithm_of<true>(x); }
template <class X> INLINE X logarithm2(X x) { return logarithm_of<false>(x); }

// ---- sine and cosine
// y[l] = f(x[l]) where the reduction below is not good enough, nor meant for: large numbers, infinities, NaN
constexpr float SINE_MOST = 1e5f;
static __attribute__((noinline)) void sine_beyond(const float* x, float* y, int n, float (*f)(float)) {
  for (int l = 0; l < n; ++l)
    if (!(std::abs(x[l]) <= SINE_MOST)) y[l] = f(x[l]);
}
template <bool COSINE, class X> INLINE X sine_of(X x) {
  if constexpr (std::is_same_v<X, float>) return COSINE ? std::cos(x) : std::sin(x);
  else {
    typedef like_t<int32_t, X> I;
    const X a = absolute(x);
    // a = quarter * pi/2 + r, |r| < 0.8. In double, and with a first part of pi/2 that has 33 bits, so that the
    // product is exact: r may be as small as 1e-8 of the two numbers that it is the difference of.
    const X magic = X{} + 12582912.0f;  // as above
    const X sum = a * 0.636619772f + magic;
    const auto quarter = convert<double>(sum - magic);
    const X r = convert<float>((convert<double>(a) - quarter * 0x1.921fb544p0) - quarter * 0x1.0b4611a626331p-34);
    const X z = r * r;
    // both fitted to the least relative error, 2^-27 and 2^-32
    X s = -1.95074477e-4f * z + 8.33210442e-3f;
    s = s * z - 0.166666538f;
    s = s * z * r + r;
    X c = 2.44294151e-5f * z - 1.38872943e-3f;
    c = c * z + 4.16666456e-2f;
    c = c * z - 0.5f;
    c = c * z + 1.0f;
    // quarters 0, 1, 2, 3: s, c, -s, -c; the cosine is one quarter ahead
    const I turn = bits_to<int32_t>(sum) + (COSINE ? 1 : 0);
    I sign = turn << 30;
    if constexpr (!COSINE) sign ^= bits_to<int32_t>(x);
    X y = bits_to<float>(bits_to<int32_t>(select((turn & 1) != 0, c, s)) ^ (sign & INT32_MIN));
    const bool is_near = all<lanes<X>()>(a <= SINE_MOST);
    if (__builtin_expect(!is_near, 0)) {
      sine_beyond((const float*)&x, (float*)&y, lanes<X>(), [](float p) { return COSINE ? std::cos(p) : std::sin(p); });
    }
    return y;
  }
}
template <class X> INLINE X sine(X x) { return sine_of<false>(x); }
template <class X> INLINE X cosine(X x) { return sine_of<true>(x); }

// ---- error function
template <class X> INLINE X error_function(X x) {
  if constexpr (std::is_same_v<X, float>) return std::erf(x);
  else {
    const X z = x * x;
    // erf(x) / x - 1 below 15/16
    X p = -5.92712022e-4f * z + 4.98102885e-3f;
    p = p * z - 2.67587472e-2f;
    p = p * z + 0.112816207f;
    p = p * z - 0.376124799f;
    p = p * z + 0.128379151f;
    p = p * x + x;
    // beyond: 1 - 2^q, where 2^q is 1 - erf; from 4 on it is lost beside the 1
    const X a = absolute(x), b = select(a < 4.0f, a, X{} + 4.0f);
    X q = 2.79737258e-4f * b - 4.36148793e-3f;
    q = q * b + 3.19508202e-2f;
    q = q * b - 0.149700224f;
    q = q * b - 0.919535995f;
    q = q * b - 1.6267271f;
    q = q * b - 3.22434149e-4f;
    q = bits_to<float>(as_unsigned(1.0f - power_of_two(q)) | (as_unsigned(x) & 0x80000000u));
    return select(x != x, x, select(a < 0.9375f, p, q));
  }
}
