// Matrix products of tiles. Operands are brought into cells of 32 bits (converted, paired, transposed), then vectors of
// sums stay in registers while k runs.
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(AMX_TILE) && defined(AMX_BF16) && (defined(__clang__) || __GNUC__ >= 11)  // older assemblers lack it
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

// WIDEST: 32-bit lanes of the widest vector. SUMS and MOST_COLUMNS: how many vectors of sums a tile of the result has,
// and how many of them stand side by side. 16 sums leave room for their operands in 32 registers; on a Zen 4, 24 sums
// are no faster and leave a remainder of rows. Of 16 registers 12 go to the sums, but 8 where multiplying takes another
// one and a broadcast costs a shuffle, which four columns share out better (10 % faster than 12 sums).
#if defined(__AVX512VL__)
constexpr int WIDEST = 16, SUMS = 16, MOST_COLUMNS = 4;
#elif defined(__AVX2__)
constexpr int WIDEST = 8, SUMS = 12, MOST_COLUMNS = 2;
#elif defined(__aarch64__)
constexpr int WIDEST = 4, SUMS = 16, MOST_COLUMNS = 4;
#else
constexpr int WIDEST = 4, SUMS = 8, MOST_COLUMNS = 4;
#endif
constexpr int least(int a, int b) { return a < b ? a : b; }

// ---- transposition of W x W tiles: stage S swaps the bit S of the row with that of the column
// lane l of the result is lane LANES[l] of a and b side by side
template <int... LANES, class X> INLINE X shuffle(X a, X b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANES...);
#else
  return __builtin_shuffle(a, b, V<int32_t, sizeof...(LANES)>{LANES...});
#endif
}
template <int S, class X, size_t... L> INLINE void swap_bit(X& a, X& b, std::index_sequence<L...>) {
  constexpr size_t W = sizeof...(L);
  X low = shuffle<(L & S ? W + L - S : L)...>(a, b);
  X high = shuffle<(L & S ? W + L : L + S)...>(a, b);
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
// [ROWS][COLUMNS] -> target [COLUMNS][ROWS], of 32-bit elements; read_at(n) gives W elements from the n-th on
template <int ROWS, int COLUMNS, int W, class T, class F> INLINE void transpose(F read_at, T* __restrict target) {
  static_assert(ROWS % W == 0 && COLUMNS % W == 0, "tiles of W x W fill the matrix");
  for (int c = 0; c < COLUMNS; c += W)
    for (int r = 0; r < ROWS; r += W) {
      V<T, W> rows[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) rows[l] = read_at((r + l) * COLUMNS + c);
      transpose_stages<1, W>(rows);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(target + (c + l) * ROWS + r, rows[l]);
    }
}

// which products AMX does: smaller ones would leave parts of its registers empty
template <class T, int M, int N, int K, int W> constexpr bool fits_amx() {
#if defined(HAS_AMX)
  return std::is_same_v<T, bf16> && W == 16 && M >= 16 && N >= 16 && K >= 32;
#else
  return false;
#endif
}

// ---- cells: one value of k in the type of the sums (fp32, int32) or, where the machine multiplies two at once, a pair
// of 16 bits each: that of k in the lower half, that of k + 1 in the upper one. Processors with AMX do VDPBF16PS every
// other cycle only, and two products of fp32 in each, so there what AMX leaves is twice as fast in fp32.
template <class T, int W> constexpr bool multiplies_pairs() {
#if defined(__AVX512BF16__) && defined(__AVX512VL__) && !defined(HAS_AMX)
  if (std::is_same_v<T, bf16>) return W >= 4;
#endif
#if defined(__SSE2__)
  if (std::is_same_v<T, int8_t>) return W >= 4 && W <= WIDEST;
#endif
  return false;
}
// operands of type T for vectors of W sums
template <class T, int W, bool PAIRED = multiplies_pairs<T, W>()> struct Cells {
  static constexpr bool WHOLE = std::is_same_v<T, int8_t>, PAIRS = PAIRED;
  static constexpr int GROUP = PAIRS ? 2 : 1;  // values in a cell
  typedef std::conditional_t<WHOLE, int32_t, float> Sum;
  typedef std::conditional_t<PAIRS, uint32_t, Sum> Cell;
  typedef std::conditional_t<PAIRS, std::conditional_t<WHOLE, int16_t, uint16_t>, Sum> Value;

  // N values, as they stand in cells, that follow one another in memory
  template <int N> INLINE V<Value, N> values(const T* p) {
    if constexpr (WHOLE) return convert<Value>(load<T, N>(p));
    else if constexpr (PAIRS) return load<uint16_t, N>(&p->bits);
    else return load<T, N>(p);
  }
  // N cells; the values of a pair follow one another in memory
  template <int N> INLINE V<Cell, N> adjacent(const T* p) { return (V<Cell, N>)values<N * GROUP>(p); }
  // N cells with one value each, the lower half of a pair
  template <int N> INLINE V<Cell, N> single(const T* p) {
    if constexpr (PAIRS) return convert<Cell>((V<uint16_t, N>)values<N>(p));
    else return values<N>(p);
  }

  // Integers wrap around, as sums of products of int32 do; the products of a pair never leave 32 bits. VDPBF16PS adds
  // the products of a pair one after the other, rounding to the nearest each time, so its sums over K values are like
  // fp32 ones off by at most (K + 1) 2^-24 (|start| + sum |a b|). Unlike them it takes subnormal operands and results
  // for zero: up to 2^-126 (1 + |a| + |b|) more for each k. Infinities and NaN come out as in fp32.
  INLINE V<Sum, W> add_product(V<Sum, W> sum, V<Cell, W> a, V<Cell, W> b) {
    if constexpr (!PAIRS) return sum + a * b;
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    else if constexpr (!WHOLE && W == 16) return (V<Sum, W>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    else if constexpr (!WHOLE && W == 8) return (V<Sum, W>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
    else if constexpr (!WHOLE) return (V<Sum, W>)_mm_dpbf16_ps((__m128)sum, (__m128bh)a, (__m128bh)b);
#endif
#if defined(__AVX512VNNI__)
    else if constexpr (W == 16) return (V<Sum, W>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    else if constexpr (W == 16) return sum + (V<Sum, W>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
    else if constexpr (W == 8) return sum + (V<Sum, W>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
#if defined(__SSE2__)
    else if constexpr (W == 4) return sum + (V<Sum, W>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  }
};

// W cells of [K][COLUMNS] from p on, where k is even; a lone k is paired with zeros
template <class C, int K, int COLUMNS, int W, class T> INLINE auto column_cells(const T* p) {
  auto cells = C::template single<W>(p);
  if constexpr (C::PAIRS && K > 1) cells |= C::template single<W>(p + COLUMNS) << 16;
  return cells;
}
// source [K][COLUMNS] -> cells [K / GROUP][COLUMNS]
template <class C, int K, int COLUMNS, class T>
INLINE void pack_columns(const T* source, typename C::Cell* __restrict target) {
  constexpr int W = least(WIDEST, COLUMNS);
  for (int k = 0; k < K; k += C::GROUP)
    for (int j = 0; j < COLUMNS; j += W) {
      const auto cells = column_cells<C, K, COLUMNS, W>(source + k * COLUMNS + j);
      store(target + k / C::GROUP * COLUMNS + j, cells);
    }
}
// source [K][COLUMNS] -> cells [COLUMNS][K / GROUP]
template <class C, int K, int COLUMNS, class T>
INLINE void pack_columns_transposed(const T* source, typename C::Cell* __restrict target) {
  constexpr int DEPTH = K / C::GROUP, W = least(WIDEST, least(COLUMNS, DEPTH));
  transpose<DEPTH, COLUMNS, W>([&](int n) {
    return column_cells<C, K, COLUMNS, W>(source + n / COLUMNS * C::GROUP * COLUMNS + n % COLUMNS);
  }, target);
}
// source [ROWS][K] -> cells [ROWS][K / GROUP]
template <class C, int ROWS, int K, class T>
INLINE void pack_rows(const T* source, typename C::Cell* __restrict target) {
  constexpr int CELLS = ROWS * K / C::GROUP, W = least(WIDEST, CELLS);
  for (int n = 0; n < CELLS; n += W) store(target + n, C::template adjacent<W>(source + n * C::GROUP));
}
// source [ROWS][K] -> cells [K / GROUP][ROWS]
template <class C, int ROWS, int K, class T>
INLINE void pack_transposed(const T* source, typename C::Cell* __restrict target) {
  constexpr int DEPTH = K / C::GROUP, W = least(WIDEST, least(ROWS, DEPTH));
  transpose<ROWS, DEPTH, W>([&](int n) { return C::template adjacent<W>(source + n * C::GROUP); }, target);
}

// ---- the product of cells: MB x NB vectors of sums at a time
// A(i, k) = a[i * A_ROW + k * A_COLUMN]; B is [K][N]; init(i, j) gives the start, done(i, j, x) takes the result
template <class C, int MB, int NB, int W, int N, int K, int A_ROW, int A_COLUMN, class T, class I, class D>
INLINE void product_tile(const T* a, const T* b, int i0, int j0, I init, D done) {
  V<typename C::Sum, W> sum[MB][NB];
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
      for (int j = 0; j < NB; ++j) sum[i][j] = C::add_product(sum[i][j], x, row[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MB; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) done(i0 + i, j0 + j * W, sum[i][j]);
}
template <class C, int M, int N, int K, int W, int A_ROW, int A_COLUMN, class T, class I, class D>
INLINE void product_of_cells(const T* a, const T* b, I init, D done) {
  constexpr int NB = least(N / W, MOST_COLUMNS), MB = least(M, SUMS / NB);
  for (int j = 0; j < N; j += NB * W) {
    int i = 0;
    for (; i + MB <= M; i += MB) product_tile<C, MB, NB, W, N, K, A_ROW, A_COLUMN>(a, b, i, j, init, done);
    if constexpr (M % MB != 0) product_tile<C, M % MB, NB, W, N, K, A_ROW, A_COLUMN>(a, b, i, j, init, done);
  }
}

// ---- the product of cells by AMX, whose 8 registers have 16 rows of 16 cells each
// what a thread needs around products that fit, if there are any
template <bool ANY> struct AmxSession {};
#if defined(HAS_AMX)
// Linux lends the registers to a process that asks for them, once and for all of its threads; or doesn't.
INLINE bool may_use_amx() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}
// Each thread says how it divides them. That takes 0.1 us, a product of 64 x 64 x 64 0.5 us with all packing.
template <> struct AmxSession<true> {
  __attribute__((always_inline)) AmxSession() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int at = 0; at < 8; ++at) shape.row_bytes[at] = 64, shape.rows[at] = 16;
    if (may_use_amx()) asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  __attribute__((always_inline)) ~AmxSession() {
    if (may_use_amx()) asm volatile("tilerelease" ::: "memory");
  }
};

// By assembly, for the compilers' own functions don't say that they read memory. stride: bytes from row to row
template <int AT> INLINE void amx_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(AT)); }
template <int AT> INLINE void amx_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(AT), "r"(p), "r"(stride) : "memory");
}
template <int AT> INLINE void amx_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(AT), "r"(p), "r"(stride) : "memory");
}
// For each pair of rows and columns TDPBF16PS adds up 16 products of lower halves and 16 of upper ones apart, then both,
// then that to the sum, each time rounding to the nearest. So the bounds of VDPBF16PS hold (see Cells), but for a
// sixteenth more where subnormal results count as zero.
template <int SUM, int A, int B> INLINE void amx_add_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

template <class F, int... I> INLINE void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int COUNT, class F> INLINE void each(F f) { each(f, std::make_integer_sequence<int, COUNT>()); }

// MB x NB registers of sums: a is [MB * 16][DEPTH]; b and sums are parts of rows of N
template <int MB, int NB, int N, int DEPTH> INLINE void amx_block(const uint32_t* a, const uint32_t* b, float* sums) {
  constexpr int A = MB * NB, B = A + MB;  // the first registers of operands
  each<MB * NB>([](auto sum) { amx_zero<sum>(); });
  for (int k = 0; k < DEPTH; k += 16) {
    each<MB>([&](auto i) { amx_load<A + i>(a + i * 16 * DEPTH + k, 4 * DEPTH); });
    each<NB>([&](auto j) {
      constexpr int AT = B + j % (8 - B);
      amx_load<AT>(b + k * N + j * 16, 4 * N);
      each<MB>([&](auto i) { amx_add_product<i * NB + j, A + i, AT>(); });
    });
  }
  each<MB * NB>([&](auto at) { amx_store<at>(sums + at / NB * 16 * N + at % NB * 16, 4 * N); });
}
// a is [M][DEPTH], b [DEPTH][N]
template <class C, int M, int N, int DEPTH, class I, class D>
INLINE void product_by_amx(const uint32_t* a, const uint32_t* b, I init, D done) {
  constexpr int MB = least(M / 16, 2), NB = least(N / 16, 4 / MB), ROWS = 16 * MB;
  typedef V<float, 16> Sums;
  alignas(64) float sums[ROWS * N];
  for (int i0 = 0; i0 < M; i0 += ROWS, a += ROWS * DEPTH) {
    if (may_use_amx()) {
      for (int j = 0; j < N; j += 16 * NB) amx_block<MB, NB, N, DEPTH>(a, b + j, sums + j);
    } else {
      product_of_cells<C, ROWS, N, DEPTH, 16, DEPTH, 1>(
          a, b, [](int, int) { return Sums{}; }, [&](int i, int j, Sums x) { store(sums + i * N + j, x); });
    }
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; j += 16) done(i0 + i, j, init(i0 + i, j) + load<float, 16>(sums + i * N + j));
  }
}
#endif

// ---- C(i, j) = init(i, j) + sum over k of A(i, k) B(k, j)
// a is [M][K], or [K][M] if it is transposed; b is [K][N], or [N][K]; L and R, of one type: float, f16, bf16 (Acc is
// float) or int8_t (Acc is int32_t). init(i, j) gives the start of columns j .. j + W - 1, done(i, j, x) takes the
// result, once for each vector. M, N, K and W are powers of two. Where the product fits_amx, the thread has a session.
template <class Acc, int M, int N, int K, int W, class L, bool LEFT_TRANSPOSED, class R, bool RIGHT_TRANSPOSED, class I,
          class D>
INLINE void product(const L* a, const R* b, I init, D done) {
  constexpr bool AMX = fits_amx<L, M, N, K, W>();
  typedef Cells<L, W, AMX || multiplies_pairs<L, W>()> C;
  typedef typename C::Cell Cell;
  static_assert(std::is_same_v<L, R> && std::is_same_v<Acc, typename C::Sum>, "both operands and the sums agree");
  constexpr bool LONE = K < C::GROUP;  // then [K][N] and [N][K] are the same
  constexpr int DEPTH = LONE ? 1 : K / C::GROUP;
  // used as it is: fp32 with k anywhere, pairs whose values are neighbours
  constexpr bool IS_CELLS = sizeof(L) * C::GROUP == sizeof(Cell);
  constexpr bool KEEPS_LEFT = IS_CELLS && (!C::PAIRS || (!LEFT_TRANSPOSED && !LONE));
  constexpr bool KEEPS_RIGHT = IS_CELLS && !C::PAIRS && !RIGHT_TRANSPOSED;
  alignas(64) Cell left[KEEPS_LEFT ? 1 : M * DEPTH], right[KEEPS_RIGHT ? 1 : DEPTH * N];
  const Cell *x = left, *y = right;
  if constexpr (KEEPS_LEFT) x = (const Cell*)a;
  else if constexpr (AMX) pack_columns_transposed<C, K, M>(a, left);
  else if constexpr (LEFT_TRANSPOSED || LONE) pack_columns<C, K, M>(a, left);
  else pack_rows<C, M, K>(a, left);
  if constexpr (KEEPS_RIGHT) y = (const Cell*)b;
  else if constexpr (RIGHT_TRANSPOSED && !LONE) pack_transposed<C, N, K>(b, right);
  else pack_columns<C, K, N>(b, right);
#if defined(HAS_AMX)
  if constexpr (AMX) product_by_amx<C, M, N, DEPTH>(x, y, init, done);
  else
#endif
  product_of_cells<C, M, N, DEPTH, W, LEFT_TRANSPOSED ? 1 : DEPTH, LEFT_TRANSPOSED ? M : 1>(x, y, init, done);
}
