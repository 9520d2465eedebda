// Reading and writing memory: of 16-bit floats a vector of floats is made, of everything else vectors of its own type.

// ---- one element
INLINE float read(const f16* p) { return unpack<f16>(p->bits); }
INLINE float read(const bf16* p) { return unpack<bf16>(p->bits); }
INLINE void write(f16* p, float x) { p->bits = pack<f16>(x); }
INLINE void write(bf16* p, float x) { p->bits = pack<bf16>(x); }
template <class T> INLINE T read(const T* p) { return *p; }
template <class T> INLINE void write(T* p, T x) { *p = x; }
template <class T> using lane_of = decltype(read((const T*)nullptr));

// ---- whole vectors
template <class T, int W> INLINE V<lane_of<T>, W> load(const T* p) {
  if constexpr (std::is_arithmetic_v<T>) {
    V<T, W> r;
    memcpy(&r, p, sizeof r);
    return r;
  } else {
    V<uint16_t, W> bits;
    memcpy(&bits, p, sizeof bits);
    return unpack<T>(bits);
  }
}
template <class T, class X> INLINE void store(T* p, X x) {
  if constexpr (std::is_arithmetic_v<T>) memcpy(p, &x, sizeof x);
  else {
    const auto bits = pack<T>(x);
    memcpy(p, &bits, sizeof bits);
  }
}
template <class T, int W> INLINE V<lane_of<T>, W> load_strided(const T* p, int64_t stride) {
  V<lane_of<T>, W> r;
  for (int l = 0; l < W; ++l) r[l] = read(p + l * stride);
  return r;
}
template <class T, class X> INLINE void store_strided(T* p, X x, int64_t stride) {
  for (int l = 0; l < lanes<X>(); ++l) write(p + l * stride, x[l]);
}
// lane l is at[l] * stride + l * step elements from p
template <class T, int W, class I> INLINE V<lane_of<T>, W> gather(const T* p, I at, int64_t stride, int64_t step) {
  V<lane_of<T>, W> r;
  for (int l = 0; l < W; ++l) r[l] = read(p + (int64_t)at[l] * stride + l * step);
  return r;
}

// ---- lane by lane; at(l): the address of lane l, asked for only where the mask is set
template <class T, int W, class F> INLINE V<lane_of<T>, W> load_lanes(Mask<W> m, V<lane_of<T>, W> other, F at) {
  for (int l = 0; l < W; ++l)
    if (m[l]) other[l] = read(at(l));
  return other;
}
template <class T, int W, class F> INLINE void store_lanes(Mask<W> m, V<lane_of<T>, W> x, F at) {
  for (int l = 0; l < W; ++l)
    if (m[l]) write(at(l), x[l]);
}

// ---- neighbours under a mask; what it leaves out is not touched
template <class T, int W> INLINE V<lane_of<T>, W> load_masked(const T* p, Mask<W> m, V<lane_of<T>, W> other) {
#if defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (W == 16 && sizeof(T) == 4)
    return (V<T, W>)_mm512_mask_loadu_epi32((__m512i)other, _mm512_movepi32_mask((__m512i)m), p);
  if constexpr (W == 16 && std::is_same_v<T, uint16_t>)
    return (V<T, W>)_mm256_mask_loadu_epi16((__m256i)other, _mm512_movepi32_mask((__m512i)m), p);
  if constexpr (W == 16 && sizeof(T) == 2 && !std::is_arithmetic_v<T>) {
    const auto bits = _mm256_maskz_loadu_epi16(_mm512_movepi32_mask((__m512i)m), p);
    return select(m, unpack<T>((V<uint16_t, W>)bits), other);
  }
#endif
  if (all<W>(m)) return load<T, W>(p);
  return load_lanes<T, W>(m, other, [&](int l) { return p + l; });
}
template <class T, int W> INLINE void store_masked(T* p, Mask<W> m, V<lane_of<T>, W> x) {
#if defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (W == 16 && sizeof(T) == 4)
    return _mm512_mask_storeu_epi32(p, _mm512_movepi32_mask((__m512i)m), (__m512i)x);
  if constexpr (W == 16 && sizeof(T) == 2 && !std::is_arithmetic_v<T>)
    return _mm256_mask_storeu_epi16(p, _mm512_movepi32_mask((__m512i)m), (__m256i)pack<T>(x));
#endif
  if (all<W>(m)) return store(p, x);
  store_lanes<T, W>(m, x, [&](int l) { return p + l; });
}
