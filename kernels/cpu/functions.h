// Functions of one element or of one vector that C++ has no operator for.
template <class X> INLINE X max_signed(X a, X b) { return select(a > b, a, b); }
template <class X> INLINE X min_signed(X a, X b) { return select(a < b, a, b); }
// maxnum and minnum give the operand that is a number; maximum and minimum give NaN where there is one
template <class X> INLINE X max_number(X a, X b) { return select(b != b, a, select(a > b, a, b)); }
template <class X> INLINE X min_number(X a, X b) { return select(b != b, a, select(a < b, a, b)); }
template <class X> INLINE X max_nan(X a, X b) { return select(a != a, a, select(a > b, a, b)); }
template <class X> INLINE X min_nan(X a, X b) { return select(a != a, a, select(a < b, a, b)); }
template <class X, class F> INLINE X each(X x, F f) {
  if constexpr (std::is_arithmetic_v<X>) return f(x);
  else {
    for (int l = 0; l < lanes<X>(); ++l) x[l] = f(x[l]);
    return x;
  }
}
template <class X> INLINE X absolute(X x) { return each(x, [](auto a) { return std::abs(a); }); }
template <class X> INLINE X square_root(X x) { return each(x, [](auto a) { return std::sqrt(a); }); }
template <class X> INLINE X logarithm(X x) { return each(x, [](auto a) { return std::log(a); }); }
template <class X> INLINE X logarithm2(X x) { return each(x, [](auto a) { return std::log2(a); }); }

// 2^f for f in [-0.5, 0.5], relative error below 1.2e-7: a polynomial of degree 6 fitted to the least relative error
template <class X> INLINE X exp2_fraction(X f) {
  X p = 1.5403530e-4f * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;
}
// p * 2^n for a whole n in [-160, 160]; two factors, so that results below 2^-126 are rounded and not flushed
template <class X> INLINE X scale_by_power(X p, X n) {
  const X magic = X{} + 12582912.0f;  // 1.5 * 2^23: its sum with a whole number holds that number in the low bits
  X half = (n * 0.5f + magic) - magic;
  for (X part : {half, n - half}) {
    X t = part + magic;
    V<int32_t, lanes<X>()> bits;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits << 23) + (127 << 23);
    X factor;
    memcpy(&factor, &bits, sizeof factor);
    p = p * factor;
  }
  return p;
}
// e^(x * ln 2) = 2^x, and e^x: n is the whole power, the rest of the argument goes through the polynomial.
// A NaN stays, for it fails every comparison; overflow gives infinity.
template <bool NATURAL, class X> INLINE X exponential(X x) {
  if constexpr (std::is_same_v<X, float>) return exponential<NATURAL>(broadcast<float, 4>(x))[0];
  else {
    constexpr float most = NATURAL ? 110.0f : 159.0f;
    X y = select(x > most, X{} + most, select(x < -most, X{} - most, x));
    X n, f;
    const X magic = X{} + 12582912.0f;
    n = ((NATURAL ? y * 1.44269504f : y) + magic) - magic;
    // ln 2 in two parts, so that n * ln 2 is taken off exactly
    if constexpr (NATURAL) f = ((y - n * 0.693145752f) - n * 1.42860677e-6f) * 1.44269504f;
    else f = y - n;
    X p = exp2_fraction(f);
    X r;
#if defined(__AVX512F__)
    if constexpr (lanes<X>() == 16) r = (X)_mm512_scalef_ps((__m512)p, (__m512)n);
    else
#endif
    r = scale_by_power(p, n);
    return select(x != x, x, r);
  }
}
template <class X> INLINE X power_of_two(X x) { return exponential<false>(x); }
template <class X> INLINE X power_of_e(X x) { return exponential<true>(x); }
