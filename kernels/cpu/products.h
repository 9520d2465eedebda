// Matrix products: transposition of operands and the register-blocked product.
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
