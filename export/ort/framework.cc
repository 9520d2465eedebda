#include "framework.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace fastattn {

std::atomic<OrtTable> g_ort{nullptr};

void check(OrtStatus* status) {
  if (!status) return;
  std::string message;
  try {
    message = ort::GetErrorMessage(status);
  } catch (...) {
    ort::ReleaseStatus(status);
    throw;
  }
  ort::ReleaseStatus(status);
  throw Error(message);
}

int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (int64_t size : sizes)
    if (size < 0 || __builtin_mul_overflow(all, size, &all) || all > (int64_t)1 << 62)
      throw Error("a tensor would have more elements than can be counted");
  return all;
}

void product_below(int64_t most, const char* what, std::initializer_list<int64_t> sizes) {
  if (product(sizes) > most) throw Error(std::string("there are more ") + what + " than can be counted");
}

int64_t chunk_of(int64_t length, int64_t most, int64_t least) {
  return ceil_div(std::max(least, ceil_div(length, most)), 64) * 64;
}

Shape::Shape(std::initializer_list<int64_t> sizes) {
  for (int64_t size : sizes) sizes_[rank_++] = size;
}

Shape::Shape(const OrtTensorInfo* info) {
  check(ort::GetDimensionsCount(info, &rank_));
  if (rank_ > kMostRank) throw Error("a tensor of " + std::to_string(rank_) + " dimensions");
  check(ort::GetDimensions(info, sizes_.data(), rank_));
}

int64_t Shape::count() const {
  int64_t all = 1;
  for (size_t axis = 0; axis < rank_; ++axis) all = product({all, sizes_[axis]});
  return all;
}

bool Shape::operator==(const Shape& other) const { return rank_ == other.rank_ && sizes_ == other.sizes_; }

std::string Shape::text() const {
  std::string text = "(";
  for (size_t axis = 0; axis < rank_; ++axis) {
    if (axis) text += ", ";
    text += sizes_[axis] < 0 ? "any" : std::to_string(sizes_[axis]);
  }
  return text + ")";
}

const Tensor& Tensor::expect(std::initializer_list<int64_t> sizes) const {
  bool fits = is_given && shape.rank() == sizes.size();
  size_t axis = 0;
  for (int64_t size : sizes) {
    fits = fits && (size < 0 || shape[axis] == size);
    ++axis;
  }
  if (!fits)
    throw Error(std::string(name) + " must have shape " + Shape(sizes).text() + ", got " +
                (is_given ? shape.text() : "nothing"));
  return *this;
}

size_t bytes_of(Type type) {
  switch (type) {
    case Type::fp32:
    case Type::int32: return 4;
    case Type::fp16: return 2;
    case Type::int64: return 8;
    case Type::boolean: return 1;
  }
  return 0;
}

// ---- attributes

namespace {

void found(OrtStatus* status, const char* name) {
  if (!status) return;
  ort::ReleaseStatus(status);
  throw Error(std::string("attribute ") + name + " is missing");
}

}  // namespace

int64_t Attributes::integer(const char* name, int64_t least) const {
  int64_t value = 0;
  found(ort::KernelInfoGetAttribute_int64(info_, name, &value), name);
  if (value < least)
    throw Error(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
  return value;
}

bool Attributes::flag(const char* name) const {
  const int64_t value = integer(name, 0);
  if (value > 1) throw Error(std::string(name) + " must be 0 or 1, got " + std::to_string(value));
  return value;
}

double Attributes::real(const char* name) const {
  float value = 0;
  found(ort::KernelInfoGetAttribute_float(info_, name, &value), name);
  if (!std::isfinite(value)) throw Error(std::string(name) + " must be finite");
  return value;
}

std::vector<int64_t> Attributes::integers(const char* name) const {
  size_t size = 0;
  found(ort::KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size), name);
  std::vector<int64_t> values(size);
  check(ort::KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
  return values;
}

// ---- a call

namespace {

struct Info {
  OrtTensorInfo* info = nullptr;
  ~Info() {
    if (info) ort::ReleaseTensorTypeAndShapeInfo(info);
  }
};

}  // namespace

Tensor Context::input(size_t at) const {
  const Port& port = op_.definition.inputs.at(at);
  Tensor tensor{port.name, op_.type_of(port), {}, nullptr, false};
  size_t count = 0;
  check(ort::KernelContext_GetInputCount(context_, &count));
  const OrtValue* value = nullptr;
  if (at < count) check(ort::KernelContext_GetInput(context_, at, &value));
  if (!value) throw Error(std::string(port.name) + " must be given");
  Info info;
  check(ort::GetTensorTypeAndShape(value, &info.info));
  tensor.shape = Shape(info.info);
  void* data = nullptr;
  check(ort::GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  tensor.is_given = true;
  return tensor;
}

void* Context::output(size_t at, const Shape& shape) const {
  shape.count();  // sizes of at least 0 that can be counted
  size_t count = 0;
  check(ort::KernelContext_GetOutputCount(context_, &count));
  if (at >= count) return nullptr;
  OrtValue* value = nullptr;
  check(ort::KernelContext_GetOutput(context_, at, shape.data(), shape.rank(), &value));
  void* data = nullptr;
  if (value) check(ort::GetTensorMutableData(value, &data));
  return data;
}

Type Context::output_type(size_t at) const { return op_.type_of(op_.definition.outputs.at(at)); }

// ---- ops

namespace {

int element_type(Type type) {
  switch (type) {
    case Type::fp32: return kFloat;
    case Type::fp16: return kFloat16;
    case Type::int32: return kInt32;
    case Type::int64: return kInt64;
    case Type::boolean: return kBool;
  }
  return 0;
}

// No exception may reach ONNX Runtime, which is not ours and may be built without them.
template <class Body>
OrtStatus* guarded(const char* op, Body body) {
  try {
    try {
      body();
      return nullptr;
    } catch (const std::bad_alloc&) {
      return ort::CreateStatus(kFail, (std::string("fastattn ") + op + ": out of memory").c_str());
    } catch (const std::exception& error) {
      return ort::CreateStatus(kInvalidArgument, (std::string("fastattn ") + op + ": " + error.what()).c_str());
    }
  } catch (...) {
    return ort::CreateStatus(kFail, "fastattn: an error that can't be told");
  }
}

struct Instance {
  const Op& op;
  std::unique_ptr<Node> node;
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

}  // namespace

Type Op::type_of(const Port& port) const {
  switch (port.kind) {
    case Port::T: return types.t;
    case Port::U: return types.u;
    case Port::fp32: return Type::fp32;
    case Port::int32: return Type::int32;
    case Port::int64: return Type::int64;
    case Port::boolean: return Type::boolean;
  }
  return types.t;
}

Op::Op(Definition given, Types types, const char* provider, MakeDevice make_device)
    : OrtCustomOp{}, definition(std::move(given)), types(types), provider(provider), make_device(make_device) {
  version = kApiVersion;
  GetName = [](const OrtCustomOp* op) { return self(op).definition.name; };
  GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
  GetInputType = [](const OrtCustomOp* op, size_t at) {
    return element_type(self(op).type_of(self(op).definition.inputs[at]));
  };
  GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).definition.inputs.size(); };
  GetOutputType = [](const OrtCustomOp* op, size_t at) {
    return element_type(self(op).type_of(self(op).definition.outputs[at]));
  };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).definition.outputs.size(); };
  GetInputCharacteristic = GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int { return kDefaultMemory; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  CreateKernelV2 = [](const OrtCustomOp* op, OrtTable, const OrtKernelInfo* info, void** made) {
    return guarded(self(op).definition.name, [&] {
      *made = new Instance{self(op), self(op).definition.make(Attributes(info))};
    });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Instance& instance = *static_cast<const Instance*>(kernel);
    return guarded(instance.op.definition.name, [&] {
      const std::unique_ptr<Device> device = instance.op.make_device(context);
      instance.node->run(Context(context, instance.op, *device));
    });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
}

}  // namespace fastattn
