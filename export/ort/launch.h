// One launch of a kernel, and a kernel that was compiled for some launches, as every device understands them.
//
// A host function gives each argument by its name in the Triton kernel, run-time ones and constexprs alike, but for the
// block sizes; what an option that is off would need is left out. A compiled variant says which of them it wants, in
// which order, and which values its constants have. So nothing depends on an order that two files would have to share,
// and a launch that no variant fits is an error that can name what it wanted.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace fastattn {

// What reaches ONNX Runtime as an OrtStatus.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// As Triton calls them. A parameter is one of the numbers, or a pointer to one of any; boolean is torch's and ONNX's, a
// byte of 0 or 1.
enum class Type : uint8_t { fp32, fp16, int32, int64, boolean };

const char* name_of(Type type);  // "fp32", "fp16", "i32", "i64", "i1"

// ---- what was compiled: tables of constants that a generator writes, see variants.py

struct Parameter {
  const char* name;
  Type type;             // of the number, or of what is pointed to
  bool is_pointer;
  uint8_t multiple = 1;  // the variant counts on the value, or address, dividing by this
};

struct Constant {
  const char* name;
  int64_t number;
  const char* text = nullptr;  // in place of the number
};

struct Variant {
  const char* kernel;           // as KERNELS of a room calls it: "block_attention_forward"
  const Parameter* parameters;  // in the order of the kernel's arguments
  size_t n_parameters;
  const Constant* constants;  // all constexprs that a launch gives
  size_t n_constants;
  const Constant* blocks;  // those that it does not: BLOCK_*, SCATTER, ...
  size_t n_blocks;

  // Of a constexpr that a configuration chose; which there must be.
  int64_t block(std::string_view name) const;
};

// ---- what is wanted

struct Argument {
  enum Kind : uint8_t { pointer, integer, real, constant };
  std::string_view name;  // a literal's
  Kind kind;
  Type type;     // of what a pointer points to
  int64_t bits;  // address, integer or constant
  float number;  // of a real
  std::string_view text;  // of a constant that is a string
};

class Launch {
 public:
  explicit Launch(const char* kernel) : kernel(kernel) { arguments.reserve(48); }

  // Names and texts must outlive the launch: literals do. A null pointer is an argument that is not there, as None is
  // for Triton. Setting a name again replaces its value.
  Launch& pointer(std::string_view name, Type type, const void* address);
  Launch& integer(std::string_view name, int64_t value);
  Launch& real(std::string_view name, double value);
  Launch& constant(std::string_view name, int64_t value);
  Launch& constant(std::string_view name, std::string_view text);

  const Argument* find(std::string_view name) const;
  std::string describe() const;  // the kernel, its constants and what its pointers point to

  const char* kernel;
  std::vector<Argument> arguments;

 private:
  Launch& set(const Argument& argument);
};

// Whether the variant is of this kernel, has the launch's constants, and takes its pointers, of their types, and no
// others. Numbers that it has no use for are passed over, one that it wants and is not given is not.
bool fits(const Variant& variant, const Launch& launch);

// The place among n variants of one that fits; n if none does. stride: bytes from one to the next, for tables whose
// entries begin with a Variant. sizes: what tiles go over, by the name of their block size; of several that fit that is
// taken whose tiles pad these the least, and of these the one with the largest.
struct Size {
  std::string_view block;
  int64_t size;
};
size_t choose(const void* variants, size_t n, size_t stride, const Launch& launch, std::initializer_list<Size> sizes);

// The value of a parameter, as 64 bits of which a shorter type takes the first. Throws Error for an integer that does
// not fit its type.
int64_t value_of(const Parameter& parameter, const Launch& launch);

// ---- who does it

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// Where a node computes, for the time of one call of it. Calls are in order, as on a stream; results are there when
// ONNX Runtime asks for them. Every failure throws Error.
class Device {
 public:
  virtual ~Device() = default;

  // The variant for a launch; throws an Error that says what is missing and how to build it. What it returns begins an
  // entry of the device's own table. A number that hangs on the variant's blocks may have any value till it is run.
  virtual const Variant& choose(const Launch& launch, std::initializer_list<Size> sizes) = 0;

  // Runs all programs of a grid, none if a side is 0.
  virtual void run(const Variant& variant, const Launch& launch, Grid grid) = 0;

  // Memory of the device until the end of the node's call, aligned to 256 bytes; not null, for 0 bytes too.
  virtual void* scratch(size_t bytes) = 0;

  // Rows of a chunk, where chunks of `length` rows are summed apart to keep the device at work.
  virtual int64_t chunk(int64_t length) const = 0;

  // Sets count numbers.
  virtual void fill(float* memory, float value, int64_t count) = 0;

  // Copies count numbers of fp32 to fp16, rounded to the nearest.
  virtual void narrow(const float* from, void* to, int64_t count) = 0;

  // Throws Error, or makes the call fail later, if one of count numbers is below least or above most.
  virtual void check_values(const char* name, const int32_t* values, int64_t count, int64_t least, int64_t most) = 0;

  // Each of count matrices [rows, columns] transposed: [columns, rows]. Here for memory that the CPU reaches.
  virtual void turn(const float* from, float* to, int64_t count, int64_t rows, int64_t columns);

  // total [rows, size]: the sum of the n_parts parts of each row, in their order. A part is `part_size` numbers, of
  // which the first `size` count. type: fp32 or int32.
  virtual void sum_parts(Type type, const void* parts, int64_t rows, int64_t n_parts, int64_t size, int64_t part_size,
                         void* total) = 0;

  // The softmax over all keys from those over each of n_parts parts: outs [rows, n_parts, n_queries, dim] and lses, the
  // same but for dim, to out [rows, n_queries, dim] and lse. Without parts out is 0 and lse -inf.
  virtual void fold(const float* outs, const float* lses, int64_t rows, int64_t n_parts, int64_t n_queries,
                    int64_t dim, float* out, float* lse) = 0;

  // places [rows, k]: those of the k largest of each row's n numbers, in no order; of equals the first are taken, and
  // NaN counts as -inf. k is at most n.
  virtual void largest(const float* numbers, int64_t rows, int64_t n, int64_t k, int32_t* places) = 0;

  // keys [queries, k]: which keys stand at these places among the logits [queries, n_groups, group_size] of groups of
  // neighbouring keys; -1 where the logit is -inf or NaN.
  virtual void listed_keys(const int32_t* places, const int32_t* groups, const float* logits, int64_t queries,
                           int64_t k, int64_t n_groups, int64_t group_size, int32_t* keys) = 0;

  // What hamming.py's kernels begin with: centroids [rows, 2, n_clusters], the halves of the codes [rows, length] of
  // the initial rows [rows, n_clusters], and ranks [rows, n_clusters], which say which of these exist.
  virtual void first_centroids(const int64_t* codes, const int32_t* initial, int64_t rows, int64_t length,
                               int64_t n_clusters, int32_t* centroids, int32_t* ranks) = 0;

  // order [rows, length]: the places of cluster 0, of cluster 1, ..., each in their order, and last those of none, -1.
  // offsets [rows, n_clusters + 1]: where each cluster begins.
  virtual void sort_by_cluster(const int32_t* clusters, int64_t rows, int64_t length, int64_t n_clusters,
                               int32_t* order, int32_t* offsets) = 0;

  // The rest is for options of ops that not every device has; where it lacks one, an Error says so.

  // The number at an address, once all that was launched before is done.
  virtual int32_t peek(const int32_t* number);

  // Whether all of count numbers are negative; peeks at each, where a device knows no better.
  virtual bool are_none(const int32_t* rows, int64_t count);

  // count copies of a piece of memory, one after the other.
  virtual void repeat(void* to, const void* piece, size_t bytes, int64_t count);

  // Into numbers [n_indices, length] the block in which each row stands, `absent` for those in none. index: n_indices
  // times n_blocks blocks of block_size rows each, -1 for none.
  virtual void block_numbers(const int32_t* index, int64_t n_indices, int64_t n_blocks, int64_t block_size,
                             int64_t length, int32_t absent, int32_t* numbers);
};

}  // namespace fastattn
