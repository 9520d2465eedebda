#include "cuda.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "cuda_variants.h"
#include "framework.h"

namespace fastattn {

namespace {

using namespace cuda;

constexpr unsigned kSharedWithoutAsking = 48 * 1024;  // bytes that any kernel may have
constexpr int64_t kMostPrograms = std::numeric_limits<int32_t>::max(), kMostProgramsAcross = 65535;

std::string capability(int major, int minor) { return "sm_" + std::to_string(major) + std::to_string(minor); }

// The newest that runs on a GPU of this compute capability.
const Target& target_for(int major, int minor) {
  const Target* best = nullptr;
  std::string all;
  for (const Target* target = kTargets; target != kTargets + kTargetCount; ++target) {
    all += (all.empty() ? "" : ", ") + capability(target->major, target->minor);
    const bool runs = target->major == major &&
                      (target->minor == minor || (target->minor < minor && !target->is_exact));
    if (runs && (!best || target->minor > best->minor)) best = target;
  }
  if (!best)
    throw Error("this GPU is " + capability(major, minor) + ", and fastattn's library was built for " +
                (all.empty() ? "none" : all) + ": fastattn build --ort --cuda says for which");
  return *best;
}

// The kernel of a variant, loaded at its first launch on a device and kept as long as the process lives.
cuda::Kernel* kernel_of(const Driver& driver, const CudaVariant& compiled, DeviceId device) {
  static std::mutex mutex;
  static std::map<std::pair<const CudaVariant*, DeviceId>, cuda::Kernel*> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  cuda::Kernel*& kernel = loaded[{&compiled, device}];
  if (!kernel) {
    const char* const name = compiled.variant.kernel;
    Library* library = nullptr;
    cuda::Kernel* found = nullptr;
    driver.check(driver.LibraryLoadData(&library, compiled.cubin->image, nullptr, nullptr, 0, nullptr, nullptr, 0),
                 "cuLibraryLoadData", name);
    driver.check(driver.LibraryGetKernel(&found, library, compiled.cubin->entry), "cuLibraryGetKernel", name);
    const unsigned shared = compiled.cubin->shared_bytes;
    if (shared > kSharedWithoutAsking)
      driver.check(driver.KernelSetAttribute(kMaxDynamicSharedBytes, (int)shared, found, device),
                   "cuKernelSetAttribute for shared memory", (std::to_string(shared) + " bytes").c_str());
    kernel = found;
  }
  return kernel;
}

// The stream's context is the thread's own for as long as this lives: ONNX Runtime may call from any thread.
class Current {
 public:
  Current(const Driver& driver, Stream* stream) : driver_(driver) {
    cuda::Context* context = nullptr;
    driver.check(driver.StreamGetCtx(stream, &context), "cuStreamGetCtx");
    driver.check(driver.CtxPushCurrent(context), "cuCtxPushCurrent");
  }
  ~Current() {
    cuda::Context* context = nullptr;
    driver_.CtxPopCurrent(&context);
  }
  Current(const Current&) = delete;

 private:
  const Driver& driver_;
};

class CudaDevice final : public fastattn::Device {
 public:
  explicit CudaDevice(Stream* stream)
      : driver_(Driver::get()), stream_(stream), current_(driver_, stream), target_(target_of(driver_, device_)) {}

  ~CudaDevice() override {
    for (Address memory : scratch_) driver_.MemFreeAsync(memory, stream_);  // once the kernels before are done with it
  }

  const Variant& choose(const Launch& launch, std::initializer_list<Size> sizes) override {
    const size_t found =
        fastattn::choose(target_.variants, target_.n_variants, sizeof(CudaVariant), launch, sizes);
    if (found < target_.n_variants) return target_.variants[found].variant;
    const std::string arch = capability(target_.major, target_.minor);
    for (const Argument& argument : launch.arguments)
      if (argument.kind == Argument::pointer && argument.bits % 16)
        throw Error("the address of " + std::string(argument.name) + " of " + launch.kernel +
                    " must be a multiple of 16, as ONNX Runtime's own allocators give it");
    throw Error("this library has no " + launch.describe() + " for " + arch +
                ": fastattn.export.session builds what a model needs, `fastattn build --ort` what its options say");
  }

  void run(const Variant& variant, const Launch& launch, Grid grid) override {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const CudaVariant& compiled = reinterpret_cast<const CudaVariant&>(variant);  // whose first member it is
    const Cubin& cubin = *compiled.cubin;
    if (grid.x > kMostPrograms / cubin.num_ctas || grid.y > kMostProgramsAcross || grid.z > kMostProgramsAcross)
      throw Error(std::string(variant.kernel) + " can't run on a grid of " + std::to_string(grid.x) + " x " +
                  std::to_string(grid.y) + " x " + std::to_string(grid.z));
    std::vector<int64_t> values;  // the driver reads as many bytes of each as the kernel's parameter has
    values.reserve(variant.n_parameters + 2);
    for (size_t i = 0; i < variant.n_parameters; ++i) values.push_back(value_of(variant.parameters[i], launch));
    // Triton's own two: memory for itself and for its profiler, neither of which a kernel of ours asks for
    values.insert(values.end(), {0, 0});
    std::vector<void*> parameters;
    parameters.reserve(values.size());
    for (int64_t& value : values) parameters.push_back(&value);

    LaunchAttribute attributes[2] = {};
    attributes[0].id = kClusterDimension;
    attributes[0].cluster[0] = cubin.num_ctas;
    attributes[0].cluster[1] = attributes[0].cluster[2] = 1;
    attributes[1].id = kClusterScheduling;
    attributes[1].scheduling = kSpread;
    const LaunchConfig config = {
        {(unsigned)grid.x * cubin.num_ctas, (unsigned)grid.y, (unsigned)grid.z},
        {32 * cubin.num_warps, 1, 1},
        cubin.shared_bytes,
        stream_,
        attributes,
        cubin.num_ctas == 1 ? 0u : 2u,
    };
    driver_.check(driver_.LaunchKernelEx(&config, kernel_of(driver_, compiled, device_), parameters.data(), nullptr),
                  "cuLaunchKernelEx", variant.kernel);
  }

  void* scratch(size_t bytes) override {
    Address memory = 0;
    driver_.check(driver_.MemAllocAsync(&memory, bytes ? bytes : 1, stream_), "cuMemAllocAsync",
                  (std::to_string(bytes) + " bytes").c_str());
    scratch_.push_back(memory);
    return reinterpret_cast<void*>(memory);
  }

  int64_t chunk(int64_t length) const override { return chunk_of(length, 64, 256); }

  void fill(float* memory, float value, int64_t count) override {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    fill_words(memory, word, count);
  }

  void narrow(const float* from, void* to, int64_t count) override {
    Launch launch("narrow");
    launch.pointer("source_ptr", Type::fp32, from).pointer("result_ptr", Type::fp16, to).integer("n", count);
    run_over(launch, count);
  }

  void turn(const float* from, float* to, int64_t count, int64_t rows, int64_t columns) override {
    const int64_t n = product({count, rows, columns});
    Launch launch("turn");
    launch.pointer("source_ptr", Type::fp32, from).pointer("result_ptr", Type::fp32, to).integer("n", n);
    launch.integer("rows", rows).integer("columns", columns);
    run_over(launch, n);
  }

  // An assertion of the kernel's: like any, it ends in CUDA_ERROR_ASSERT where the stream is waited for.
  void check_values(const char*, const int32_t* values, int64_t count, int64_t least, int64_t most) override {
    Launch launch("assert_range");
    launch.pointer("values_ptr", Type::int32, values).integer("n", count).integer("least", least).integer("most", most);
    run_over(launch, count);
  }

  int32_t peek(const int32_t* number) override { return fetch(number, 1)[0]; }

  bool are_none(const int32_t* rows, int64_t count) override {
    const std::vector<int32_t> here = fetch(rows, count);
    return std::all_of(here.begin(), here.end(), [](int32_t row) { return row < 0; });
  }

  void repeat(void* to, const void* piece, size_t bytes, int64_t count) override {
    const Type type = bytes == 1 ? Type::boolean : bytes == 4 ? Type::int32 : Type::int64;
    if (bytes != bytes_of(type)) throw Error("pieces of " + std::to_string(bytes) + " bytes can't be repeated");
    Launch launch("repeat");
    launch.pointer("source_ptr", type, piece).pointer("result_ptr", type, to).integer("n", count);
    run_over(launch, count);
  }

  void block_numbers(const int32_t* index, int64_t n_indices, int64_t n_blocks, int64_t block_size, int64_t length,
                     int32_t absent, int32_t* numbers) override {
    fill_words(numbers, (uint32_t)absent, product({n_indices, length}));
    const int64_t count = product({n_indices, n_blocks, block_size});
    Launch launch("block_numbers");
    launch.pointer("index_ptr", Type::int32, index).pointer("numbers_ptr", Type::int32, numbers);
    launch.integer("n", count).integer("n_blocks", n_blocks).integer("block_size", block_size);
    launch.integer("length", length);
    run_over(launch, count);
  }

  void sum_parts(Type type, const void* parts, int64_t rows, int64_t n_parts, int64_t size, int64_t part_size,
                 void* total) override {
    Launch launch("sum_parts");
    launch.pointer("parts_ptr", type, parts).pointer("total_ptr", type, total).integer("n", product({rows, size}));
    launch.integer("n_parts", n_parts).integer("size", size).integer("part_size", part_size);
    run_over(launch, product({rows, size}));
  }

  void fold(const float* outs, const float* lses, int64_t rows, int64_t n_parts, int64_t n_queries, int64_t dim,
            float* out, float* lse) override {
    const int64_t n = product({rows, n_queries, dim});
    if (n_parts == 0) {
      fill(out, 0, n);
      fill(lse, -std::numeric_limits<float>::infinity(), product({rows, n_queries}));
      return;
    }
    Launch launch("fold");
    launch.pointer("outs_ptr", Type::fp32, outs).pointer("lses_ptr", Type::fp32, lses);
    launch.pointer("out_ptr", Type::fp32, out).pointer("lse_ptr", Type::fp32, lse).integer("n", n);
    launch.integer("n_parts", n_parts).integer("n_queries", n_queries).integer("dim", dim);
    run_over(launch, n);
  }

  void largest(const float* numbers, int64_t rows, int64_t n, int64_t k, int32_t* places) override {
    Launch launch("largest");
    launch.pointer("numbers_ptr", Type::fp32, numbers).pointer("places_ptr", Type::int32, places);
    launch.integer("n", n).integer("k", k);
    run(choose(launch, {}), launch, {rows});
  }

  void listed_keys(const int32_t* places, const int32_t* groups, const float* logits, int64_t queries, int64_t k,
                   int64_t n_groups, int64_t group_size, int32_t* keys) override {
    const int64_t n = product({queries, k});
    Launch launch("listed_keys");
    launch.pointer("places_ptr", Type::int32, places).pointer("groups_ptr", Type::int32, groups);
    launch.pointer("logits_ptr", Type::fp32, logits).pointer("keys_ptr", Type::int32, keys).integer("n", n);
    launch.integer("k", k).integer("n_groups", n_groups).integer("group_size", group_size);
    run_over(launch, n);
  }

  void first_centroids(const int64_t* codes, const int32_t* initial, int64_t rows, int64_t length, int64_t n_clusters,
                       int32_t* centroids, int32_t* ranks) override {
    const int64_t n = product({rows, n_clusters});
    Launch launch("first_centroids");
    launch.pointer("codes_ptr", Type::int64, codes).pointer("initial_ptr", Type::int32, initial);
    launch.pointer("centroids_ptr", Type::int32, centroids).pointer("ranks_ptr", Type::int32, ranks);
    launch.integer("n", n).integer("n_clusters", n_clusters).integer("length", length);
    run_over(launch, n);
  }

  void sort_by_cluster(const int32_t* clusters, int64_t rows, int64_t length, int64_t n_clusters, int32_t* order,
                       int32_t* offsets) override {
    Launch launch("sort_by_cluster");
    launch.pointer("clusters_ptr", Type::int32, clusters).pointer("order_ptr", Type::int32, order);
    launch.pointer("offsets_ptr", Type::int32, offsets).integer("length", length).integer("n_clusters", n_clusters);
    run(choose(launch, {}), launch, {product({rows, n_clusters + 1})});
  }

 private:
  static Address address(const void* memory) { return reinterpret_cast<Address>(memory); }

  // What all that was launched before leaves there, which this waits for.
  std::vector<int32_t> fetch(const int32_t* numbers, int64_t count) {
    std::vector<int32_t> here((size_t)count);
    driver_.check(driver_.MemcpyDtoHAsync(here.data(), address(numbers), here.size() * sizeof here[0], stream_),
                  "cuMemcpyDtoHAsync");
    driver_.check(driver_.StreamSynchronize(stream_), "cuStreamSynchronize");
    return here;
  }

  void fill_words(void* memory, uint32_t word, int64_t count) {
    if (count > 0)
      driver_.check(driver_.MemsetD32Async(address(memory), word, (size_t)count, stream_), "cuMemsetD32Async");
  }

  static const Target& target_of(const Driver& driver, DeviceId& device) {
    int major = 0, minor = 0;
    driver.check(driver.CtxGetDevice(&device), "cuCtxGetDevice");
    driver.check(driver.DeviceGetAttribute(&major, kCapabilityMajor, device), "cuDeviceGetAttribute");
    driver.check(driver.DeviceGetAttribute(&minor, kCapabilityMinor, device), "cuDeviceGetAttribute");
    return target_for(major, minor);
  }

  // One program for each BLOCK of count elements.
  void run_over(const Launch& launch, int64_t count) {
    if (count == 0) return;  // of what is empty there may be no address
    const Variant& variant = choose(launch, {});
    const int64_t block = variant.block("BLOCK");
    run(variant, launch, {(count + block - 1) / block});
  }

  const Driver& driver_;
  Stream* stream_;
  Current current_;
  DeviceId device_ = 0;
  const Target& target_;
  std::vector<Address> scratch_;
};

}  // namespace

bool has_cuda_variants() { return cuda::kTargetCount > 0; }

std::unique_ptr<Device> cuda_device(OrtKernelContext* context) {
  void* stream = nullptr;
  check(ort::KernelContext_GetGPUComputeStream(context, &stream));
  return std::make_unique<CudaDevice>(static_cast<Stream*>(stream));
}

}  // namespace fastattn
