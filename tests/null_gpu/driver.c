/* The CUDA driver for Triton and torch, of the device that runtime.c describes: kernels are loaded
   and started, and nothing happens but that they are counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

#include "counts.h"

#define SUCCESS 0
#define INVALID_VALUE 1
#define CONTEXT ((void *)0x10)
#define POINTER_DEVICE_POINTER 3          /* of CUpointer_attribute */
#define FUNCTION_MAX_THREADS 0            /* of CUfunction_attribute */
#define FUNCTION_REGISTERS 4

extern int attribute(int which) __attribute__((weak));  /* of runtime.c, where it is loaded */

static long last_handle = 0x900000;
static int new_handle(void **handle) {
  *handle = (void *)__atomic_add_fetch(&last_handle, 16, __ATOMIC_RELAXED);
  return SUCCESS;
}
/* A grid ends as on every GPU: 2^31 - 1 programs in its first dimension, 65,535 in the others. */
static int launched(unsigned x, unsigned y, unsigned z) {
  if (x == 0 || x > 0x7fffffffu || y == 0 || y > 65535u || z == 0 || z > 65535u)
    return INVALID_VALUE;
  if (counts) counts[TRITON_LAUNCHES]++;
  return SUCCESS;
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGet(int *device, int i) { *device = i; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = attribute ? attribute(which) : 0;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return SUCCESS; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return SUCCESS;
}
int cuCtxGetCurrent(void **context) { *context = CONTEXT; return SUCCESS; }
int cuCtxSetCurrent(void *context) { return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuStreamGetCtx(void *stream, void **context) { *context = CONTEXT; return SUCCESS; }

int cuModuleLoad(void **module, const char *file) { return new_handle(module); }
int cuModuleLoadData(void **module, const void *image) { return new_handle(module); }
int cuModuleUnload(void *module) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *m, const char *n) { return new_handle(function); }
int cuFuncGetAttribute(int *value, int which, void *function) {
  *value = which == FUNCTION_MAX_THREADS ? 1024 : which == FUNCTION_REGISTERS ? 64 : 0;
  return SUCCESS;
}
int cuFuncSetAttribute(void *function, int which, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *n) { *n = 1; return SUCCESS; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 2; return SUCCESS; }
int cuTensorMapEncodeTiled(void) { return SUCCESS; }
int cuTensorMapEncodeIm2col(void) { return SUCCESS; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z) { return launched(x, y, z); }
/* CUlaunchConfig begins with the grid. */
int cuLaunchKernelEx(const unsigned *grid) { return launched(grid[0], grid[1], grid[2]); }
int cuLaunchCooperativeKernel(void *function, unsigned x, unsigned y, unsigned z) {
  return launched(x, y, z);
}

int cuPointerGetAttributes(void) { return SUCCESS; }
int cuPointerGetAttribute(void *value, int which, unsigned long p) {
  if (which == POINTER_DEVICE_POINTER)
    *(unsigned long *)value = p;
  else
    *(int *)value = 0;
  return SUCCESS;
}
int cuGetErrorString(int e, const char **text) { *text = "null"; return SUCCESS; }
int cuGetErrorName(int e, const char **text) { *text = "null"; return SUCCESS; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags,
                        int *status) {
  *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
  if (status) *status = SUCCESS;
  return SUCCESS;
}
