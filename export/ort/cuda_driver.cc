#include "cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "launch.h"

namespace fastattn::cuda {

namespace {

template <class Function>
void look_up(void* library, const char* name, Function*& function) {
  void* found = dlsym(library, name);
  if (!found)
    throw Error(std::string("NVIDIA's driver on this machine is older than CUDA 12.0: libcuda.so.1 has no ") + name);
  function = reinterpret_cast<Function*>(found);
}

Driver open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Error(std::string("NVIDIA's driver can't be opened: ") + dlerror());
  Driver driver;
  look_up(library, "cuGetErrorName", driver.GetErrorName);
  look_up(library, "cuGetErrorString", driver.GetErrorString);
  look_up(library, "cuStreamGetCtx", driver.StreamGetCtx);
  look_up(library, "cuCtxPushCurrent_v2", driver.CtxPushCurrent);
  look_up(library, "cuCtxPopCurrent_v2", driver.CtxPopCurrent);
  look_up(library, "cuCtxGetDevice", driver.CtxGetDevice);
  look_up(library, "cuDeviceGetAttribute", driver.DeviceGetAttribute);
  look_up(library, "cuLibraryLoadData", driver.LibraryLoadData);
  look_up(library, "cuLibraryGetKernel", driver.LibraryGetKernel);
  look_up(library, "cuKernelSetAttribute", driver.KernelSetAttribute);
  look_up(library, "cuLaunchKernelEx", driver.LaunchKernelEx);
  look_up(library, "cuMemAllocAsync", driver.MemAllocAsync);
  look_up(library, "cuMemFreeAsync", driver.MemFreeAsync);
  look_up(library, "cuMemcpyDtoHAsync_v2", driver.MemcpyDtoHAsync);
  look_up(library, "cuStreamSynchronize", driver.StreamSynchronize);
  look_up(library, "cuMemsetD32Async", driver.MemsetD32Async);
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = open();  // one thread opens it; where that throws, the next call tries again
  return driver;
}

void Driver::check(Result result, const char* function, const char* on) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  if (GetErrorName(result, &name) != 0 || !name) name = "an error without a name";
  if (GetErrorString(result, &text) != 0 || !text) text = "no more is known";
  const std::string tried = on ? std::string(function) + " of " + on : function;
  throw Error(tried + " failed with " + name + " (" + std::to_string(result) + "): " + text);
}

}  // namespace fastattn::cuda
