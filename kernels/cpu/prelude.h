// What every generated kernel stands on: vectors of W lanes, masked memory access, exp2, reductions, transposition and
// the register-blocked matrix product. W is chosen by the generator; a mask is a vector of int32 lanes, 0 or -1.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

template <class T, int W> struct VectorOf { typedef T type __attribute__((vector_size(sizeof(T) * W))); };
template <class T, int W> using V = typename VectorOf<T, W>::type;
template <class X> using lane_t = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<X&>()[0])>>;
template <class X> constexpr int lanes() { return sizeof(X) / sizeof(lane_t<X>); }
template <int W> using Mask = V<int32_t, W>;

// ---- making vectors
template <class T, int W> INLINE V<T, W> broadcast(T x) { return x - V<T, W>{}; }
template <int W> INLINE Mask<W> broadcast_mask(bool x) { return broadcast<int32_t, W>(-(int32_t)x); }
template <class T, int W> INLINE V<T, W> iota() {
  V<T, W> r;
  for (int l = 0; l < W; ++l) r[l] = (T)l;
  return r;
}
template <class T, class X> INLINE auto convert(X x) { return __builtin_convertvector(x, V<T, lanes<X>()>); }

// ---- masks and selection
template <class X> INLINE auto as_mask(X x) { return __builtin_convertvector(x, Mask<lanes<X>()>); }
template <int W> INLINE bool all(Mask<W> m) {
#if defined(__AVX512DQ__)
  if constexpr (W == 16) return _mm512_movepi32_mask((__m512i)m) == 0xffff;
#endif
  int32_t r = -1;
  for (int l = 0; l < W; ++l) r &= m[l];
  return r != 0;
}
template <class A> INLINE A select(bool m, A a, A b) { return m ? a : b; }
template <class M, class A> INLINE A select(M m, A a, A b) {
  if constexpr (sizeof(lane_t<A>) == 4) return m ? a : b;
  else {
    typedef std::conditional_t<sizeof(lane_t<A>) == 8, int64_t, std::conditional_t<sizeof(lane_t<A>) == 2, int16_t, int8_t>> I;
    return convert<I>(m) ? a : b;
  }
}

// ---- memory
template <class T, int W> INLINE V<T, W> load(const T* p) { V<T, W> r; memcpy(&r, p, sizeof r); return r; }
template <class T, class X> INLINE void store(T* p, X x) { memcpy(p, &x, sizeof x); }
template <class T, int W> INLINE V<T, W> load_strided(const T* p, int64_t stride) {
  V<T, W> r;
  for (int l = 0; l < W; ++l) r[l] = p[l * stride];
  return r;
}
// at(l): the address of lane l, asked for only where the mask is set
template <class T, int W, class F> INLINE V<T, W> load_lanes(Mask<W> m, V<T, W> other, F at) {
  for (int l = 0; l < W; ++l) if (m[l]) other[l] = *at(l);
  return other;
}
template <class T, int W, class F> INLINE void store_lanes(Mask<W> m, V<T, W> x, F at) {
  for (int l = 0; l < W; ++l) if (m[l]) *at(l) = x[l];
}
template <class T, int W> INLINE V<T, W> load_masked(const T* p, Mask<W> m, V<T, W> other) {
#if defined(__AVX512DQ__)
  if constexpr (W == 16 && sizeof(T) == 4) {
    return (V<T, W>)_mm512_mask_loadu_epi32((__m512i)other, _mm512_movepi32_mask((__m512i)m), p);
  }
#endif
  return load_lanes<T, W>(m, other, [&](int l) { return p + l; });
}
template <class T, int W> INLINE void store_masked(T* p, Mask<W> m, V<T, W> x) {
#if defined(__AVX512DQ__)
  if constexpr (W == 16 && sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, _mm512_movepi32_mask((__m512i)m), (__m512i)x);
    return;
  }
#endif
  store_lanes<T, W>(m, x, [&](int l) { return p + l; });
}

// ---- arithmetic that C++ has no operator for; each takes scalars and vectors
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

// ---- reduction over the lanes of one vector
template <class T, int W, class F> INLINE T reduce(V<T, W> x, F f) {
  if constexpr (W == 1) return x[0];
  else {
    V<T, W / 2> a, b;
    memcpy(&a, &x, sizeof a);
    memcpy(&b, (const char*)&x + sizeof a, sizeof b);
    return reduce<T, W / 2>((V<T, W / 2>)f(a, b), f);
  }
}

// ---- transposition of W x W tiles: stage S swaps the bit S of the row with that of the column
template <int S, class X, size_t... L> INLINE void swap_bit(X& a, X& b, std::index_sequence<L...>) {
  constexpr size_t W = sizeof...(L);
  X low = __builtin_shufflevector(a, b, (L & S ? W + L - S : L)...);
  X high = __builtin_shufflevector(a, b, (L & S ? W + L : L + S)...);
  a = low;
  b = high;
}
template <int S, int W, class X> INLINE void transpose_stages(X (&rows)[W]) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r)
      if (!(r & S)) swap_bit<S>(rows[r], rows[r + S], std::make_index_sequence<W>());
    transpose_stages<S * 2, W>(rows);
  }
}
// source [ROWS][COLUMNS] -> target [COLUMNS][ROWS]
template <int ROWS, int COLUMNS, int W, class T> INLINE void transpose(const T* source, T* __restrict target) {
  if constexpr (ROWS % W == 0 && COLUMNS % W == 0) {
    for (int c = 0; c < COLUMNS; c += W)
      for (int r = 0; r < ROWS; r += W) {
        V<T, W> rows[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) rows[l] = load<T, W>(source + (r + l) * COLUMNS + c);
        transpose_stages<1, W>(rows);
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) store(target + (c + l) * ROWS + r, rows[l]);
      }
  } else {
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) target[c * ROWS + r] = source[r * COLUMNS + c];
  }
}

// ---- matrix product: MB x NB vectors of the result stay in registers while k runs
// A(i, k) = a[i * A_ROW + k * A_COLUMN]; B is [K][N]; init(i, j) gives the start, done(i, j, x) takes the result
template <class T, int MB, int NB, int W, int N, int K, int A_ROW, int A_COLUMN, class I, class D>
INLINE void product_tile(const T* a, const T* b, int i0, int j0, I init, D done) {
  V<T, W> sum[MB][NB];
#pragma GCC unroll 16
  for (int i = 0; i < MB; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) sum[i][j] = init(i0 + i, j0 + j * W);
  a += i0 * A_ROW;
  b += j0;
#pragma GCC unroll 2
  for (int k = 0; k < K; ++k) {
    V<T, W> row[NB];
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) row[j] = load<T, W>(b + k * N + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MB; ++i) {
      V<T, W> x = broadcast<T, W>(a[i * A_ROW + k * A_COLUMN]);
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MB; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) done(i0 + i, j0 + j * W, sum[i][j]);
}
template <class T, int M, int N, int K, int W, int A_ROW, int A_COLUMN, class I, class D>
INLINE void product(const T* a, const T* b, I init, D done) {
  // as many sums as the register file holds beside the operands: 32 registers with AVX-512, 16 elsewhere
  constexpr int VECTORS = N / W;
  constexpr bool WIDE = sizeof(T) * W == 64;
  constexpr int NB = WIDE ? (VECTORS % 4 == 0 ? 4 : VECTORS % 2 == 0 ? 2 : 1) : (VECTORS % 2 == 0 ? 2 : 1);
  constexpr int MOST = WIDE ? (NB == 4 ? 6 : 12) : (NB == 2 ? 6 : 12);
  constexpr int MB = MOST < M ? MOST : M;
  for (int j = 0; j < N; j += NB * W) {
    int i = 0;
    for (; i + MB <= M; i += MB) product_tile<T, MB, NB, W, N, K, A_ROW, A_COLUMN>(a, b, i, j, init, done);
    if constexpr (M % MB != 0) product_tile<T, M % MB, NB, W, N, K, A_ROW, A_COLUMN>(a, b, i, j, init, done);
  }
}
