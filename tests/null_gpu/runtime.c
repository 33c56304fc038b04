/* A CUDA runtime and cuBLAS for torch, of a device that computes nothing: an H100 with 80 GB.

   Loaded before the real libraries, it answers torch's calls: it hands out memory, copies what is
   small, counts launches and waits, and reports the properties of the device. libraries.py adds an
   empty answer for every other symbol that torch asks for. Memory is pages that the system makes
   when they are first touched. No kernel touches them, so a model of any size fits. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include "counts.h"

#define DEVICE_BYTES 85017755648ull       /* of an H100 with 80 GB */
#define RESERVED_BYTES (600ull << 20)     /* what a CUDA context takes */
#define ARENA_BYTES (8ull << 40)          /* addresses, which are never given out twice */
#define GRANULE (2ull << 20)
#define HOST_GRANULE 4096ull
#define COPIED_BYTES (1ull << 20)         /* larger copies move nothing */
#define MAX_BLOCKS (1 << 16)
#define DRIVER_VERSION 13000
#define BLAS_VERSION 130100
#define SUCCESS 0
#define OUT_OF_MEMORY 2

long counts[COUNTS];

long null_gpu_count(int which) { return counts[which]; }

/* Memory */

static char *device_arena, *host_arena;
static size_t device_used, host_used, live_bytes;
static struct { char *start; size_t bytes; } blocks[MAX_BLOCKS];
static int block_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static char *arena(void) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return mmap(0, ARENA_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
}

static void prepare(void) {
  if (device_arena) return;
  device_arena = arena();
  host_arena = arena();
}

static size_t rounded(size_t bytes, size_t granule) {
  return (bytes + granule - 1) / granule * granule;
}

static int is_in(const char *start, const void *p) {
  return start && (char *)p >= start && (char *)p < start + ARENA_BYTES;
}

int cudaMalloc(void **p, size_t bytes) {
  pthread_mutex_lock(&lock);
  prepare();
  counts[ALLOCATIONS]++;
  int fits = live_bytes + bytes <= DEVICE_BYTES - RESERVED_BYTES && block_count < MAX_BLOCKS;
  *p = fits ? device_arena + device_used : 0;
  if (fits) {
    blocks[block_count].start = *p;
    blocks[block_count++].bytes = bytes;
    device_used += rounded(bytes, GRANULE);
    live_bytes += bytes;
  }
  pthread_mutex_unlock(&lock);
  return fits ? SUCCESS : OUT_OF_MEMORY;
}

int cudaFree(void *p) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < block_count; i++) {
    if (blocks[i].start != p) continue;
    live_bytes -= blocks[i].bytes;
    madvise(p, blocks[i].bytes & ~(HOST_GRANULE - 1), MADV_DONTNEED);
    blocks[i] = blocks[--block_count];
    break;
  }
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
  pthread_mutex_lock(&lock);
  prepare();
  *p = host_arena + host_used;
  host_used += rounded(bytes, HOST_GRANULE);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
int cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }

int cudaMemGetInfo(size_t *free, size_t *total) {
  *total = DEVICE_BYTES;
  *free = DEVICE_BYTES - live_bytes - RESERVED_BYTES;
  return SUCCESS;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  int on_device = is_in(device_arena, p);
  memset(found, 0, sizeof *found);
  found->type = on_device                ? cudaMemoryTypeDevice
                : is_in(host_arena, p) ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  found->devicePointer = (void *)p;
  found->hostPointer = on_device ? 0 : (void *)p;
  return SUCCESS;
}

/* Copies */

static void copy(void *to, const void *from, size_t bytes) {
  int to_device = is_in(device_arena, to), from_device = is_in(device_arena, from);
  if (to_device && from_device) {
    counts[ON_DEVICE]++;
    counts[BYTES_ON_DEVICE] += bytes;
  } else if (to_device) {
    counts[TO_DEVICE]++;
    counts[BYTES_TO_DEVICE] += bytes;
  } else {
    counts[TO_HOST]++;
    counts[BYTES_TO_HOST] += bytes;
  }
  if (bytes <= COPIED_BYTES || !(to_device || from_device)) memcpy(to, from, bytes);
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  copy(to, from, bytes);
  return SUCCESS;
}
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  copy(to, from, bytes);
  return SUCCESS;
}
int cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, void *stream) {
  copy(to, from, bytes);
  return SUCCESS;
}
int cudaMemsetAsync(void *p, int value, size_t bytes, void *stream) {
  counts[FILLS]++;
  if (bytes <= COPIED_BYTES) memset(p, value, bytes);
  return SUCCESS;
}
int cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, 0); }

/* The device */

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;          /* kHz */
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrMemoryClockRate: return 2619000;    /* kHz */
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;  /* bits */
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    default: return 0;
  }
}

int cudaDeviceGetAttribute(int *value, int which, int device) {
  *value = attribute(which);
  return SUCCESS;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3");
  p->totalGlobalMem = DEVICE_BYTES;
  p->major = attribute(cudaDevAttrComputeCapabilityMajor);
  p->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->warpSize = attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsDim[0] = attribute(cudaDevAttrMaxBlockDimX);
  p->maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimY);
  p->maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ);
  p->maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX);
  p->maxGridSize[1] = attribute(cudaDevAttrMaxGridDimY);
  p->maxGridSize[2] = attribute(cudaDevAttrMaxGridDimZ);
  p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
  p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->cooperativeLaunch = 1;
  p->unifiedAddressing = 1;
  p->textureAlignment = 512;
  return SUCCESS;
}

int cudaGetDeviceCount(int *count) { *count = 1; return SUCCESS; }
int cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
int cudaDeviceGetPCIBusId(char *id, int length, int device) {
  strncpy(id, "0000:00:00.0", length);
  return SUCCESS;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}

/* Streams and events: everything has happened when it is asked for */

static long last_handle = 0x1000;
static int new_handle(void **handle) {
  *handle = (void *)__atomic_add_fetch(&last_handle, 16, __ATOMIC_RELAXED);
  return SUCCESS;
}
int cudaStreamCreate(void **s) { return new_handle(s); }
int cudaStreamCreateWithFlags(void **s, unsigned flags) { return new_handle(s); }
int cudaStreamCreateWithPriority(void **s, unsigned flags, int p) { return new_handle(s); }
int cudaStreamGetPriority(void *s, int *priority) { *priority = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *s, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *s, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v2(void *s, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo_v3(void *s, int *status) { *status = 0; return SUCCESS; }
int cudaEventCreate(void **e) { return new_handle(e); }
int cudaEventCreateWithFlags(void **e, unsigned flags) { return new_handle(e); }
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = 1.0f; return SUCCESS; }
int cudaEventSynchronize(void *e) { counts[EVENT_WAITS]++; return SUCCESS; }
int cudaStreamSynchronize(void *s) { counts[STREAM_WAITS]++; return SUCCESS; }
int cudaDeviceSynchronize(void) { counts[DEVICE_WAITS]++; return SUCCESS; }

/* Kernels: counted */

int __cudaGetKernel(void **kernel, const void *function) { return new_handle(kernel); }
int __cudaLaunchKernel(void *kernel) { counts[LAUNCHES]++; return SUCCESS; }
int cudaLaunchKernel(const void *function) { counts[LAUNCHES]++; return SUCCESS; }
int cudaLaunchKernelExC(const void *c) { counts[LAUNCHES]++; return SUCCESS; }
int cudaLaunchCooperativeKernel(const void *f) { counts[LAUNCHES]++; return SUCCESS; }
char __cudaInitModule(void **handle) { return 1; }
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[4];
  return handle;
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->maxDynamicSharedSizeBytes = 232448;
  found->binaryVersion = found->ptxVersion = 90;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 2; return SUCCESS; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 2; return SUCCESS; }
int cudaGetSymbolAddress(void **p, const void *symbol) {
  static char room[1 << 16];
  *p = room;
  return SUCCESS;
}

/* The driver's functions that the runtime looks up: those of driver.c */

static int nothing(void) { return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *status) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : 0;
  if (!*function) *function = (void *)nothing;
  if (status) *status = SUCCESS;
  return SUCCESS;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                            int *status) {
  return cudaGetDriverEntryPointByVersion(name, function, DRIVER_VERSION, flags, status);
}

/* Errors */

const char *cudaGetErrorName(int e) {
  return e == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : e ? "cudaErrorOther" : "cudaSuccess";
}
const char *cudaGetErrorString(int e) {
  return e == OUT_OF_MEMORY ? "out of memory" : e ? "other" : "no error";
}

/* cuBLAS */

int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasGetVersion_v2(void *handle, int *version) { *version = BLAS_VERSION; return SUCCESS; }
int cublasGetStream_v2(void *handle, void **stream) { *stream = 0; return SUCCESS; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return SUCCESS; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return SUCCESS; }
const char *cublasGetStatusString(int status) { return "cublas"; }
const char *cublasGetStatusName(int status) { return "cublas"; }
int cublasLtCreate(void **handle) { return new_handle(handle); }
size_t cublasLtGetVersion(void) { return BLAS_VERSION; }
int cublasLtMatmulDescCreate(void **desc) { return new_handle(desc); }
int cublasLtMatrixLayoutCreate(void **layout) { return new_handle(layout); }
int cublasLtMatmulPreferenceCreate(void **preference) { return new_handle(preference); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
  *found = 1;
  return SUCCESS;
}
