// libtorch's profiler: what ran, when, and for how long. On a GPU its events come from CUPTI, which the CUDA build of libtorch
// brings; on a CPU they are libtorch's ops.
#include <torch/csrc/autograd/profiler_kineto.h>

#include "shim.h"

#include <cstdint>
#include <set>

using torch::profiler::impl::ActivityType;

static const std::set<ActivityType>& activities(bool is_cuda) {
  // Kernels alone on a GPU: to record the ops as well slows the host down, which feeds it.
  static const std::set<ActivityType> cpu{ActivityType::CPU}, cuda{ActivityType::CUDA};
  return is_cuda ? cuda : cpu;
}

extern "C" {

// Begins to record what this thread does on a device.
int bellora_trace_begin(bool is_cuda) {
  return guarded([&] {
    const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
    torch::autograd::profiler::prepareProfiler(config, activities(is_cuda));
    torch::autograd::profiler::enableProfiler(config, activities(is_cuda));
  });
}

// Ends the recording and hands every event of the device over: its name, the thread or stream it ran on, its start after the
// recording's own and its length, both in nanoseconds. A null `each` throws the events away.
int bellora_trace_end(bool is_cuda, void (*each)(void* to, const char* name, uint64_t lane, int64_t start, int64_t length),
                      void* to) {
  return guarded([&] {
    const auto result = torch::autograd::profiler::disableProfiler();
    const auto wanted = is_cuda ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
    const auto began = static_cast<int64_t>(result->trace_start_ns());
    if (!each) return;
    for (const auto& event : result->events()) {
      if (event.deviceType() != wanted) continue;
      const uint64_t lane = is_cuda ? static_cast<uint64_t>(event.deviceResourceId()) : event.startThreadId();
      each(to, event.name().c_str(), lane, static_cast<int64_t>(event.startNs()) - began,
           static_cast<int64_t>(event.durationNs()));
    }
  });
}
}
