#include "heads.h"

namespace fastattn {

void check_heads(int64_t heads, int64_t kv_heads) {
  if (kv_heads > 0 ? heads % kv_heads : heads)
    throw Error("q must have a multiple of k's " + std::to_string(kv_heads) + " heads, got " + std::to_string(heads));
}

void check_lengths(std::initializer_list<int64_t> lengths) {
  for (int64_t length : lengths)
    if (length > (int64_t)1 << 30) throw Error("sequences must have at most 2^30 rows, got " + std::to_string(length));
}

Tensor repeated(Device& device, Tensor given, const Shape& shape) {
  if (given.shape == shape) return given;
  if (given.shape.rank() != shape.rank() || given.shape.count() != 1)
    throw Error(std::string(given.name) + " must have shape " + shape.text() + " or one number, got shape " +
                given.shape.text());
  const size_t bytes = bytes_of(given.type);
  void* made = device.scratch(product({shape.count(), (int64_t)bytes}));
  device.repeat(made, given.data, bytes, shape.count());
  given.data = made;
  given.shape = shape;
  return given;
}

void give_strides(Launch& launch, const Tensor& x, std::initializer_list<std::string_view> names) {
  size_t axis = 0;
  for (std::string_view name : names) {
    int64_t stride = 1;
    for (size_t inner = axis + 1; inner < x.shape.rank(); ++inner) stride *= x[inner];
    // of one batch it is never taken, and might not fit
    launch.integer(name, x[axis] > 1 ? stride : 0);
    ++axis;
  }
}

Result::Result(const Context& context, size_t at, const Shape& shape)
    : device_(context.device()), output_(context.output(at, shape)),
      is_narrow_(context.output_type(at) == Type::fp16), count_(shape.count()),
      data_(output_ && !is_narrow_ ? static_cast<float*>(output_)
                                   : static_cast<float*>(device_.scratch(product({count_, 4})))) {}

void Result::finish() const {
  if (output_ && is_narrow_) device_.narrow(data_, output_, count_);
}

}  // namespace fastattn
