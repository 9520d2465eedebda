// Custom ops as small classes: what ONNX Runtime calls, with every failure as an OrtStatus.
#pragma once
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "launch.h"

namespace fastattn {

// Throws Error for a status that is one.
void check(OrtStatus* status);

// The product of sizes, each at least 0; throws Error where it leaves 2^62 behind.
int64_t product(std::initializer_list<int64_t> sizes);
// Throws Error, naming what there are too many of, unless the product of sizes is at most `most`.
void product_below(int64_t most, const char* what, std::initializer_list<int64_t> sizes);
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }  // of a >= 0, b > 0
// Rows of a chunk, in 64s, where `length` rows are cut into at most `most` of them, of at least `least` rows each.
int64_t chunk_of(int64_t length, int64_t most, int64_t least);

class Shape {
 public:
  static constexpr size_t kMostRank = 8;
  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes);
  Shape(const OrtTensorInfo* info);

  size_t rank() const { return rank_; }
  int64_t operator[](size_t axis) const { return sizes_[axis]; }
  const int64_t* data() const { return sizes_.data(); }
  int64_t count() const;  // of elements
  bool operator==(const Shape& other) const;
  bool operator!=(const Shape& other) const { return !(*this == other); }
  std::string text() const;  // "(2, 8, 64)"

 private:
  std::array<int64_t, kMostRank> sizes_{};
  size_t rank_ = 0;
};

// An input: contiguous, in the memory of the node's device. is_given: false for what an option that is off would need.
struct Tensor {
  const char* name;
  Type type;
  Shape shape;
  const void* data = nullptr;
  bool is_given = false;

  int64_t operator[](size_t axis) const { return shape[axis]; }
  template <class T>
  const T* as() const { return static_cast<const T*>(data); }
  // Throws Error unless it is of this rank and of these sizes; -1 is any.
  const Tensor& expect(std::initializer_list<int64_t> sizes) const;
};

size_t bytes_of(Type type);

class Attributes {
 public:
  explicit Attributes(const OrtKernelInfo* info) : info_(info) {}
  // Where the node lacks it, or the value is below `least`, throws Error.
  int64_t integer(const char* name, int64_t least) const;
  bool flag(const char* name) const;    // 0 or 1
  double real(const char* name) const;  // finite
  std::vector<int64_t> integers(const char* name) const;

 private:
  const OrtKernelInfo* info_;
};

// One call of a node.
class Context {
 public:
  Context(OrtKernelContext* context, const class Op& op, Device& device)
      : context_(context), op_(op), device_(device) {}
  Tensor input(size_t at) const;
  // Memory for an output; null where nobody wants it.
  void* output(size_t at, const Shape& shape) const;
  Type output_type(size_t at) const;
  Device& device() const { return device_; }

 private:
  OrtKernelContext* context_;
  const Op& op_;
  Device& device_;
};

// A node: made with its attributes, called with its inputs, maybe by several threads at a time.
class Node {
 public:
  virtual ~Node() = default;
  virtual void run(const Context& context) const = 0;
};

// T and U are floating-point types that several ports share: an op is registered once for each choice of them.
struct Port {
  enum Kind : uint8_t { T, U, fp32, int32, int64, boolean };
  const char* name;
  Kind kind = T;
};

struct Types {
  Type t, u;
};

// The choices for ops with ports of T alone, of T and U, and of neither.
inline const std::vector<Types> kEachT = {{Type::fp32, Type::fp32}, {Type::fp16, Type::fp16}};
inline const std::vector<Types> kEachTandU = {
    {Type::fp32, Type::fp32}, {Type::fp16, Type::fp16}, {Type::fp32, Type::fp16}, {Type::fp16, Type::fp32}};
inline const std::vector<Types> kNoTypes = {{Type::fp32, Type::fp32}};

struct Definition {
  const char* name;
  std::vector<Types> types;
  std::vector<Port> inputs, outputs;
  std::function<std::unique_ptr<Node>(const Attributes&)> make;
  // Whether GPUs have it: whether it does all of its work through Device.
  bool is_for_gpus = false;
};

// A device for a call of a node.
using MakeDevice = std::unique_ptr<Device> (*)(OrtKernelContext*);

class Op : public OrtCustomOp {
 public:
  Op(Definition definition, Types types, const char* provider, MakeDevice make_device);
  Type type_of(const Port& port) const;

  const Definition definition;
  const Types types;
  const char* const provider;
  const MakeDevice make_device;
};

}  // namespace fastattn
