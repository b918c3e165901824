/* A GPU that computes nothing: a library that is loaded in front of CUDA's (LD_PRELOAD), for the rehearsal.
 *
 * Memory is the host's, a copy is made at once, every stream and event is done at once, and a kernel that is launched
 * returns without having run. It says that it is an H200. torch's CUDA build then works as on a machine with that GPU,
 * except that what kernels compute stays undefined; the rehearsal computes with tensors that have no numbers.
 */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define MEMORY (141ul << 30)
#define PROCESSORS 132
#define CAPABILITY 9
#define UNUSED __attribute__((unused))

/* The device */
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device UNUSED) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = MEMORY;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* found, int device UNUSED) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "a rehearsed H200");
  found->totalGlobalMem = MEMORY;
  found->major = CAPABILITY;
  found->multiProcessorCount = PROCESSORS;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerMultiprocessor = 228 << 10;
  found->sharedMemPerBlockOptin = 227 << 10;
  found->l2CacheSize = 50 << 20;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device UNUSED) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? CAPABILITY
           : attribute == cudaDevAttrMultiProcessorCount  ? PROCESSORS
                                                          : 0;
  return cudaSuccess;
}

/* Memory; what is pinned is remembered, because a tensor can be asked whether it is */
static struct {
  const char* first;
  size_t size;
} pinned[4096];
static size_t pinned_count;

cudaError_t cudaMalloc(void** memory, size_t size) {
  return posix_memalign(memory, 512, size) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned flags UNUSED) {
  if (pinned_count == sizeof pinned / sizeof *pinned || cudaMalloc(memory, size)) return cudaErrorMemoryAllocation;
  pinned[pinned_count].first = *memory;
  pinned[pinned_count++].size = size;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory UNUSED) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* found, const void* memory) {
  const char* asked = memory;
  memset(found, 0, sizeof *found);
  for (size_t i = 0; i < pinned_count; i++)
    if (asked >= pinned[i].first && asked < pinned[i].first + pinned[i].size) found->type = cudaMemoryTypeHost;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind UNUSED) {
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream UNUSED) {
  return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t size) {
  memset(to, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream UNUSED) {
  return cudaMemset(to, value, size);
}

/* Streams and events */
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = malloc(1);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags UNUSED) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags UNUSED, int priority UNUSED) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  free(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream UNUSED) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream UNUSED) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream UNUSED, cudaEvent_t event UNUSED, unsigned flags UNUSED) {
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream UNUSED, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream UNUSED, enum cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                                     unsigned long long* id UNUSED, cudaGraph_t* graph UNUSED,
                                     const cudaGraphNode_t** nodes UNUSED, const cudaGraphEdgeData** edges UNUSED,
                                     size_t* count UNUSED) {
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode UNUSED) { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = malloc(1);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags UNUSED) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event UNUSED, cudaStream_t stream UNUSED) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event UNUSED, cudaStream_t stream UNUSED, unsigned flags UNUSED) {
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event UNUSED) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event UNUSED) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from UNUSED, cudaEvent_t to UNUSED) {
  *milliseconds = 1;
  return cudaSuccess;
}

/* Kernels */
cudaError_t cudaLaunchKernel(const void* kernel UNUSED, dim3 grid UNUSED, dim3 block UNUSED, void** arguments UNUSED,
                             size_t shared UNUSED, cudaStream_t stream UNUSED) {
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch UNUSED, const void* kernel UNUSED,
                                void** arguments UNUSED) {
  return cudaSuccess;
}

/* The driver: torch asks it whether the device is in use. */
CUresult cuDevicePrimaryCtxGetState(CUdevice device UNUSED, unsigned* flags UNUSED, int* active) {
  *active = 1;
  return CUDA_SUCCESS;
}
