// A libcuda.so.1 that runs nothing and writes down what it is asked for, a line of JSON a call, into $FAKE_CUDA_LOG.
//
// It is built against NVIDIA's own cuda.h, and reads the sizes of a kernel's parameters from the cubin, as the driver
// does: so it sees what a GPU would be given. Device d has compute capability number d of $FAKE_CUDA_CAPABILITIES
// ("80,90") and streams 0x1000 * (d + 1) + anything below 0x1000. $FAKE_CUDA_FAIL ("cuLaunchKernelEx=700") makes a call
// fail. Built with OLD_DRIVER, it lacks what came with CUDA 12.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Elf {
  unsigned char ident[16];
  uint16_t type, machine;
  uint32_t version;
  uint64_t entry, program_headers, section_headers;
  uint32_t flags;
  uint16_t header_size, program_header_size, n_program_headers, section_header_size, n_sections, name_section;
};

struct Section {
  uint32_t name, type;
  uint64_t flags, address, offset, size;
  uint32_t link, info;
  uint64_t alignment, entry_size;
};

struct Function {
  std::string name, image;
  std::vector<size_t> sizes;  // of its parameters
};

std::mutex mutex;
thread_local std::vector<CUcontext> contexts;

void log(const std::string& call, const std::string& fields) {
  std::lock_guard<std::mutex> lock(mutex);
  FILE* file = std::fopen(std::getenv("FAKE_CUDA_LOG"), "a");
  std::fprintf(file, "{\"call\": \"%s\"%s}\n", call.c_str(), fields.c_str());
  std::fclose(file);
}

std::string field(const char* name, unsigned long long value) {
  return std::string(", \"") + name + "\": " + std::to_string(value);
}

std::string field(const char* name, const std::string& value) {
  return std::string(", \"") + name + "\": \"" + value + "\"";
}

// What this call is to return, for $FAKE_CUDA_FAIL may say.
CUresult result_of(const char* call) {
  const char* fail = std::getenv("FAKE_CUDA_FAIL");
  if (!fail) return CUDA_SUCCESS;
  const size_t length = std::strlen(call);
  return std::strncmp(fail, call, length) == 0 && fail[length] == '=' ? (CUresult)std::atoi(fail + length + 1)
                                                                       : CUDA_SUCCESS;
}

int capability_of(int device) {
  const char* text = std::getenv("FAKE_CUDA_CAPABILITIES");
  for (; device > 0; --device) text = std::strchr(text, ',') + 1;
  return std::atoi(text);
}

CUcontext context_of(int device) { return (CUcontext)(uintptr_t)(0xc0 + device); }

CUresult current(int* device) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *device = (int)((uintptr_t)contexts.back() - 0xc0);
  return CUDA_SUCCESS;
}

// The kernel of a cubin, which is an ELF file: the parameters are told of in the section .nv.info.<name>, in records of
// a format, an attribute and a size or value, of which attribute 0x17 is a parameter.
Function* function_in(const char* image, const char* name) {
  const Elf* elf = (const Elf*)image;
  if (std::memcmp(elf->ident, "\x7f" "ELF", 4) != 0) return nullptr;
  const Section* sections = (const Section*)(image + elf->section_headers);
  const char* names = image + sections[elf->name_section].offset;
  size_t size = elf->section_headers + elf->n_sections * sizeof(Section);
  const size_t programs = elf->program_headers + elf->n_program_headers * elf->program_header_size;
  if (elf->n_program_headers && programs > size) size = programs;
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (size_t i = 0; i < size; ++i) hash = (hash ^ (unsigned char)image[i]) * 0x100000001b3;
  for (int i = 0; i < elf->n_sections; ++i) {
    if (names + sections[i].name != std::string(".nv.info.") + name) continue;
    std::map<int, size_t> sizes;
    const unsigned char* at = (const unsigned char*)image + sections[i].offset;
    for (const unsigned char* end = at + sections[i].size; at < end;) {
      uint16_t length, ordinal;
      uint32_t word;
      std::memcpy(&length, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {
        std::memcpy(&ordinal, at + 8, 2);
        std::memcpy(&word, at + 12, 4);
        sizes[ordinal] = word >> 18;
      }
      at += at[0] == 4 ? 4 + length : 4;
    }
    Function* function = new Function{name, std::to_string(hash), {}};
    for (const auto& [ordinal, bytes] : sizes) function->sizes.push_back(bytes);
    return function;
  }
  return nullptr;
}

}  // namespace

extern "C" {

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  *context = context_of((int)((uintptr_t)stream / 0x1000) - 1);
  return result_of("cuStreamGetCtx");
}

CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  log("cuCtxPushCurrent", field("context", (uintptr_t)context));
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = contexts.back();
  contexts.pop_back();
  log("cuCtxPopCurrent", field("context", (uintptr_t)*context));
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  contexts = {context};
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) { return current(device); }

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    *value = capability_of(device) / 10;
  else if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    *value = capability_of(device) % 10;
  else
    *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)function_in((const char*)module, name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
  *value = 0;
  return CUDA_SUCCESS;
}

#ifndef OLD_DRIVER
CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
  *library = (CUlibrary)image;
  log("cuLibraryLoadData", "");
  return result_of("cuLibraryLoadData");
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  *kernel = (CUkernel)function_in((const char*)library, name);
  return *kernel ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
#endif

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  log("cuKernelSetAttribute", field("attribute", attribute) + field("value", value) + field("device", device) +
                                  field("kernel", ((Function*)kernel)->name));
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters, void**) {
  const Function& function = *(const Function*)handle;
  int device = 0;
  if (current(&device) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
  std::string values;
  for (size_t i = 0; i < function.sizes.size(); ++i) {
    values += i ? ", \"" : "\"";
    for (size_t at = 0; at < function.sizes[i]; ++at) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", ((const unsigned char*)parameters[i])[at]);
      values += digits;
    }
    values += "\"";
  }
  std::string attributes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    attributes += (i ? ", [" : "[") + std::to_string(attribute.id);
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      attributes += ", " + std::to_string(attribute.value.clusterDim.x) + ", " +
                    std::to_string(attribute.value.clusterDim.y) + ", " + std::to_string(attribute.value.clusterDim.z);
    else
      attributes += ", " + std::to_string(attribute.value.clusterSchedulingPolicyPreference);
    attributes += "]";
  }
  auto three = [](unsigned x, unsigned y, unsigned z) {
    return "[" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + "]";
  };
  log("cuLaunchKernelEx", field("kernel", function.name) + field("image", function.image) + field("device", device) +
                              ", \"grid\": " + three(config->gridDimX, config->gridDimY, config->gridDimZ) +
                              ", \"block\": " + three(config->blockDimX, config->blockDimY, config->blockDimZ) +
                              field("shared", config->sharedMemBytes) +
                              field("stream", (uintptr_t)config->hStream) + ", \"attributes\": [" + attributes +
                              "], \"parameters\": [" + values + "]");
  return result_of("cuLaunchKernelEx");
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuMemAllocAsync(CUdeviceptr* memory, size_t bytes, CUstream stream) {
  static CUdeviceptr next = 0x7f0000000000;
  {
    std::lock_guard<std::mutex> lock(mutex);
    *memory = next;
    next += (bytes + 511) / 512 * 512;
  }
  log("cuMemAllocAsync", field("bytes", bytes) + field("address", *memory) + field("stream", (uintptr_t)stream));
  return result_of("cuMemAllocAsync");
}

CUresult cuMemFreeAsync(CUdeviceptr memory, CUstream stream) {
  log("cuMemFreeAsync", field("address", memory) + field("stream", (uintptr_t)stream));
  return CUDA_SUCCESS;
}

// What is there is -1.
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  std::memset(to, 0xff, bytes);
  log("cuMemcpyDtoHAsync", field("address", from) + field("bytes", bytes) + field("stream", (uintptr_t)stream));
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  log("cuStreamSynchronize", field("stream", (uintptr_t)stream));
  return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr memory, unsigned word, size_t count, CUstream stream) {
  int device = 0;
  if (current(&device) != CUDA_SUCCESS) return CUDA_ERROR_INVALID_CONTEXT;
  log("cuMemsetD32Async", field("address", memory) + field("word", word) + field("count", count) +
                              field("stream", (uintptr_t)stream));
  return CUDA_SUCCESS;
}

}  // extern "C"
