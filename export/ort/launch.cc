#include "launch.h"

#include <cmath>
#include <limits>

namespace fastattn {

const char* name_of(Type type) {
  switch (type) {
    case Type::fp32: return "fp32";
    case Type::fp16: return "fp16";
    case Type::int32: return "i32";
    case Type::int64: return "i64";
    case Type::boolean: return "i1";
  }
  return "?";
}

int64_t Variant::block(std::string_view name) const {
  for (size_t i = 0; i < n_blocks; ++i)
    if (blocks[i].name == name) return blocks[i].number;
  throw Error(std::string("a variant of ") + kernel + " without " + std::string(name));
}

Launch& Launch::set(const Argument& argument) {
  for (Argument& known : arguments)
    if (known.name == argument.name) {
      known = argument;
      return *this;
    }
  arguments.push_back(argument);
  return *this;
}

Launch& Launch::pointer(std::string_view name, Type type, const void* address) {
  return set({name, Argument::pointer, type, (int64_t)(intptr_t)address, 0, {}});
}

Launch& Launch::integer(std::string_view name, int64_t value) {
  return set({name, Argument::integer, Type::int64, value, 0, {}});
}

Launch& Launch::real(std::string_view name, double value) {
  return set({name, Argument::real, Type::fp32, 0, (float)value, {}});
}

Launch& Launch::constant(std::string_view name, int64_t value) {
  return set({name, Argument::constant, Type::int64, value, 0, {}});
}

Launch& Launch::constant(std::string_view name, std::string_view text) {
  return set({name, Argument::constant, Type::int64, 0, 0, text});
}

const Argument* Launch::find(std::string_view name) const {
  for (const Argument& argument : arguments)
    if (argument.name == name) return &argument;
  return nullptr;
}

std::string Launch::describe() const {
  std::string text = std::string(kernel) + "(";
  const char* between = "";
  for (const Argument& argument : arguments) {
    if (argument.kind == Argument::constant) {
      text += between + std::string(argument.name) + "=";
      text += argument.text.data() ? std::string(argument.text) : std::to_string(argument.bits);
    } else if (argument.kind == Argument::pointer && argument.bits) {
      text += between + std::string(argument.name) + " *" + name_of(argument.type);
    } else {
      continue;
    }
    between = ", ";
  }
  return text + ")";
}

namespace {

bool takes(const Parameter& parameter, const Argument& argument) {
  if (parameter.is_pointer != (argument.kind == Argument::pointer)) return false;
  if (parameter.is_pointer)
    return argument.bits && parameter.type == argument.type && argument.bits % parameter.multiple == 0;
  if ((parameter.type == Type::fp32) != (argument.kind == Argument::real)) return false;
  return argument.kind == Argument::real || argument.bits % parameter.multiple == 0;
}

bool is_same(const Constant& constant, const Argument& argument) {
  if (argument.kind != Argument::constant) return false;
  if (constant.text || argument.text.data())
    return constant.text && argument.text.data() && constant.text == argument.text;
  return constant.number == argument.bits;
}

}  // namespace

bool fits(const Variant& variant, const Launch& launch) {
  if (std::string_view(variant.kernel) != launch.kernel) return false;
  size_t constants = 0, pointers = 0;
  for (const Argument& argument : launch.arguments) {
    constants += argument.kind == Argument::constant;
    pointers += argument.kind == Argument::pointer && argument.bits;
  }
  if (constants != variant.n_constants) return false;
  for (size_t i = 0; i < variant.n_constants; ++i) {
    const Argument* argument = launch.find(variant.constants[i].name);
    if (!argument || !is_same(variant.constants[i], *argument)) return false;
  }
  for (size_t i = 0; i < variant.n_parameters; ++i) {
    const Argument* argument = launch.find(variant.parameters[i].name);
    if (!argument || !takes(variant.parameters[i], *argument)) return false;
    pointers -= variant.parameters[i].is_pointer;
  }
  return pointers == 0;
}

size_t choose(const void* variants, size_t n, size_t stride, const Launch& launch, std::initializer_list<Size> sizes) {
  size_t best = n;
  double least = std::numeric_limits<double>::infinity(), largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const Variant& variant = *(const Variant*)((const char*)variants + i * stride);
    if (!fits(variant, launch)) continue;
    double work = 1, tile = 1;
    for (const Size& size : sizes) {
      const double block = (double)variant.block(size.block);
      work *= std::ceil((double)size.size / block) * block;
      tile *= block;
    }
    if (work < least || (work == least && tile > largest)) best = i, least = work, largest = tile;
  }
  return best;
}

int64_t value_of(const Parameter& parameter, const Launch& launch) {
  const Argument* argument = launch.find(parameter.name);
  if (!argument) throw Error(std::string(launch.kernel) + " wants " + parameter.name);
  if (argument->kind == Argument::real) {
    int64_t bits = 0;
    __builtin_memcpy(&bits, &argument->number, sizeof argument->number);
    return bits;
  }
  if (!parameter.is_pointer && parameter.type == Type::int32 && argument->bits != (int32_t)argument->bits)
    throw Error(std::string(parameter.name) + " is " + std::to_string(argument->bits) + ": more than " +
                launch.kernel + " can count");
  return argument->bits;
}

namespace {

[[noreturn]] void lacks(const char* what) { throw Error(std::string("this device has no ") + what); }

}  // namespace

void Device::turn(const float* from, float* to, int64_t count, int64_t rows, int64_t columns) {
  for (int64_t matrix = 0; matrix < count; ++matrix, from += rows * columns, to += rows * columns)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
}

int32_t Device::peek(const int32_t*) { lacks("look at numbers"); }

bool Device::are_none(const int32_t* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (peek(rows + i) >= 0) return false;
  return true;
}

void Device::repeat(void*, const void*, size_t, int64_t) { lacks("copies"); }

void Device::block_numbers(const int32_t*, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t*) {
  lacks("numbers of blocks");
}

}  // namespace fastattn
