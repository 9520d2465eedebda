// The library's one exported function: ONNX Runtime calls it once for each session that it is registered with.
#include <deque>
#include <memory>

#include "cpu.h"
#include "cuda.h"
#include "ops.h"

namespace fastattn {
namespace {

std::unique_ptr<Device> cpu(OrtKernelContext* context) { return std::make_unique<CpuDevice>(context); }

std::vector<Definition> definitions() {
  return {block_attention(), block_attention_with_options(), centroid_attention(), cluster_sums(), hamming_kmeans(),
          hash_argmax(), hash_bits(), linear_attention(), linear_attention_step(), smyrf_hash(), sorted_blocks(),
          topk_attention(), topk_keys()};
}

// Ops and their domain, which sessions share and which live as long as the process.
class Domain {
 public:
  Domain() {
    level();
    check(ort::CreateCustomOpDomain("fastattn", &domain_));
    for (const Definition& definition : definitions())
      for (Types types : definition.types) {
        // ONNX Runtime would put a node that only the CPU has there, on a GPU too; without it, the body runs there
        if (has_cuda_variants() && !definition.is_for_gpus) continue;
        add(definition, types, "CPUExecutionProvider", cpu);
        if (has_cuda_variants()) add(definition, types, "CUDAExecutionProvider", cuda_device);
      }
  }
  OrtCustomOpDomain* get() const { return domain_; }

 private:
  void add(const Definition& definition, Types types, const char* provider, MakeDevice device) {
    ops_.emplace_back(definition, types, provider, device);
    check(ort::CustomOpDomain_Add(domain_, &ops_.back()));
  }

  std::deque<Op> ops_;  // which does not move them
  OrtCustomOpDomain* domain_ = nullptr;
};

}  // namespace
}  // namespace fastattn

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                              const fastattn::OrtBase* base) {
  using namespace fastattn;
  const OrtTable table = base->GetApi(kApiVersion);
  if (!table)
    return ort::CreateStatus.in(base->GetApi(1), kNotImplemented,
                                "fastattn's custom ops need ONNX Runtime 1.17 or newer");
  g_ort = table;
  try {
    static const Domain domain;
    return ort::AddCustomOpDomain(options, domain.get());
  } catch (const std::exception& error) {
    return ort::CreateStatus(kFail, error.what());
  }
}
