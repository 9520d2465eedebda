// The CUDA device of ONNX Runtime's sessions: launches of cubins on the session's own stream.
#pragma once
#include <memory>

#include "abi.h"
#include "launch.h"

namespace fastattn {

// Whether this library has kernels for GPUs.
bool has_cuda_variants();

// The device and stream of a node's call. Throws Error where NVIDIA's driver is missing, or no kernel was compiled for
// the GPU.
std::unique_ptr<Device> cuda_device(OrtKernelContext* context);

}  // namespace fastattn
