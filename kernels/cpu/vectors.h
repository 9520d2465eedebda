// What every generated kernel stands on: vectors of W lanes, masks, memory access, reduction over lanes. W is chosen by
// the generator; a mask is a vector of int32 lanes, 0 or -1.
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
