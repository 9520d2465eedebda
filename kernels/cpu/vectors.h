// What every generated kernel stands on: vectors of W lanes, masks, memory access, reduction over lanes. W is chosen by
// the generator; a mask is a vector of int32 lanes, 0 or -1.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
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
template <class T, class X> INLINE auto convert(X x) {
#if defined(__AVX512F__)
  // compilers take some of these apart lane by lane
  typedef lane_t<X> F;
  typedef V<T, lanes<X>()> R;
  if constexpr (lanes<X>() == 16 && std::is_integral_v<F> && std::is_integral_v<T>) {
    if constexpr (sizeof(F) == 4 && sizeof(T) == 1) return (R)_mm512_cvtepi32_epi8((__m512i)x);
    if constexpr (sizeof(F) == 4 && sizeof(T) == 2) return (R)_mm512_cvtepi32_epi16((__m512i)x);
    if constexpr (std::is_same_v<F, int8_t> && sizeof(T) == 4) return (R)_mm512_cvtepi8_epi32((__m128i)x);
    if constexpr (std::is_same_v<F, uint8_t> && sizeof(T) == 4) return (R)_mm512_cvtepu8_epi32((__m128i)x);
    if constexpr (std::is_same_v<F, int16_t> && sizeof(T) == 4) return (R)_mm512_cvtepi16_epi32((__m256i)x);
    if constexpr (std::is_same_v<F, uint16_t> && sizeof(T) == 4) return (R)_mm512_cvtepu16_epi32((__m256i)x);
  }
#endif
  return __builtin_convertvector(x, V<T, lanes<X>()>);
}

// ---- masks and selection
template <class X> INLINE auto as_mask(X x) { return convert<int32_t>(x); }
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

// ---- folding the lanes of vectors into lane 0: f(a..., b...) combines b into a, on vectors of any width
template <int FIRST, class X, size_t... L> INLINE auto part(X x, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (FIRST + L)...);
#else
  return V<lane_t<X>, sizeof...(L)>{x[FIRST + L]...};
#endif
}
template <class X> INLINE auto low_half(X x) { return part<0>(x, std::make_index_sequence<lanes<X>() / 2>()); }
template <class X> INLINE auto high_half(X x) {
  return part<lanes<X>() / 2>(x, std::make_index_sequence<lanes<X>() / 2>());
}
// lane l is lane l + STEP of x, from the first on again behind the last
template <int STEP, class X, size_t... L> INLINE X turned(X x, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, ((STEP + L) % lanes<X>())...);
#else
  return X{x[(STEP + L) % lanes<X>()]...};
#endif
}
// From four lanes on they stay four: narrower ones are scalars to the compiler, whose choice between them is a jump.
template <int STEP, class F, class... X> INLINE void fold_turned(F f, X&... x) {
  if constexpr (STEP > 0) {
    f(x..., turned<STEP>(x, std::make_index_sequence<lanes<X>()>())...);
    fold_turned<STEP / 2>(f, x...);
  }
}
template <class F, class A, class... B> INLINE void fold_lanes(F f, A& a, B&... b) {
  if constexpr (lanes<A>() > 4) {
    std::tuple low{low_half(a), low_half(b)...};
    std::apply([&](auto& x, auto&... y) {
      f(x, y..., high_half(a), high_half(b)...);
      fold_lanes(f, x, y...);
      a[0] = x[0];
      ((b[0] = y[0]), ...);
    }, low);
  } else {
    fold_turned<lanes<A>() / 2>(f, a, b...);
  }
}
