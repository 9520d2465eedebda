// The part of ONNX Runtime's C interface that a library of custom ops needs, declared here because its headers come
// with no package. The interface is a table of functions that only grows: a place in it keeps its meaning for ever.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorInfo;
struct OrtShapeInferContext;
struct OrtCustomOp;

namespace fastattn {

// That of ONNX Runtime 1.17. A newer release gives out the same table, with more behind it.
constexpr uint32_t kApiVersion = 17;

using OrtTable = const void* const*;

struct OrtBase {
  OrtTable (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

extern std::atomic<OrtTable> g_ort;  // ONNX Runtime's own, from RegisterCustomOps

enum ElementType : int { kFloat = 1, kInt32 = 6, kInt64 = 7, kBool = 9, kFloat16 = 10 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum Characteristic : int { kRequired = 0 };
enum MemoryType : int { kDefaultMemory = 0 };

template <class Result, class... Arguments>
struct OrtFunction {
  size_t place;
  Result operator()(Arguments... arguments) const { return in(g_ort.load(std::memory_order_relaxed), arguments...); }
  Result in(OrtTable table, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(table[place]))(arguments...);
  }
};

namespace ort {
inline constexpr OrtFunction<OrtStatus*, int, const char*> CreateStatus{0};
inline constexpr OrtFunction<const char*, const OrtStatus*> GetErrorMessage{2};
inline constexpr OrtFunction<OrtStatus*, const char*, OrtCustomOpDomain**> CreateCustomOpDomain{26};
inline constexpr OrtFunction<OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*> CustomOpDomain_Add{27};
inline constexpr OrtFunction<OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*> AddCustomOpDomain{28};
inline constexpr OrtFunction<OrtStatus*, OrtValue*, void**> GetTensorMutableData{51};
inline constexpr OrtFunction<OrtStatus*, const OrtTensorInfo*, size_t*> GetDimensionsCount{61};
inline constexpr OrtFunction<OrtStatus*, const OrtTensorInfo*, int64_t*, size_t> GetDimensions{62};
inline constexpr OrtFunction<OrtStatus*, const OrtValue*, OrtTensorInfo**> GetTensorTypeAndShape{65};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelInfo*, const char*, float*> KernelInfoGetAttribute_float{85};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelInfo*, const char*, int64_t*> KernelInfoGetAttribute_int64{86};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelContext*, size_t*> KernelContext_GetInputCount{88};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelContext*, size_t*> KernelContext_GetOutputCount{89};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**> KernelContext_GetInput{90};
inline constexpr OrtFunction<OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>
    KernelContext_GetOutput{91};
inline constexpr OrtFunction<void, OrtStatus*> ReleaseStatus{93};
inline constexpr OrtFunction<void, OrtTensorInfo*> ReleaseTensorTypeAndShapeInfo{99};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelInfo*, const char*, int64_t*, size_t*>
    KernelInfoGetAttributeArray_int64{163};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelContext*, void**> KernelContext_GetGPUComputeStream{193};
inline constexpr OrtFunction<OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>
    KernelContext_ParallelFor{274};
}  // namespace ort
}  // namespace fastattn

// What an op is for ONNX Runtime: it calls these with the struct itself first. As of version 17; later releases read no
// further, going by the version that stands in it.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, fastattn::OrtTable, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, fastattn::OrtTable, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  // from version 18 on; here so that a reader beyond the version still finds zeros
  void* later[4];
};
