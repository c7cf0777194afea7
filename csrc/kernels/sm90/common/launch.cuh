#pragma once

#include <cuda_runtime.h>

namespace ternary::sm90 {

// Multiprocessors of the current device.
inline cudaError_t count_sms(int* sms) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device) : error;
}

// Launches a kernel that may start beside the one before it: it must call wait_for_prerequisites() before it
// reads what kernels wrote, parameters of the model apart, and before it writes anything.
template <class Args>
cudaError_t launch_overlapping(void (*kernel)(Args), const Args& args, dim3 blocks, unsigned threads,
                               cudaStream_t stream, size_t shared_bytes = 0) {
  cudaLaunchAttribute overlap = {.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config = {.gridDim = blocks,
                                     .blockDim = dim3(threads),
                                     .dynamicSmemBytes = shared_bytes,
                                     .stream = stream,
                                     .attrs = &overlap,
                                     .numAttrs = 1};
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace ternary::sm90
